"""SDFT and SDPO: the golden vector, gradients over several optimizer steps, partitions, and who is shown what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.methods.test_gspo import GROUP, LENGTHS, MINIS, make_trajectories
from tests.oracle import gradient, relative, row_statistics, weights_of
from tests.tiny_model import make_tiny_model
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import RecipeError, UserError
from thence.methods.base import Method, TokenFacts
from thence.methods.registry import make_method
from thence.methods.self_distillation import Sdft, Sdpo
from thence.methods.unknown import leave_out
from thence.pipeline.rl_metrics import BatchMetrics
from thence.pipeline.rl_update import Update
from thence.pipeline.teacher import TeacherPass
from thence.train.average import MovingAverage
from thence.train.parallel import SingleProcess
from thence.train.policy import Policy
from thence.train.step import StepSettings, train_step
from thence.train.trainer import Trainer

RATE, RATIO = 0.3, 1.01
DEMONSTRATION = (5, 6, 7)


class Before:
    """Stands for the rendered prompts: the solution, then the prompt."""

    def token_ids(self, prompt: Prompt, solution: Sequence[int]) -> tuple[int, ...]:
        return (*solution, *prompt.token_ids)


def shown_rows(model: Any) -> list[Trajectory]:
    """Three groups of four; every prompt of the first two has a demonstration. Right: the first of each group."""
    rows = make_trajectories(model)
    return [
        Trajectory(Prompt(t.prompt.index, t.prompt.token_ids, DEMONSTRATION if i < 8 else None, draw=t.prompt.draw),
                   t.response_ids, score=t.score)
        for i, t in enumerate(rows)
    ]  # fmt: skip


def copy_of(model: Any) -> Any:
    twin = make_tiny_model()
    twin.load_state_dict(model.state_dict())
    return twin.requires_grad_(False)


def steps_of(
    model: Any, method: Method, rows: list[Trajectory], budget: int = 64, packing: bool = False, minis: int = MINIS
) -> tuple[list[tuple[dict[str, Tensor], Tensor]], BatchMetrics]:
    """The weights before, and the gradient of, each optimizer step on a rollout batch."""
    taken: list[tuple[dict[str, Tensor], Tensor]] = []

    def step_and_tell(policy: Any, optimizer: Any, batch: Any, *rest: Any) -> Any:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        report = train_step(policy, optimizer, batch, *rest)
        taken.append((before, torch.cat([p.grad.flatten() for p in model.parameters()])))
        return report

    kind = method.teacher.weights if method.teacher is not None else "none"
    scorer = Policy(copy_of(model)) if kind in ("start", "average") else None
    average = MovingAverage(scorer, RATE) if kind == "average" and scorer is not None else None
    chosen = StepSettings(budget, packing, 0.0, torch.float64)
    trainer = Trainer(model, 1e-2, chosen, take_step=step_and_tell, average=average)
    stage: Any = SimpleNamespace(temperature=1.0, importance_bound=None, fault=None)
    prompts: Any = Before()
    teacher = TeacherPass("rl", method, prompts, trainer, 1.0, scorer)
    metrics = BatchMetrics(SingleProcess(), method.terms)
    Update(stage, method, trainer, minis, teacher).take(rows, metrics)
    return taken, metrics


def solution_of(method: Method, rows: Sequence[Trajectory], i: int) -> tuple[int, ...] | None:
    """Restated: the demonstration; or the first right response of the group that is another one."""
    if isinstance(method, Sdft):
        return rows[i].prompt.demonstration_ids
    group = range(i - i % GROUP, i - i % GROUP + GROUP)
    return next((rows[j].response_ids for j in group if j != i and (rows[j].score or 0) >= 0.5), None)


def stated_loss(
    method: Any, model: Any, teacher: Any, rows: list[Trajectory], part: range, old: list[Tensor]
) -> tuple[Tensor, int]:
    """The loss as printed, by autograd, and how many tokens have a ratio that is held."""
    loss, held = torch.zeros((), dtype=torch.float64), 0
    for i in part:
        solution = solution_of(method, rows, i)
        if solution is None:
            continue
        logp = row_statistics(model, rows[i])[0]
        asked = Trajectory(Prompt(0, (*solution, *rows[i].prompt.token_ids)), rows[i].response_ids)
        gap = (logp - row_statistics(teacher, asked)[0]).detach()
        ratio = (logp - old[i]).exp().detach()
        skip = method.options.skip_tokens
        held += int((ratio > method.options.ratio_bound)[skip:].sum())  # a token without weight is not held back
        parts = (gap * ratio.clamp(max=method.options.ratio_bound) * logp)[skip:]
        loss = loss + parts.sum() / max(len(parts), 1) / len(part)
    return loss, held


METHODS = [
    *(Sdft({"teacher": kind, "ratio_bound": RATIO}) for kind in ("start", "average", "current")),
    Sdft({"skip_tokens": 3, "ratio_bound": RATIO}),
    *(Sdpo({"teacher": kind, "success": 0.5, "ratio_bound": RATIO}) for kind in ("start", "average", "current")),
]


def label(method: Method) -> str:
    return "-".join([method.name, *(f"{k}={v}" for k, v in method.options.model_dump(exclude_unset=True).items())])


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_gradients_of_all_optimizer_steps_are_those_of_the_formula(method: Any) -> None:
    model = make_tiny_model()
    rows = shown_rows(model)
    old = [row_statistics(model, t)[0].detach() for t in rows]
    start, mean = copy_of(model), copy_of(model)
    taken, metrics = steps_of(model, method, rows)
    assert len(taken) == MINIS
    held_back = []
    for number, (before, got) in enumerate(taken):
        model.load_state_dict(before)
        if number:  # the average has followed every step so far
            state = {name: (1 - RATE) * value + RATE * before[name] for name, value in mean.state_dict().items()}
            mean.load_state_dict(state)
        teacher = {"start": start, "average": mean, "current": copy_of(model)}[method.options.teacher]
        part = range(number * GROUP, (number + 1) * GROUP)
        loss, held = stated_loss(method, model, teacher, rows, part, old)
        expected = gradient(model, loss) if loss.requires_grad else torch.zeros_like(got)
        assert relative(got, expected) <= 1e-12, number
        tokens = sum(len(rows[i].response_ids) for i in part)
        assert metrics.reports[number].clip_share == pytest.approx(held / tokens)
        held_back.append(held)
    assert held_back[0] == 0
    assert any(held_back)  # the bound is tried


@settings(max_examples=8, deadline=None)
@given(
    budget=st.sampled_from([1, 24, 40]),
    packing=st.booleans(),
    order=st.permutations(range(MINIS)),
    method=st.sampled_from([METHODS[0], METHODS[5]]),
)
def test_the_step_does_not_depend_on_the_partition(budget: int, packing: bool, order: list[int], method: Any) -> None:
    """Micro-batches, packing, and the order of the groups within an optimizer step."""
    ends = []
    for cut, groups in (((10_000, False), list(range(MINIS))), ((budget, packing), order)):
        model = make_tiny_model()
        rows = shown_rows(model)
        chosen = [rows[g * GROUP + i] for g in groups for i in range(GROUP)]
        ends.append(steps_of(model, method, chosen, *cut, minis=1)[0][0][1])
    assert relative(ends[1], ends[0]) <= 1e-12


# The vector of the specification: p = (.5, .3, .2), the teacher's (.2, .3, .5), the first token was sampled.


def facts_of(p: float, teacher: float | None, old: float | None = None, n: int = 1) -> TokenFacts:
    now, before = (torch.full((n,), math.log(x), dtype=torch.float64) for x in (p, p if old is None else old))
    said = None if teacher is None else torch.full((n,), math.log(teacher), dtype=torch.float64)
    return TokenFacts(now, torch.zeros(n), before, teacher=said)


def test_golden_vector_of_the_sampled_token() -> None:
    row = [Trajectory(Prompt(0, (1,)), (0,), score=1.0)]
    (weight,) = weights_of(Sdft(), row, [facts_of(0.5, 0.2)])
    assert weight.tolist() == [[pytest.approx(-0.916291, abs=1e-6)]]
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().requires_grad_()
    (-weight[0, 0] * logits.log_softmax(0)[0]).backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([0.458145, -0.274887, -0.183258], abs=1e-6)


def test_its_mean_over_the_vocabulary_is_the_gradient_of_the_reverse_kl() -> None:
    teacher = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().requires_grad_()
    p = logits.softmax(0)
    now = p.tolist()
    (p * (p / teacher).log()).sum().backward()
    found = torch.zeros(3, dtype=torch.float64)
    for token in range(3):
        row = [Trajectory(Prompt(0, (1,)), (token,))]
        facts = facts_of(now[token], teacher[token].item())
        (weight,) = weights_of(Sdft(), row, [facts])
        slope = torch.nn.functional.one_hot(torch.tensor(token), 3) - p.detach()
        found += p[token].detach() * -weight[0, 0] * slope
    assert logits.grad is not None
    assert found.tolist() == pytest.approx(logits.grad.tolist(), abs=1e-12)


def test_the_ratio_multiplies_and_is_held_and_lengths_divide() -> None:
    row = Trajectory(Prompt(0, (1,)), (0, 0))
    gap = math.log(0.5 / 0.2)
    for old, ratio in ((0.4, 1.25), (0.1, 2.0), (0.6, 5 / 6)):
        (weight,) = weights_of(Sdft(), [row], [facts_of(0.5, 0.2, old, 2)])
        assert weight.tolist() == [pytest.approx([-gap * ratio / 2] * 2)]
    (weight,) = weights_of(Sdft({"ratio_bound": math.inf}), [row], [facts_of(0.5, 0.2, 0.1, 2)])
    assert weight.tolist() == [pytest.approx([-gap * 5 / 2] * 2)]
    (weight,) = weights_of(Sdft({"skip_tokens": 1}), [row], [facts_of(0.5, 0.2, n=2)])
    assert weight.tolist() == [pytest.approx([0.0, -gap])]
    (weight,) = weights_of(Sdft({"skip_tokens": 2}), [row], [facts_of(0.5, 0.2, n=2)])
    assert weight.tolist() == [[0.0, 0.0]]


# Who reads what.


def group(*scores: float | None) -> list[Trajectory]:
    return [Trajectory(Prompt(0, (2, 3)), (4, i), score=score) for i, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("scores", "options", "shown"),
    [
        ((0.0, 1.0, 1.0), {}, [1, 2, 1]),
        ((0.0, 1.0, 0.0), {}, [1, None, 1]),
        ((0.0, 1.0, 0.0), {"show_own": True}, [1, 1, 1]),
        ((0.0, 0.5, 0.0), {}, [None, None, None]),
        ((0.0, 0.5, 0.0), {"success": 0.5}, [1, None, 1]),
        ((None, 1.0, None), {}, [1, None, 1]),
    ],
)
def test_sdpo_shows_the_first_other_right_response(scores: Any, options: Any, shown: list[int | None]) -> None:
    rows = group(*scores)
    found = Sdpo(options).solutions(rows)
    assert found == [None if i is None else rows[i].response_ids for i in shown]


def test_an_unknown_reward_is_never_a_success_and_its_response_is_still_taught() -> None:
    rows = group(None, 1.0, None)
    for method in (Sdpo(), Sdft()):
        assert leave_out(method, rows) == rows


def test_a_right_response_without_tokens_is_not_shown() -> None:
    rows = [Trajectory(Prompt(0, (2,)), (), score=1.0), Trajectory(Prompt(0, (2,)), (4,), score=0.0)]
    assert Sdpo().solutions(rows) == [None, None]


@pytest.mark.parametrize("method", [Sdft(), Sdpo()], ids=lambda m: m.name)
def test_a_response_without_a_teacher_has_no_weight_and_counts_as_a_sequence(method: Method) -> None:
    rows = group(0.0, 0.0)
    found = weights_of(method, rows, [facts_of(0.5, None, n=2), facts_of(0.5, 0.2, n=2)])
    assert not found[0].any() and found[1].all()
    assert [term.normaliser.of for term in method.terms] == ["sequences"]


def test_the_share_of_responses_with_a_teacher_is_measured() -> None:
    model = make_tiny_model()
    _, metrics = steps_of(model, Sdft(), shown_rows(model))
    taught = [logp is not None for logp in metrics.scores or []]
    assert taught == [True] * 8 + [False] * 4
    assert [len(s) for s in metrics.scores or [] if s is not None] == [response for _, response in LENGTHS[:8]]


def test_an_update_without_the_teacher_that_the_method_asks_for_is_refused() -> None:
    model = make_tiny_model()
    stage: Any = SimpleNamespace(temperature=1.0, importance_bound=None, fault=None)
    update = Update(stage, Sdpo(), Trainer(model, 1e-2))
    with pytest.raises(UserError, match="sdpo has a teacher, and these steps were given none"):
        update.take(shown_rows(model), BatchMetrics(SingleProcess(), Sdpo().terms))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"form": "{prompt}"}, "form"),
        ({"form": "{prompt}{prompt}{solution}"}, "form"),
        ({"teacher": "other"}, "teacher"),
        ({"average_rate": 0.0}, "average_rate"),
        ({"ratio_bound": 0.5}, "ratio_bound"),
        ({"success": 1.0}, "success"),
    ],
)
def test_options_that_cannot_be_are_refused_by_their_field(options: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError) as refused:
        make_method("sdft", options, "rl")
    assert refused.value.field == f"rl.options.{field}" and refused.value.remedy


def test_sdpo_needs_a_second_rollout_unless_a_response_may_teach_itself() -> None:
    with pytest.raises(RecipeError, match="sdpo learns nothing from 1 rollout"):
        Sdpo().prepare(1, 8)
    Sdpo({"show_own": True}).prepare(1, 8)
    Sdft().prepare(1, 8)
