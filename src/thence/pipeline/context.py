"""What every stage is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from thence.pipeline.folder import RunFolder
from thence.pipeline.progress import Watcher
from thence.recipe import Optimization, Recipe
from thence.train.checkpoint import load_weights, newest_checkpoint, write_checkpoint
from thence.train.model import compute_dtype
from thence.train.parallel import Ranks
from thence.train.schedule import learning_rate
from thence.train.step import StepSettings
from thence.train.trainer import Trainer


@dataclass
class Context:
    """A run in progress, as one of its stages sees it.

    Args:
        recipe: the resolved recipe.
        name: the stage's name.
        folder: the run folder.
        model, tokenizer: as the stage finds them; a training stage changes the model in place.
        ranks, device: who runs it, and where.
        watcher: is told of progress.
    """

    recipe: Recipe
    name: str
    folder: RunFolder
    model: Any
    tokenizer: Any
    ranks: Ranks
    device: torch.device
    watcher: Watcher

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.ranks.rank == 0

    def seed_parts(self) -> tuple[object, ...]:
        """What this stage's random numbers follow from."""
        return (self.recipe.seed, self.name)

    def log(self, line: dict[str, Any]) -> None:
        """One line of metrics, written by the first rank."""
        if self.leads:
            self.folder.log(line)
            self.watcher.step(line)


def make_trainer(context: Context, stage: Optimization, steps: int) -> Trainer:
    """The trainer of a stage that will take ``steps`` optimizer steps."""
    settings = StepSettings(
        micro_batch_tokens=stage.micro_batch_tokens,
        packing=stage.packing,
        clip_norm=stage.clip_norm,
        compute_dtype=compute_dtype(context.recipe.model, context.device),
    )

    def rate(step: int) -> float:
        return learning_rate(
            step, steps, peak=stage.lr, schedule=stage.schedule, warmup=stage.warmup, floor=stage.floor
        )

    return Trainer(
        context.model,
        rate,
        settings,
        betas=stage.betas,
        eps=stage.eps,
        weight_decay=stage.weight_decay,
        activation_checkpointing=stage.activation_checkpointing,
        ranks=context.ranks,
    )


class Checkpoints:
    """Saving and taking up the state of a training stage."""

    def __init__(self, context: Context, trainer: Trainer, every: int, last: int):
        self.context, self.trainer, self.every, self.last = context, trainer, every, last
        self.folder = context.folder.stage(context.name) / "checkpoints"

    def resume(self) -> tuple[int, dict[str, Any]]:
        """Load the newest checkpoint into model and trainer. Returns the steps done and the stage's own state."""
        found = newest_checkpoint(self.folder)
        if found is not None:
            load_weights(self.context.model, found.folder)
            self.trainer.restore(found.plain["trainer"], found.tensors)
        step, own = (found.step, found.plain["stage"]) if found is not None else (0, {})
        if self.context.leads:
            self.context.folder.rewind(self.context.name, step)
        return step, own

    def after(self, step: int, own: Callable[[], dict[str, Any]]) -> None:
        """Write a checkpoint if one is due after so many steps; ``own`` gives the stage's own state, on every rank."""
        if step % self.every and step != self.last:
            return
        state = own()
        if self.context.leads:
            plain, tensors = self.trainer.state()
            write_checkpoint(
                self.folder,
                step,
                self.context.model,
                self.context.tokenizer,
                {"trainer": plain, "stage": state},
                tensors,
            )
        self.context.ranks.wait()
