"""One cell of the update matrix: a small model trained by the code of a stage on made-up rollout batches, in a layout.

Five prompts are dealt to two optimizer steps, in micro-batches of 40 tokens: no window divides. In the second batch
every second rank has no row that is trained, or no response token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - imported once, before processes are forked
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.oracle import relative
from tests.pipeline.made_rollouts import Kind, MadeRollouts
from tests.tiny_model import make_tiny_model
from thence.data.trajectory import Prompt
from thence.methods.base import Method
from thence.methods.registry import methods
from thence.methods.unknown import leave_out
from thence.objective import Batch
from thence.pipeline.rl_metrics import BatchMetrics
from thence.pipeline.rl_update import Update
from thence.pipeline.sft_stage import demonstration_batch
from thence.pipeline.teacher import TeacherPass
from thence.recipe import Lora, Rl
from thence.train.average import MovingAverage
from thence.train.lora import add_adapters, stirred
from thence.train.parallel import DataParallel, Ranks, ShardLayout, shard
from thence.train.policy import Policy, Scorer, Unadapted
from thence.train.step import StepReport, StepSettings, train_step
from thence.train.trainer import Trainer

METHODS: dict[str, dict[str, Any]] = {
    "sft": {},
    "dft": {},
    "asft": {"kl": 0.5},
    "gift": {"beta": 3.0, "smoothing": 0.05},
    "grpo": {"kl": 0.05},
    "dapo": {"overlong_tokens": 20, "overlong_buffer": 8},
    "luffy": {},
    "srft": {"entropy_level": "batch"},
    "prefix_rft": {},
    "hpt": {"gate": 0.3},
    "relift": {"sft_batch": 3},
    "exgrpo": {"start": 0.0},
    "gspo": {"clip_low": 0.01, "clip_high": 0.02},
    "cispo": {"cap": 1.01},
    "dppo": {"low": 1e-3, "high": 1e-3, "kappa": 0.1},
}
OTHERS: dict[str, dict[str, Any]] = {
    "trapo": {"groups": [2, 1, 1], "thresholds": [0.5, 0.9], "fractions": [0.25, 1.0]},
    "sdft": {"ratio_bound": 1.02},
    "sdft, reverse-kl": {"divergence": "reverse-kl", "teacher": "current"},
    "sdft, forward-kl": {"divergence": "forward-kl", "skip_tokens": 1},
    "sdft, jsd of top 6": {"divergence": "jsd", "top_k": 6, "ratio_bound": 1.02},
    "sdpo": {"average_rate": 0.5},
    "sdpo, reverse-kl of top 6 and tail": {"divergence": "reverse-kl", "top_k": 6, "tail": True, "average_rate": 0.5},
    "sdpo, jsd": {"divergence": "jsd", "alpha": 0.3, "show_own": True, "average_rate": 0.5},
}
"""Methods that the matrix of 29 November 2026 did not have. What stands behind a comma names the options."""
LAYOUTS = {1: ("ddp", "fsdp2"), 2: ("ddp", "fsdp2"), 4: ("ddp", "fsdp2", "hsdp")}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
ALLOWED = {
    "float64": {"gradient": 1e-12, "norm": 1e-12, "update": 1e-12},
    "float32": {"gradient": 1e-5, "norm": 1e-5, "update": 1e-5},
}
EPS = 1e-4
"""Of AdamW. Its first steps divide a gradient by its own size; with the usual 1e-8 they make the rounding of an entry
that is almost zero as large as the step, in one process too. How far rounding goes is measured beside: ``one process,
cut otherwise``."""
KINDS: tuple[Kind, ...] = ("ragged", "idle ranks")
PROMPTS, ROLLOUTS, STEPS_OF_A_BATCH = 5, 4, 2
CLIP_NORM, RATE, TOKENS, OTHER_TOKENS, TEMPERATURE = 0.3, 1e-3, 40, 25, 0.9
COMPARED = ("gradient", "norm", "update")


@dataclass(frozen=True)
class Cell:
    """What is trained, and in which numbers."""

    method: str
    tied: bool
    lora: bool
    dtype: str

    def __str__(self) -> str:
        return f"{self.method}, {'tied' if self.tied else 'untied'}, {'LoRA' if self.lora else 'full'}, {self.dtype}"


def cells_of(names: Iterable[str]) -> list[Cell]:
    """Every cell of these methods."""
    return [Cell(m, tied, lora, d) for d in DTYPES for m in names for tied in (True, False) for lora in (False, True)]


ALL = cells_of(METHODS | OTHERS)


@dataclass
class Trained:
    """What the optimizer steps of a cell were: whole gradients as clipped, norms as they were before, and weights."""

    gradients: list[Tensor]
    norms: list[float]
    start: Tensor
    end: Tensor


def make_policy(cell: Cell) -> Policy:
    """A random model, the same on all ranks; its adapters are no longer zero."""
    model = make_tiny_model(DTYPES[cell.dtype])
    if not cell.tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 1.1)
        model.config.tie_word_embeddings = False
    if cell.lora:
        add_adapters(model, Lora(rank=2, modules_to_save=["model.norm"]), 7)
        with stirred(model):
            values = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), values, strict=True):
                parameter.copy_(value)
    return Policy(model)


def cut(policy: Policy, ranks: Ranks, layout: str, dtype: torch.dtype) -> Ranks:
    """Lay the policy out. Returns the ranks that train it."""
    if layout in ("none", "ddp"):
        return ranks
    assert isinstance(ranks, DataParallel)
    return shard(policy, ranks, ShardLayout(replicas=2 if layout == "hsdp" else 1, compute_dtype=dtype))


def train(
    cell: Cell,
    ranks: Ranks,
    layout: str,
    damage: Callable[[Policy, Ranks], None] | None = None,
    tokens: int = TOKENS,
) -> Trained:
    """Take the optimizer steps of a cell on these ranks, in micro-batches of so many tokens.

    Args:
        damage: is done to the policy and its ranks before.
    """
    policy, dtype = make_policy(cell), DTYPES[cell.dtype]
    start = whole([p.detach() for p in policy.trained()])
    mine = cut(policy, ranks, layout, dtype)
    if damage is not None:
        damage(policy, mine)
    found = Trained([], [], start, start)

    def step(policy: Policy, optimizer: Any, batch: Batch, ranks: Ranks, settings: Any, see: Any) -> StepReport:
        report = train_step(policy, optimizer, batch, ranks, settings, see)
        found.gradients.append(whole([p.grad for p in policy.trained() if p.grad is not None]))
        found.norms.append(report.grad_norm)
        return report

    method = method_of(cell)
    reference = reference_of(cell, policy, ranks, layout) if method.reference_passes else None
    settings = StepSettings(tokens, False, CLIP_NORM, dtype)
    trainer = Trainer(policy, RATE, settings, ranks=mine, take_step=step, eps=EPS, reference=reference)
    if method.stage == "sft":
        train_sft(trainer, method)
    else:
        teacher = None if method.teacher is None else teacher_of(cell, method, trainer, ranks, layout)
        train_rl(trainer, method, teacher)
    found.end = whole([p.detach() for p in policy.trained()])
    return found


def train_sft(trainer: Trainer, method: Method) -> None:
    """Seven demonstrations, then one alone, then six of which every second has no token."""
    sampler = MadeRollouts(trainer.ranks, 3)
    counts: list[tuple[int, Kind]] = [(7, "ragged"), (1, "ragged"), (6, "idle ranks")]
    for number, (count, kind) in enumerate(counts):
        sampler.begin(number, kind)
        trainer.step(demonstration_batch(trainer, method, sampler.demonstrations(sampler.next_prompts(count)))[0])


def method_of(cell: Cell) -> Method:
    """The method of a cell. Adapters have no moving average: their teacher is the start."""
    name, options = cell.method.split(",")[0], (METHODS | OTHERS)[cell.method]
    return methods()[name](options | ({"teacher": "start"} if cell.lora and name == "sdpo" else {}))


class SolutionBefore:
    """Stands for a table's rendered prompts: the solution, then the prompt."""

    def token_ids(self, prompt: Prompt, solution: Sequence[int]) -> tuple[int, ...]:
        return (*solution, *prompt.token_ids)


def teacher_of(cell: Cell, method: Method, trainer: Trainer, ranks: Ranks, layout: str) -> TeacherPass:
    """The teacher of a stage, its weights laid out as the policy's."""
    assert method.teacher is not None
    prompts: Any = SolutionBefore()
    own = method.teacher.weights == "current"
    scorer = None if own else reference_of(cell, trainer.policy, ranks, layout)
    if method.teacher.weights == "average":
        assert isinstance(scorer, Policy)
        trainer.average = MovingAverage(scorer, method.teacher.rate)
    return TeacherPass("rl", method, prompts, trainer, TEMPERATURE, scorer)


def train_rl(trainer: Trainer, method: Method, teacher: TeacherPass | None = None) -> None:
    """A rollout batch of every kind, as an RL stage trains it."""
    stage = Rl(method=method.name, prompts=PROMPTS, rollouts=ROLLOUTS, max_tokens=24, temperature=TEMPERATURE)
    method.prepare(stage.rollouts, stage.max_tokens)
    sampler = MadeRollouts(trainer.ranks, len(KINDS))
    update = Update(stage, method, trainer, STEPS_OF_A_BATCH, teacher)
    for number, kind in enumerate(KINDS):
        sampler.begin(number, kind)
        metrics = BatchMetrics(trainer.ranks, method.terms)
        update.take(leave_out(method, method.compose(sampler, PROMPTS, ROLLOUTS)), metrics)
        update.take_side_steps(sampler, metrics)


def reference_of(cell: Cell, policy: Policy, ranks: Ranks, layout: str) -> Scorer:
    """What a KL term compares with, laid out as the policy is."""
    if cell.lora:
        return Unadapted(policy)
    copy = make_policy(cell)
    cut(copy, ranks, layout, DTYPES[cell.dtype])
    return copy


def whole(tensors: Iterable[Tensor]) -> Tensor:
    """Whole tensors as one vector. All ranks call it."""
    return torch.cat([(t.full_tensor() if isinstance(t, DTensor) else t.clone()).flatten() for t in tensors])


def differences(found: Trained, alone: Trained) -> dict[str, float]:
    """The largest relative differences over the steps of gradients and norms, and that of the weights' change."""
    if len(found.gradients) != len(alone.gradients):
        return dict.fromkeys(COMPARED, float("inf"))
    steps = range(len(alone.gradients))
    return {
        "gradient": max(relative(found.gradients[i], alone.gradients[i]) for i in steps),
        "norm": max(abs(found.norms[i] - alone.norms[i]) / max(alone.norms[i], 1e-30) for i in steps),
        "update": relative(found.end - found.start, alone.end - alone.start),
    }


# Controls: what a trainer does wrong in these places.


def averages(policy: Policy, ranks: Ranks) -> None:
    """Gradients are averaged over ranks: FSDP's own divisor; of data parallel ranks, its counterpart."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(float(ranks.world))
    if not policy.sharded:
        summed = ranks.sum_gradients

        def averaged(parameters: Iterable[nn.Parameter]) -> None:
            kept = list(parameters)
            summed(kept)
            for parameter in kept:
                assert parameter.grad is not None
                parameter.grad /= ranks.world

        ranks.sum_gradients = averaged


def clips_each_shard(policy: Policy, ranks: Ranks) -> None:
    """Every rank clips by the norm of what it holds."""
    ranks.sum_shards = lambda values: values  # pyright: ignore[reportAttributeAccessIssue]


CONTROLS: dict[str, tuple[Callable[[Policy, Ranks], None], tuple[str, ...]]] = {
    "gradients averaged over ranks": (averages, ("ddp", "fsdp2", "hsdp")),
    "norm clipped per shard": (clips_each_shard, ("fsdp2", "hsdp")),
}
CONTROLLED = Cell("sft", True, False, "float64")
