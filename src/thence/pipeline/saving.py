"""The checkpoints of a training stage: when they are written, where a run resumes, and what is not worth keeping."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor

from thence.errors import CheckpointError, StepRefused, UserError
from thence.pipeline.context import StageContext
from thence.pipeline.due import PLACE
from thence.pipeline.numerics import numerics, say_other_numerics
from thence.pipeline.undo import rewind
from thence.recipe import Optimization
from thence.train.checkpoint import (
    BEST,
    KEPT,
    begin_checkpoint,
    begin_parts_checkpoint,
    host_copy,
    newest_checkpoint,
    write_checkpoint,
    write_parts_checkpoint,
)
from thence.train.finite import broken, broken_weights
from thence.train.parallel import Beside, on_first_rank, together
from thence.train.quantized import check_base, quantized_digest
from thence.train.state import load_weights, named_tensors, on_host, read_parts, stored
from thence.train.trainer import Trainer
from thence.train.weights import named_parts


class Checkpoints:
    """Saving and taking up the state of a training stage.

    Args:
        every: steps between checkpoints.
        last: the step after which the stage ends.
        beside: where they are written while training goes on; None: training waits.
    """

    def __init__(self, context: StageContext, trainer: Trainer, every: int, last: int, beside: Beside | None = None):
        self.context, self.trainer, self.every, self.last, self.beside = context, trainer, every, last, beside
        self.folder = context.folder.stage(context.name) / "checkpoints"
        self.tensors: dict[str, Tensor] = {}  # of the stage's own, of the checkpoint that was resumed from
        self._whole = 0  # the step of the last checkpoint that is written

    def resume(self) -> tuple[int, dict[str, Any]]:
        """Load the newest checkpoint into model and trainer. Returns the steps done and the stage's own state.

        Raises:
            CheckpointError: it does not fit, or holds weights that are not finite.
            UserError: the checkpoint is beyond the last step of the stage.
        """
        found = newest_checkpoint(self.folder)
        if found is not None:
            if self.context.leads:
                say_other_numerics(found.plain.get("numerics"), f"the checkpoint of step {found.step}")
            check_base(self.context.model, found.plain.get("quantized"), found.folder)
            load_weights(self.context.model, found.folder)
            tensors = self.trainer.empty_state(found.plain["trainer"], stored(found.folder))
            read_parts(found.folder, tensors)
            what = self._of_any_rank(broken_weights([*self.context.model.named_parameters(), *tensors.items()]))
            if what is not None:
                raise CheckpointError(
                    f"the checkpoint of step {found.step} is not finite: {what}; training had diverged",
                    remedy=f"rename {self.folder}, and stage {self.context.name} begins again from the model before, "
                    f"with a lower learning rate (--{self.context.name}.lr)",
                    file=found.folder,
                )
            self._whole = found.step
            self.trainer.restore(found.plain["trainer"], tensors)
            self.tensors = named_tensors(found.folder, f"{PLACE}/")
        step, own = (found.step, found.plain["stage"]) if found is not None else (0, {})
        if step > self.last:
            raise UserError(
                f"stage {self.context.name} has taken {step} steps, and is to end after {self.last}",
                remedy=f"give it {step} steps or more, or another --folder for a shorter run",
                file=self.context.folder.path,
                field=f"{self.context.name}.steps",
            )
        if self.context.leads:
            rewind(self.context.folder.path, self.context.name, step)
        return step, own

    def after(
        self,
        step: int,
        own: Callable[[], dict[str, Any]],
        held: Callable[[], Mapping[str, Tensor]] = dict,
        *,
        last: bool = False,
        best: bool = False,
    ) -> None:
        """Write a checkpoint if one is due after so many steps, or if the stage ends here.

        Args:
            own: gives the stage's own state, on every rank.
            held: gives tensors of the stage's own, the same on every rank, asked for first.
            last: the stage ends here, whatever its number of steps.
            best: the model is the best so far, and stays until there is a better one.

        Raises:
            StepRefused: the weights or the optimizer's moments are not finite; the checkpoint before stands.
            Exception: what failed in writing this checkpoint, or the one before it in the background.
        """
        if self.beside is not None:
            self.beside.look()
        stays = self._stays(step)
        if step % self.every and step != self.last and not (last or best or stays):
            return
        if self.beside is not None:
            self.beside.wait()  # so that there is one copy at a time
        kept, state = held(), own()
        plain, tensors = self.trainer.state()
        refuse_what_is_broken(self.context, f"after step {step}", self.standing, tensors)
        plain = {"trainer": plain, "stage": state, "numerics": numerics(), "stops": self._stops()}
        if stays:
            plain[KEPT] = True  # in the checkpoint itself: a resume with other settings does not remove it
        if best:
            plain[BEST] = True
        if (digest := quantized_digest(self.context.model)) is not None:
            plain["quantized"] = digest
        self._write(step, plain, {**tensors, **kept})

    def _write(self, step: int, plain: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        context, ranks = self.context, self.context.ranks
        given, keep = (self.folder, step, context.model, context.tokenizer, plain, tensors), self._newest()
        if self.beside is not None:
            rest = begin_beside(context, self.beside, given, keep)
            self.beside.begin(lambda: self._note(step, rest))
            return
        if context.policy.sharded:
            self._note(step, lambda: write_parts_checkpoint(*given, ranks, keep=keep))
        else:
            self._note(step, lambda: on_first_rank(ranks, lambda: write_checkpoint(*given, keep=keep)))

    def _note(self, step: int, act: Callable[[], object]) -> None:
        act()
        self._whole = step

    def standing(self) -> int:
        """The step of the last checkpoint, once what is being written is; 0: there is none."""
        if self.beside is not None:
            with suppress(Exception):  # who asks has an error already
                self.beside.wait()
        return self._whole

    def _stays(self, step: int) -> bool:
        """Whether the checkpoint of a step is one that ``keep_every`` asks for."""
        stage = self.context.recipe.stage(self.context.name)
        every = stage.keep_every if isinstance(stage, Optimization) else None
        return every is not None and step % every == 0

    def _newest(self) -> int:
        """How many of the newest checkpoints stay."""
        stage = self.context.recipe.stage(self.context.name)
        return stage.keep_last or 1 if isinstance(stage, Optimization) else 1

    def _stops(self) -> list[int]:
        """What will end a response of the published model: an exported checkpoint is to stop there too."""
        stage = self.context.recipe.stage(self.context.name)
        return list(self.context.stop_ids(self.context.recipe.stage_data(stage.data)))

    def _of_any_rank(self, what: str | None) -> str | None:
        return next((said for said in self.context.ranks.gather(what) if said is not None), None)


@contextmanager
def saving(context: StageContext, trainer: Trainer, stage: Optimization, last: int) -> Iterator[Checkpoints]:
    """The checkpoints of a stage. All ranks enter and leave together.

    What is being written when an error ends the stage is written to its end.

    Args:
        last: the step after which the stage ends.
    """
    if not stage.checkpoint_async:
        yield Checkpoints(context, trainer, stage.checkpoint_every, last)
        return
    beside = Beside(context.ranks)
    try:
        yield Checkpoints(context, trainer, stage.checkpoint_every, last, beside)
        beside.wait()
    finally:
        beside.close()


def begin_beside(context: StageContext, beside: Beside, given: tuple[Any, ...], keep: int = 1) -> Callable[[], object]:
    """Copy the state to host memory. Returns what is left to do in the thread of every rank.

    Args:
        given: what :func:`thence.train.checkpoint.write_checkpoint` takes.
        keep: how many of the newest checkpoints stay.
    """
    folder, step, model, tokenizer, plain, tensors = given
    ranks = context.ranks
    if context.policy.sharded:
        parts = together(ranks, lambda: on_host({**dict(named_parts(model)), **tensors}))
        finish = begin_parts_checkpoint(folder, step, model, tokenizer, plain, parts, ranks, keep=keep)
        return lambda: finish(beside.ranks)

    def begin() -> Callable[[], object]:
        return begin_checkpoint(folder, step, host_copy(model), tokenizer, plain, on_host(tensors), keep=keep)

    rest = on_first_rank(ranks, begin)
    return lambda: on_first_rank(beside.ranks, rest or (lambda: None))


def refuse_what_is_broken(
    context: StageContext,
    when: str,
    standing: Callable[[], int] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Raise StepRefused where the context's model is not finite any more.

    Args:
        when: at which moment of the stage, for the message.
        standing: gives the step of the last checkpoint; 0: there is none.
        tensors: of the optimizer, to be looked at too.
    """
    found = context.ranks.gather(broken(context.policy, tensors))
    what = next((said for said in found if said is not None), None)
    if what is None:
        return
    raise StepRefused(
        f"training diverged: {when} of stage {context.name} the model is not finite ({what}), so it is not kept",
        remedy=_lower_rate(context, standing() if standing is not None else 0),
        file=context.folder.path,
        field=f"{context.name}.lr",
    )


@contextmanager
def naming_step(context: StageContext, step: int, standing: Callable[[], int]) -> Iterator[None]:
    """While it lasts, a refused optimizer step says of which stage and step it is, and what to do.

    Args:
        step: of the stage, counted from 1.
        standing: gives the step of the last checkpoint; 0: there is none.

    Raises:
        StepRefused: the step that was refused.
    """
    try:
        yield
    except StepRefused as error:
        diverged = error.field == "lr"
        raise StepRefused(
            f"{'training diverged in ' if diverged else ''}step {step} of stage {context.name}: {error.problem}",
            remedy=_lower_rate(context, standing()) if diverged else error.remedy,
            file=context.folder.path,
            field=f"{context.name}.lr" if diverged else error.field,
        ) from error


def _lower_rate(context: StageContext, good: int) -> str:
    rate = getattr(context.recipe.stage(context.name), "lr", None)
    begins = f"it resumes after step {good}, whose checkpoint stands" if good else "the stage begins at its first step"
    return f"resume with a learning rate below {rate:g} (the same command with --{context.name}.lr): {begins}"
