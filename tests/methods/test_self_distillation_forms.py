"""SDFT and SDPO with whole next-token distributions: gradients over several optimizer steps, partitions, options."""

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

from tests.methods.test_gspo import GROUP, MINIS
from tests.methods.test_self_distillation import (
    DEMONSTRATION,
    RATE,
    RATIO,
    copy_of,
    facts_of,
    label,
    shown_rows,
    solution_of,
    steps_of,
)
from tests.objective.test_divergence import divergence
from tests.oracle import gradient, relative, row_statistics, weights_of
from tests.tiny_model import make_tiny_model
from thence.accounting.meter import FlopMeter
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import RecipeError, UserError
from thence.methods.base import Method, make_rows
from thence.methods.registry import make_method
from thence.methods.self_distillation import Sdft, Sdpo
from thence.objective import Batch, Divergence, Normaliser, Term
from thence.pipeline.rl_metrics import BatchMetrics
from thence.pipeline.rl_update import Update
from thence.pipeline.teacher import TeacherPass
from thence.train.micro_batches import step_passes
from thence.train.parallel import SingleProcess
from thence.train.policy import Policy
from thence.train.step import StepSettings
from thence.train.trainer import Trainer

FORMS: list[dict[str, Any]] = [
    {"divergence": "reverse-kl"},
    {"divergence": "forward-kl"},
    {"divergence": "jsd", "alpha": 0.3},
    {"divergence": "reverse-kl", "top_k": 5},
    {"divergence": "jsd", "top_k": 4, "tail": True},
]
METHODS: list[Method] = [
    *(Sdft({**form, "ratio_bound": RATIO}) for form in FORMS),
    Sdft({**FORMS[0], "teacher": "average", "ratio_bound": RATIO}),
    Sdft({**FORMS[2], "teacher": "current", "skip_tokens": 3}),
    *(Sdpo({**FORMS[1], "teacher": kind, "success": 0.5}) for kind in ("start", "average", "current")),
    Sdpo({**FORMS[4], "success": 0.5, "ratio_bound": RATIO}),
]


def surrogate_of(method: Method) -> Divergence:
    (term,) = method.terms
    assert isinstance(term.surrogate, Divergence)
    return term.surrogate


def distributions(model: Any, trajectory: Trajectory) -> Tensor:
    """Log-probabilities of all words at every response token, shape (n, V)."""
    before = len(trajectory.prompt.token_ids)
    ids = torch.tensor([[*trajectory.prompt.token_ids, *trajectory.response_ids]])
    return model(input_ids=ids, use_cache=False).logits[0, before - 1 : -1].log_softmax(-1)


def stated_loss(
    method: Any, model: Any, teacher: Any, rows: Sequence[Trajectory], part: range, old: list[Tensor]
) -> Tensor:
    """The loss as printed, by autograd."""
    loss, o = torch.zeros((), dtype=torch.float64), method.options
    for i in part:
        solution = solution_of(method, rows, i)
        if solution is None:
            continue
        own = distributions(model, rows[i])
        asked = Trajectory(Prompt(0, (*solution, *rows[i].prompt.token_ids)), rows[i].response_ids)
        with torch.no_grad():
            theirs = distributions(teacher, asked)
        ratio = (row_statistics(model, rows[i])[0] - old[i]).exp().detach().clamp(max=o.ratio_bound)
        parts = (ratio * divergence(surrogate_of(method), own, theirs))[o.skip_tokens :]
        loss = loss + parts.sum() / max(len(parts), 1) / len(part)
    return loss


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_gradients_of_all_optimizer_steps_are_those_of_the_formula(method: Any) -> None:
    model = make_tiny_model()
    rows = shown_rows(model)
    old = [row_statistics(model, t)[0].detach() for t in rows]
    start, mean = copy_of(model), copy_of(model)
    taken, metrics = steps_of(model, method, rows, packing=True)
    assert len(taken) == MINIS
    for number, (before, got) in enumerate(taken):
        model.load_state_dict(before)
        if number:  # the average has followed every step so far
            state = {name: (1 - RATE) * value + RATE * before[name] for name, value in mean.state_dict().items()}
            mean.load_state_dict(state)
        teacher = {"start": start, "average": mean, "current": copy_of(model)}[method.options.teacher]
        loss = stated_loss(method, model, teacher, rows, range(number * GROUP, (number + 1) * GROUP), old)
        expected = gradient(model, loss) if loss.requires_grad else torch.zeros_like(got)
        assert relative(got, expected) <= 1e-12, number
        assert metrics.reports[number].loss == pytest.approx(loss.item(), rel=1e-12, abs=1e-15)
    assert method.options.ratio_bound != RATIO or any(report.clip_share > 0 for report in metrics.reports)


@settings(max_examples=8, deadline=None)
@given(
    budget=st.sampled_from([1, 24, 40]),
    packing=st.booleans(),
    order=st.permutations(range(MINIS)),
    method=st.sampled_from([METHODS[0], METHODS[4], METHODS[6], METHODS[8]]),
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


def test_the_reverse_kl_is_the_mean_of_the_sampled_form_over_the_vocabulary() -> None:
    """At one place: the sum of p(word) times the sampled form's gradient, had that word been taken. Norms of the model
    round to float32, so sums of gradients do."""
    model = make_tiny_model()
    prompt = Prompt(0, (2, 3), DEMONSTRATION)
    whole, _ = steps_of(model, Sdft(FORMS[0]), [Trajectory(prompt, (4,))], minis=1)
    found = torch.zeros_like(whole[0][1])
    model = make_tiny_model()
    p = distributions(model, Trajectory(prompt, (4,)))[0].exp().detach()
    for word, share in enumerate(p):
        (step,), _ = steps_of(make_tiny_model(), Sdft(), [Trajectory(prompt, (word,))], minis=1)
        found += share * step[1]
    assert relative(found, whole[0][1]) <= 1e-6


def test_the_weight_is_the_held_ratio_over_the_length_whatever_the_teacher_says() -> None:
    row, method = Trajectory(Prompt(0, (1,)), (0, 0)), Sdft(FORMS[0])
    (weight,) = weights_of(method, [row], [facts_of(0.5, 0.2, 0.4, 2)])
    assert weight.tolist() == [pytest.approx([0.625] * 2)]
    (weight,) = weights_of(method, [row], [facts_of(0.5, 0.2, 0.1, 2)])
    assert weight.tolist() == [pytest.approx([1.0] * 2)]
    (weight,) = weights_of(method, [row], [facts_of(0.5, None, n=2)])
    assert not weight.any()
    (term,) = method.terms
    assert term == Term("distillation", Divergence("reverse"), Normaliser("sequences"))


def test_rows_go_together_by_the_longer_of_what_policy_and_teacher_read() -> None:
    model, method = make_tiny_model(), Sdft(FORMS[0])
    rows = [Trajectory(Prompt(0, (2, 3), (4,) * 20), (5, n)) for n in range(4)]
    stage: Any = SimpleNamespace(temperature=1.0, importance_bound=None, fault=None)
    prompts: Any = SimpleNamespace(token_ids=lambda prompt, solution: (*solution, *prompt.token_ids))
    passes: list[tuple[int, int]] = []

    def look(policy: Any, optimizer: Any, batch: Any, ranks: Any, chosen: Any, see: Any) -> Any:
        for one in step_passes(batch, 48, False, torch.device("cpu"), ranks):
            assert one.micro.shown is not None
            passes.append((one.micro.token_ids.numel(), one.micro.shown.token_ids.numel()))
        raise KeyboardInterrupt

    trainer = Trainer(model, 1e-2, StepSettings(48), take_step=look)
    update = Update(stage, method, trainer, 1, TeacherPass("rl", method, prompts, trainer, 1.0))
    with pytest.raises(KeyboardInterrupt):
        update.take(rows, BatchMetrics(SingleProcess(), method.terms))
    assert passes == [(8, 48), (8, 48)]


def test_the_teachers_pass_counts_in_what_is_executed() -> None:
    model = make_tiny_model()
    rows = shown_rows(model)[:4]
    spent = {}
    for name, options in {"sampled": {}, "whole": FORMS[0]}.items():
        method, meter = Sdft(options), FlopMeter(model.config.to_dict())
        trainer = Trainer(model, 1e-9, StepSettings(64), meter=meter)
        prompts: Any = SimpleNamespace(token_ids=lambda prompt, solution: (*solution, *prompt.token_ids))
        stage: Any = SimpleNamespace(temperature=1.0, importance_bound=None, fault=None)
        teacher = TeacherPass("rl", method, prompts, trainer, 1.0)
        Update(stage, method, trainer, 1, teacher).take(rows, BatchMetrics(SingleProcess(), method.terms))
        spent[name] = meter.total
    assert spent["whole"] == spent["sampled"] > 0


def batch_of(shown: Any) -> Batch:
    method = Sdft(FORMS[0])
    row = Trajectory(Prompt(0, (2, 3)), (4, 5))
    return Batch(method.terms, tuple(make_rows(method.terms, [row], [{"distillation": 0.5}], shown=shown)))


def test_a_row_that_a_teacher_should_read_and_does_not_is_refused() -> None:
    from thence.methods.base import bare_row

    trainer = Trainer(make_tiny_model(), 1e-2, StepSettings(64, compute_dtype=torch.float64))
    trainer.policy.learn_from(trainer.policy)
    with pytest.raises(ValueError, match="nothing that the teacher reads"):
        trainer.step(batch_of([None]))
    with pytest.raises(ValueError, match="other trained tokens"):
        trainer.step(batch_of([bare_row(Trajectory(Prompt(0, (2, 3)), (4, 6)))]))
    trainer.policy.learn_from(None)
    with pytest.raises(UserError, match="the policy has no teacher") as refused:
        trainer.step(batch_of([bare_row(Trajectory(Prompt(0, (9,)), (4, 5)))]))
    assert "learn_from" in str(refused.value.remedy)


def test_a_row_of_another_terms_weight_needs_no_teacher() -> None:
    """Blends: what only the other term weighs is trained, and the teacher says nothing of it."""
    from thence.methods.base import bare_row
    from thence.objective import Logp

    terms = (Term("own", Logp()), Term("distillation", Divergence("forward")))
    rows = [Trajectory(Prompt(i, (2, 3)), (4, 5)) for i in range(2)]
    weights = [{"own": 1.0, "distillation": 0.0}, {"own": 1.0, "distillation": 1.0}]
    shown = [None, bare_row(Trajectory(Prompt(0, (9,)), (4, 5)))]
    model = make_tiny_model()
    trainer = Trainer(model, 0.0, StepSettings(64, clip_norm=0.0, compute_dtype=torch.float64))
    trainer.policy.learn_from(Policy(copy_of(model)))
    trainer.step(Batch(terms, tuple(make_rows(terms, rows, weights, shown=shown))))
    own = [distributions(model, row) for row in rows]
    theirs = distributions(copy_of(model), Trajectory(Prompt(0, (9,)), (4, 5)))
    nll = -sum(logs.gather(1, torch.tensor([[4], [5]])).sum() for logs in own)
    expected = gradient(model, (nll + divergence(Divergence("forward"), own[1], theirs).sum()) / 4)
    got = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert relative(got, expected) <= 1e-12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"divergence": "kl"}, "divergence"),
        ({"top_k": 5}, 'top_k has no part in divergence = "sampled"'),
        ({"alpha": 0.5}, 'alpha has no part in divergence = "sampled"'),
        ({"divergence": "forward-kl", "alpha": 0.5}, 'alpha has no part in divergence = "forward-kl"'),
        ({"divergence": "jsd", "tail": True}, "tail has no part without top_k"),
        ({"divergence": "jsd", "alpha": 1.0}, "alpha"),
        ({"divergence": "jsd", "alpha": math.nan}, "alpha"),
        ({"divergence": "jsd", "top_k": -1}, "top_k"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    for name in ("sdft", "sdpo"):
        with pytest.raises(RecipeError) as refused:
            make_method(name, options, "rl")
        assert words in str(refused.value) and refused.value.remedy
