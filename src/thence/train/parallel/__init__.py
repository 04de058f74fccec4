"""The home of ranks: how an optimizer step is spread over processes. The step itself only asks for sums."""

from thence.train.parallel.beside import Beside
from thence.train.parallel.context import ContextGroup
from thence.train.parallel.ranks import DataParallel, Ranks, SingleProcess, rank_variable, sharing_rows, start_ranks
from thence.train.parallel.shard import Sharded, ShardLayout, shard
from thence.train.parallel.together import on_first_rank, together

__all__ = [
    "Beside",
    "ContextGroup",
    "DataParallel",
    "Ranks",
    "ShardLayout",
    "Sharded",
    "SingleProcess",
    "on_first_rank",
    "rank_variable",
    "shard",
    "sharing_rows",
    "start_ranks",
    "together",
]
