"""The home of ranks: how an optimizer step is spread over processes. The step itself only asks for sums."""

from thence.train.parallel.ranks import DataParallel, Ranks, SingleProcess, rank_variable, start_ranks

__all__ = ["DataParallel", "Ranks", "SingleProcess", "rank_variable", "start_ranks"]
