"""What every stage is given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thence.accounting.layout import Layout
from thence.accounting.meter import FlopMeter
from thence.data.chat import chat_format, end_token_ids
from thence.data.template import ChatFormat
from thence.data.trajectory import Prompt
from thence.errors import RecipeError
from thence.faults.catalogue import combine
from thence.faults.step import FaultyStep
from thence.models.packing import know_way, way_of
from thence.pipeline.folder import RunFolder
from thence.pipeline.progress import RunWatcher
from thence.pipeline.prompts import RenderedPrompts
from thence.recipe import Data, Optimization, Recipe, Rl, Sft
from thence.train.lora import has_adapters, places_of
from thence.train.model import compute_dtype
from thence.train.parallel import Ranks
from thence.train.policy import Policy, Scorer, Unadapted
from thence.train.schedule import learning_rate
from thence.train.step import StepSettings, train_step
from thence.train.trainer import TakeStep, Trainer


@dataclass
class StageContext:
    """A run in progress, as one of its stages sees it.

    Args:
        recipe: the resolved recipe.
        name: the stage's name.
        folder: the run folder.
        policy, tokenizer: as the stage finds them; a training stage changes the policy in place.
        ranks, device: who runs it, and where.
        layout: how the ranks share the policy.
        reopen: opens the model that the stage starts from once more, laid out in the same way.
        watcher: is told of progress.
        prompts: data tables that are rendered already.
        origin: the model that the stage starts from: a folder or a hub name; empty: random weights.
        meter: counts the FLOPs that this process executes.
    """

    recipe: Recipe
    name: str
    folder: RunFolder
    policy: Policy
    tokenizer: Any
    ranks: Ranks
    device: torch.device
    watcher: RunWatcher
    prompts: RenderedPrompts
    layout: Layout
    reopen: Callable[[], Policy]
    origin: str = ""
    meter: FlopMeter = field(init=False)

    def __post_init__(self) -> None:
        stage = self.recipe.stage(self.name)
        again = isinstance(stage, Optimization) and stage.activation_checkpointing
        # with modules that are trained whole, the rest is counted as if it were trained too: an upper bound
        lora = self.recipe.model.lora if has_adapters(self.model) else None
        adapters = 0 if lora is None or lora.modules_to_save else sum(map(Tensor.numel, self.policy.trained()))
        self.meter = FlopMeter(self.model.config.to_dict(), again, adapters)

    @property
    def model(self) -> Any:
        """The Hugging Face model. Its weights may be cut: :func:`thence.train.weights.whole` has whole ones."""
        return self.policy.model

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.ranks.rank == 0

    def frozen_policy(self) -> Scorer:
        """The policy as the stage starts, to compare with: itself with its adapters off, else a copy."""
        if has_adapters(self.model):
            return Unadapted(self.policy)
        if self.policy.sharded:
            again, stage = self.reopen(), self.recipe.stage(self.name)
            if isinstance(stage, Optimization) and stage.packing:
                know_way(again.model, way_of(self.model))  # found on the whole model; a cut one cannot be tried
            return again
        return Policy(copy.deepcopy(self.model).requires_grad_(False))

    def load_prompts(self, table: Mapping[str, Any]) -> list[Prompt]:
        """The prompts of a stage's data table. Raises DataError as :func:`thence.pipeline.prompts.load_prompts`."""
        return self.prompts.load(self.recipe.stage_data(table), self.tokenizer)

    def order_seed(self, table: Mapping[str, Any]) -> int | None:
        """What the order of a data table's rows follows from; None: they come as they stand."""
        return self.recipe.seed if self.recipe.stage_data(table).order == "shuffled" else None

    def seed_parts(self) -> tuple[object, ...]:
        """What this stage's random numbers follow from."""
        return (self.recipe.seed, self.name)

    def chat(self, data: Data) -> ChatFormat:
        """The chat template of a data table's prompts."""
        return chat_format(self.tokenizer, data.template, data.template_variables)

    def stop_ids(self, data: Data) -> tuple[int, ...]:
        """All tokens that end a response to prompts of a data table, the trained one first."""
        return end_token_ids(self.tokenizer, self.chat(data), self.model)

    @property
    def n_parameters(self) -> int:
        """N of the FLOPs rule: every parameter of the model, adapters apart."""
        places = places_of(self.model)
        found = {name: p for name, p in self.model.named_parameters() if places.plain(name) is not None}
        packed = {name: places.quantized(name) for name in found}  # two numbers in a byte
        return sum(p.numel() if (q := packed[name]) is None else q.shape.numel() for name, p in found.items())

    def executed_flops(self, before: float | None) -> float | None:
        """FLOPs that all ranks have executed since the meter stood at ``before``."""
        if before is None or self.meter.total is None:
            return None
        return float(self.ranks.sum_floats(torch.tensor([self.meter.total - before], dtype=torch.float64)))

    def log(self, line: dict[str, Any]) -> None:
        """One line of metrics, written by the first rank."""
        if self.leads:
            self.folder.log(line)
            self.watcher.step(line)


def make_trainer(context: StageContext, stage: Optimization, steps: int, reference: Scorer | None = None) -> Trainer:
    """The trainer of a stage that will take ``steps`` optimizer steps.

    Args:
        reference: the policy as the stage begins (:meth:`StageContext.frozen_policy`), for methods that compare.
    """
    settings = StepSettings(
        micro_batch_tokens=stage.micro_batch_tokens,
        packing=stage.packing,
        clip_norm=stage.clip_norm,
        skip_norm=stage.skip_norm,
        compute_dtype=compute_dtype(context.recipe.model, context.device),
    )

    def rate(step: int) -> float:
        return learning_rate(
            step, steps, peak=stage.lr, schedule=stage.schedule, warmup=stage.warmup, floor=stage.floor
        )

    return Trainer(
        context.policy,
        rate,
        settings,
        betas=stage.betas,
        eps=stage.eps,
        weight_decay=stage.weight_decay,
        activation_checkpointing=stage.activation_checkpointing,
        ranks=context.ranks,
        take_step=step_of(context.name, stage),
        meter=context.meter,
        reference=reference,
    )


def step_of(name: str, stage: Optimization) -> TakeStep:
    """The step that a stage takes: the clean one, or one with faults.

    Raises:
        UserError: an unknown fault.
        RecipeError: a fault that no checkpoint could resume, or that changes nothing because nothing is clipped or the
            stage has not what it is a fault of, or a batch that cannot be cut as it says.
    """
    if stage.fault is None:
        return train_step
    for fault in combine(stage.fault.names):
        if fault.remembers:
            raise RecipeError(
                f"{fault.name} carries something from step to step that no checkpoint keeps",
                remedy="take another fault; `thence audit` and the tests of thence run this one",
                field=f"{name}.fault",
            )
        if fault.needs.clip and not stage.clip_norm:
            raise RecipeError(
                f"{fault.name} is a way of clipping, and nothing is clipped: clip_norm is 0",
                remedy=f"set {name}.clip_norm, or leave the fault out",
                field=f"{name}.clip_norm",
            )
        lacking = fault.needs.stage_lacks(stage) if isinstance(stage, Rl) else [f.words for f in fault.needs.features]
        if lacking:
            raise RecipeError(
                f"{fault.name} is a fault of what this stage lacks: {lacking[0]}",
                remedy="take another fault, or change the stage; docs/faults.md says what each fault needs",
                field=f"{name}.fault",
            )
    rows = stage.batch if isinstance(stage, Sft) else 0
    if isinstance(stage, Rl):
        rows = (stage.mini_batch or stage.prompts) * stage.rollouts
    cells = stage.fault.accumulation * stage.fault.ranks
    if rows % cells:
        raise RecipeError(
            f"{rows} rows cannot be cut into {stage.fault.accumulation} micro-batches on {stage.fault.ranks} ranks",
            remedy="choose accumulation and ranks whose product divides the rows of a step",
            field=f"{name}.fault",
        )
    return FaultyStep(
        stage.fault.names,
        micro_batch=rows // cells,
        accumulation=stage.fault.accumulation,
        ranks=stage.fault.ranks,
    )


@dataclass
class Budget:
    """What a stage may spend, and has spent: FLOPs by the rule, or trained tokens."""

    measure: str
    amount: float
    spent: float = 0.0

    def spend(self, flops: float, tokens: int) -> bool:
        """Add a step. Returns whether the stage is now as near to its end as another such step would bring it."""
        last = flops if self.measure == "flops" else tokens
        self.spent += last
        return self.spent + last / 2 > self.amount


def budget_of(stage: Optimization) -> Budget | None:
    """The budget of a stage that has one."""
    if stage.flops is not None:
        return Budget("flops", stage.flops)
    return Budget("tokens", stage.tokens) if stage.tokens is not None else None
