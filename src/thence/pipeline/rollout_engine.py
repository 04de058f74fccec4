"""The vLLM engines of an RL stage's ranks: who starts which, and how all of them get the policy's weights.

Weights go one tensor at a time: all ranks gather it, and one rank of each machine writes it into a file that every
engine of that machine reads, or each rank sends it to its own engine in chunks. No rank holds the whole model.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from thence.errors import UserError
from thence.objective import BareRow
from thence.pipeline.context import StageContext
from thence.pipeline.rollout_places import Place, chunks_ahead, machine, own_gpu, place_of, shared_ahead
from thence.recipe import Rl
from thence.rollout.native import Response, Sampling
from thence.rollout.vllm.chunks import check_names
from thence.rollout.vllm.engine import VllmEngine
from thence.rollout.vllm.failures import EngineFailed
from thence.rollout.vllm.link import Door
from thence.rollout.vllm.settings import vllm_settings
from thence.rollout.vllm.weights import (
    Probe,
    folder_for,
    keeps_names,
    probe_ids,
    scratch_folders,
    tensors_in,
    write_tensors,
    write_weights,
)
from thence.train.model import save_model
from thence.train.parallel.ranks import Ranks, rank_variable
from thence.train.parallel.together import together
from thence.train.step import policy_statistics
from thence.train.trainer import Trainer
from thence.train.weights import named_weights, whole

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Handed:
    """Weights that were copied for the engines.

    Args:
        folder: where they lie until later ones make them superfluous.
        tensors, probe, version, begin: as :meth:`VllmEngine.load_weights` takes them.
    """

    folder: Path
    tensors: int
    probe: Probe
    version: int
    begin: float


class RankEngine:
    """The engine of one rank. Every rank has one, and all of them are given weights together.

    An engine that fails while it samples is started again once for every version of the weights, if no other rank
    uses it.

    Args:
        engine: samples for this rank, maybe for others too.
        trainer: holds the policy.
        scratch: folders for copies of the weights: see :func:`thence.rollout.vllm.weights.scratch_folders`.
        again: starts another engine; None: it cannot be.
        keep: earlier copies that are kept beside the newest, since responses may still be sampled from them.
    """

    def __init__(
        self,
        engine: VllmEngine,
        trainer: Trainer,
        ranks: Ranks,
        scratch: list[Path],
        again: Callable[[], VllmEngine] | None = None,
        keep: int = 0,
    ):
        self.engine, self.trainer, self.ranks = engine, trainer, ranks
        self.scratch, self.again, self.keep = scratch, again, keep
        self.handed: Handed | None = None  # that the engine has
        self.retried: int | None = None
        self._copies: deque[tuple[int, ExitStack]] = deque()

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        limits: Sequence[int] | None = None,
    ) -> list[Response]:
        """As :meth:`VllmEngine.sample`; ranks ask independently of each other."""
        try:
            return self.engine.sample(prompts, seeds, sampling, limits)
        except EngineFailed as error:
            if self.again is None or self.handed is None or self.retried == self.handed.version:
                raise
            log.warning("%s\n  vLLM is started again, once", error)
        handed, self.retried = self.handed, self.handed.version
        self.engine.close()
        self.engine = self.again()
        self.take(handed)
        return self.engine.sample(prompts, seeds, sampling, limits)

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its response together."""
        return self.engine.max_model_len

    def update(self, version: int) -> None:
        """Give every engine the policy's weights as they stand. All ranks come here together.

        Raises:
            UserError: on all ranks, as :meth:`VllmEngine.load_weights`.
        """
        if self.engine.settings.transfer == "files":
            handed = self.prepare(version)
            together(self.ranks, lambda: self.take(handed))
            return
        begin, probe, policy = time.monotonic(), self._probe(), self.trainer.policy
        tensors = together(self.ranks, lambda: self.engine.send_weights(named_weights(policy)))
        together(self.ranks, lambda: self.engine.load_weights(None, tensors, probe, version, begin))

    def prepare(self, version: int) -> Handed:
        """Copy the policy's weights as they stand. All ranks come here together; engines may sample meanwhile.

        Raises:
            UserError: on all ranks: no room.
        """
        begin, ranks, policy = time.monotonic(), self.ranks, self.trainer.policy
        plain = policy.skeleton if policy.skeleton is not None else policy.model  # one in 4 bits is written in float32
        size = sum(p.numel() * max(p.element_size(), 4) for p in plain.parameters())
        probe = self._probe()
        while self._copies and self._copies[0][0] < version - self.keep:
            self._copies.popleft()[1].close()
        held = ExitStack()
        self._copies.append((version, held))
        folder, own = held.enter_context(handed_over(ranks, lambda size: folder_for(size, self.scratch), size))
        tensors = max(ranks.gather(together(ranks, lambda: write_policy(self.trainer, folder if own else None))))
        return Handed(folder, tensors, probe, version, begin)

    def take(self, handed: Handed) -> None:
        """Load a copy into this rank's engine, in the thread that asks for responses. Raises as :meth:`update`."""
        self.engine.load_weights(handed.folder, handed.tensors, handed.probe, handed.version, handed.begin)
        self.handed = handed

    def close(self) -> None:
        """End the engine, if it was started here, and remove the copies of the weights."""
        self.engine.close()
        while self._copies:
            self._copies.popleft()[1].close()
        for folder in self.scratch:
            shutil.rmtree(folder, ignore_errors=True)

    def _probe(self) -> Probe:
        """What the policy says of a short text, computed as all its log-probabilities are, by all ranks together."""
        policy, settings = self.trainer.policy, self.trainer.settings
        ids = probe_ids(policy.model.config.get_text_config().vocab_size)
        trained = torch.ones(len(ids), dtype=torch.bool)
        trained[0] = False
        ((logps, _),) = policy_statistics(policy, [BareRow(torch.tensor(ids), trained)], 1.0, settings, self.ranks)
        said = self.ranks.gather(logps.double().tolist())[0]  # the same text for all, to the last bit
        return Probe(ids, said, str(settings.compute_dtype).removeprefix("torch."))


def write_policy(trainer: Trainer, folder: Path | None) -> int:
    """Write a policy's weights as its Hugging Face folder has them; all ranks together, those without a folder nothing.

    Returns:
        How many tensors there are, on ranks that write; on others it may be any number.

    Raises:
        UserError: no room.
    """
    policy = trainer.policy
    if keeps_names(policy.skeleton if policy.skeleton is not None else policy.model):
        return write_tensors(named_weights(policy), folder)
    with whole(policy) as model:  # its files have other names, which only the whole model can be written under
        if folder is None:
            return 0
        write_weights(model, folder)
        return tensors_in(folder)


@contextmanager
def handed_over(ranks: Ranks, make: Callable[[int], Path], size: int) -> Iterator[tuple[Path, bool]]:
    """A folder that one rank of each machine makes, and removes in the end. All ranks enter together.

    Args:
        make: makes one with room for so many bytes.

    Yields:
        The folder, and whether this rank made it.

    Raises:
        UserError: on all ranks: it cannot be made, or no rank of this machine would make it.
    """
    own = rank_variable("LOCAL_RANK") == 0
    folder = together(ranks, lambda: make(size) if own else None)
    try:
        found = ranks.gather((machine(), None if folder is None else str(folder)))
        path = next((Path(text) for host, text in found if host == machine() and text is not None), None)
        if path is None:
            raise UserError(
                "no rank of this machine has LOCAL_RANK 0, so that none writes weights for vLLM",
                remedy="start the ranks with torchrun, which numbers those of each machine from 0",
                field="LOCAL_RANK",
            )
        yield path, own
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def engine_of(context: StageContext, stage: Rl, trainer: Trainer) -> Iterator[RankEngine | None]:
    """The engine that samples for this rank, running; None: this process samples with its own weights.

    All ranks enter together.

    Raises:
        RecipeError: settings that vLLM does not have, or that do not fit the ranks; a shared engine, or weights
            in chunks, that are to sample ahead.
        UserError: vLLM does not start; weights in chunks of an architecture whose files have other names.
    """
    if stage.engine == "native":
        yield None
        return
    where, ranks = f"{context.name}.vllm", context.ranks
    place = place_of(vllm_settings(stage.vllm, where), ranks, ranks.gather(machine()), where)
    if stage.ahead and place.shared:
        raise shared_ahead(f"{context.name}.ahead")
    if place.settings.transfer == "ipc":
        if stage.ahead:
            raise chunks_ahead(f"{where}.transfer")
        policy = trainer.policy
        check_names(policy.skeleton if policy.skeleton is not None else policy.model)
    with handed_over(ranks, _new_folder, 0) as (folder, own):
        together(ranks, lambda: _write_model(trainer, context, folder if own else None))
        with opened(place, None if place.settings.server else folder, ranks, trainer, stage.ahead) as engine:
            yield engine


@contextmanager
def opened(place: Place, model: Path | None, ranks: Ranks, trainer: Trainer, keep: int = 0) -> Iterator[RankEngine]:
    """This rank's engine: leaders start theirs, then the others of the group come in. ``keep`` as for the engine."""
    settings = place.settings
    environment = settings.environment | own_gpu(trainer.policy.device, settings)
    settings = settings.model_copy(update={"environment": environment})
    run = ranks.gather(secrets.token_hex(16))[0] if place.shared else None
    leads, shared = ranks.rank == place.leader or bool(settings.server), place.shared and not settings.server
    scratch, engine = scratch_folders(), None

    def start(door: Door | None = None) -> VllmEngine:
        return VllmEngine(settings, model, run=run, shared=shared and door is None, door=door, orphans=scratch)

    try:
        engine = together(ranks, start if leads else _nothing)
        door = ranks.gather(None if engine is None else engine.door)[place.leader]
        joined = together(ranks, _nothing if leads else (lambda: start(door)))
        engine = engine or joined
        assert engine is not None
        held = RankEngine(engine, trainer, ranks, scratch, None if place.shared else start, keep)
    except BaseException:
        if engine is not None:
            engine.close()
        for folder in scratch:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        yield held
    finally:
        held.close()


def _nothing() -> None:
    return None


def _new_folder(size: int) -> Path:
    return Path(tempfile.mkdtemp(prefix="thence-vllm-"))


def _write_model(trainer: Trainer, context: StageContext, folder: Path | None) -> None:
    """The folder that vLLM starts with: configuration, tokenizer and weights."""
    policy = trainer.policy
    model = policy.skeleton if policy.skeleton is not None else policy.model
    if policy.skeleton is None:
        if folder is not None:
            save_model(model, context.tokenizer, folder)
        return
    if folder is not None:
        model.config.save_pretrained(folder)
        context.tokenizer.save_pretrained(folder)
    write_policy(trainer, folder)
