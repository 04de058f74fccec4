"""What weights are called: tokens and micro-batches that did not arrive, weights without a name, and the headline."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thence.audit import Report
from thence.audit.judge.case import Judge
from thence.audit.judge.evidence import Evidence
from thence.audit.report import make_report
from thence.audit.result import Case, CaseResult, Finding
from thence.audit.solve.probe import Probe
from thence.audit.text import report_text

Ids = Sequence[int]
Weight = Callable[[int, int, Ids, Ids], float]
"""(example, place of the target, ids, labels) -> weight."""


def judged(
    probe: Probe, judge: Judge, weight: Weight, case: Case | None = None, *, kept: bool = True, adam: bool = False
) -> CaseResult:
    """A case whose step gives every target this weight, over the number of those that have one (or of all)."""
    case = case or Case("case", 2, 4)
    if adam:
        case = Case(case.name, case.micro_batch, case.accumulation, optimizer="unknown", lr=1e-3)
    model = _fresh(probe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    total, count = torch.zeros(()), 0
    for example, (ids, labels) in enumerate(probe.rows[: case.examples]):
        logp = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, :-1], -1)
        nll = -logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        weights = torch.tensor([float(weight(example, t, ids, labels)) for t in range(1, len(ids))])
        total = total + (nll * weights).sum()
        count += int((weights != 0).sum()) if kept else sum(label != -100 for label in labels)
    (total / count).backward()
    (torch.optim.AdamW if adam else torch.optim.SGD)(model.parameters(), lr=case.lr).step()
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    return judge.case(case, Evidence([before, after], pieces=judge.plan(case)))


_MODELS: dict[str, Any] = {}


def _fresh(probe: Probe) -> Any:
    from transformers import AutoModelForCausalLM

    key = str(probe.model)
    if key not in _MODELS:
        _MODELS[key] = AutoModelForCausalLM.from_pretrained(probe.model, attn_implementation="eager")
    return copy.deepcopy(_MODELS[key])


def trained(labels: Ids, place: int) -> bool:
    return 0 <= place < len(labels) and labels[place] != -100


def place_in_response(labels: Ids, place: int) -> int:
    return place - next(t for t, label in enumerate(labels) if label != -100)


def by_chance(seed: int, share: float) -> Weight:
    draw = random.Random(seed)
    drawn: dict[tuple[int, int], bool] = {}
    return lambda e, t, ids, labels: trained(labels, t) and drawn.setdefault((e, t), draw.random() > share)


def found(result: CaseResult) -> dict[str, str]:
    return {f.id: f.detail for f in result.all_findings if f.kind == "fault"}


def beyond(length: int) -> Weight:
    return lambda e, t, ids, labels: trained(labels, t) and place_in_response(labels, t) < length


DROPPED: dict[str, tuple[Weight, str]] = {
    "truncated responses": (beyond(16), "beyond position 16 of a response"),
    "truncated rows": (lambda e, t, ids, labels: trained(labels, t) and t < 14, "beyond position 14 of the row"),
    "late start": (
        lambda e, t, ids, labels: trained(labels, t) and place_in_response(labels, t) >= 3,
        "the first 3 tokens of every response",
    ),
    "early end": (
        lambda e, t, ids, labels: trained(labels, t) and len(labels) - t > 2,
        "the last 2 tokens of every response",
    ),
    "ids": (lambda e, t, ids, labels: trained(labels, t) and ids[t] % 5 != 0, "all tokens of certain ids"),
    "chance": (by_chance(0, 0.2), "as if drawn at random"),
    "mask too early": (lambda e, t, ids, labels: trained(labels, t + 1), "shifted by one place to the front"),
    "mask two too early": (lambda e, t, ids, labels: trained(labels, t + 2), "shifted by 2 places to the front"),
    "mask two too late": (
        lambda e, t, ids, labels: trained(labels, t - 2) and trained(labels, t),
        "as with a mask shifted by 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("name", DROPPED)
def test_tokens_that_are_not_trained_are_named_by_what_they_have_in_common(
    probe: Probe, judge: Judge, name: str, adam: bool
) -> None:
    """Once called weights that follow the model's own probabilities."""
    weight, pattern = DROPPED[name]
    result = judged(probe, judge, weight, adam=adam)
    assert list(found(result)) == ["tokens-dropped"], found(result)
    assert pattern in found(result)["tokens-dropped"]
    assert result.steps[0].objective == "token-mean"


def test_tokens_dropped_beside_every_end_token_are_told_apart(probe: Probe, judge: Judge) -> None:
    """Truncated, and the end token masked: two mistakes, each with its name, and no talk of chance."""
    cut = judged(probe, judge, lambda e, t, ids, labels: beyond(16)(e, t, ids, labels) and t < len(ids) - 1)
    assert set(found(cut)) == {"end-missing", "tokens-dropped"}
    assert "beyond position 16 of a response" in found(cut)["tokens-dropped"]
    end = probe.rows[0][0][-1]
    by_id = judged(probe, judge, lambda e, t, ids, labels: trained(labels, t) and ids[t] != end and ids[t] % 4 != 0)
    assert set(found(by_id)) == {"end-missing", "tokens-dropped"}, "that no answer ends is said as well"


def test_tokens_dropped_after_the_division_are_named_too(probe: Probe, judge: Judge) -> None:
    """The divisor counts all tokens: the update is smaller, which the lost tokens explain."""
    result = judged(probe, judge, beyond(16), kept=False)
    assert list(found(result)) == ["tokens-dropped"] and result.steps[0].objective == "token-mean"


@settings(deadline=None, max_examples=6)
@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.3, 0.5]))
def test_random_drops_are_never_said_to_follow_a_rule(probe: Probe, judge: Judge, seed: int, share: float) -> None:
    detail = found(judged(probe, judge, by_chance(seed, share)))["tokens-dropped"]
    assert "drawn at random" in detail and "probab" not in detail


def test_two_lost_tokens_that_stand_nowhere_else_are_no_rule_of_ids(probe: Probe, judge: Judge) -> None:
    """All tokens with these ids are lost, which says nothing: there is one of each."""
    responses = [[i for i, label in zip(*row, strict=True) if label != -100] for row in probe.rows[:8]]
    once = [i for response in responses for i in response[1:-1] if sum(r.count(i) for r in responses) == 1]
    chosen = {once[len(once) // 3], once[len(once) // 2]}
    result = judged(probe, judge, lambda e, t, ids, labels: trained(labels, t) and ids[t] not in chosen)
    assert "drawn at random" in found(result)["tokens-dropped"]


@pytest.mark.parametrize("adam", [False, True])
def test_probabilities_are_claimed_only_where_the_weights_follow_them(probe: Probe, judge: Judge, adam: bool) -> None:
    draw = random.Random(1)
    drawn: dict[tuple[int, int], float] = {}

    def any_weight(e: int, t: int, ids: Ids, labels: Ids) -> float:
        return trained(labels, t) * drawn.setdefault((e, t), draw.uniform(0.5, 1.5))

    result = judged(probe, judge, any_weight, adam=adam)
    assert "token-dependent" in found(result)
    assert "do not follow the model's own probabilities" in found(result)["token-dependent"]
    report = make_report("x", [result], {}, "x", {}, 0.0)
    assert "follow the model's own" not in " ".join(report.verdict.sentences).replace("do not follow", "")


def rows_weigh(*weights: float) -> Weight:
    return lambda e, t, ids, labels: trained(labels, t) * weights[e % len(weights)]


def test_a_wrong_scale_does_not_hide_weights_without_a_name(probe: Probe, judge: Judge) -> None:
    result = judged(probe, judge, rows_weigh(1.0, 0.7, 0.2, 0.9, 0.4), kept=False)
    assert set(found(result)) == {"scale", "unnamed"}
    report = make_report("x", [result], {}, "x", {}, 0.0)
    assert "no named objective" in report.verdict.sentences[0], "the shape is named before the size"
    assert "scale of the update" in report.verdict.sentences[1]


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.2])
def test_weights_that_are_small_are_not_said_to_be_zero(probe: Probe, judge: Judge, share: float, adam: bool) -> None:
    """The signs of an AdamW step tell a tenth of a weight from none."""
    end = judged(probe, judge, lambda e, t, ids, labels: trained(labels, t) * (share if t == len(ids) - 1 else 1),
                 adam=adam)  # fmt: skip
    rows = judged(probe, judge, lambda e, t, ids, labels: trained(labels, t) * (share if e in (1, 3) else 1), adam=adam)
    for result in (end, rows):
        assert "zero" not in str(found(result)), found(result)
        assert not {"end-missing", "rows-dropped", "tokens-dropped"} & set(found(result))
    assert "unnamed" in found(rows) and "token-dependent" in found(end)


def test_zero_is_said_with_its_resolution_where_that_is_coarse(probe: Probe, judge: Judge) -> None:
    def no_end(e: int, t: int, ids: Ids, labels: Ids) -> bool:
        return trained(labels, t) and t < len(ids) - 1

    assert "has weight zero" in found(judged(probe, judge, no_end))["end-missing"]
    assert "has no weight (less than" in found(judged(probe, judge, no_end, adam=True))["end-missing"]


def lost(*examples: int) -> Weight:
    return lambda e, t, ids, labels: trained(labels, t) and e not in examples


def test_gradients_cleared_too_late_lose_the_first_micro_batch(probe: Probe, judge: Judge) -> None:
    result = judged(probe, judge, lost(0, 1), kept=False)
    assert list(found(result)) == ["all-but-first"]
    assert "every micro-batch but the first of 4 arrived" in found(result)["all-but-first"]
    assert list(found(judged(probe, judge, lost(6, 7), kept=False))) == ["all-but-last"]
    assert list(found(judged(probe, judge, lost(2, 3), kept=False))) == ["rows-dropped"], "the second has no name"


def test_no_step_of_one_micro_batch_is_the_lost_micro_batch(probe: Probe, judge: Judge) -> None:
    """Gradients cleared after the first backward leave nothing where that is the only one."""
    one = CaseResult(Case("one", 8, 1), "judged", "", (), (Finding("no-step", "fault", "no parameter changed"),))
    four = judged(probe, judge, lost(0, 1), Case("four", 2, 4), kept=False)
    assert "the first micro-batch" in make_report("x", [one, four], {}, "x", {}, 0.0).verdict.sentences[0]
    none = CaseResult(Case("none", 2, 4), "judged", "", (), one.findings)
    assert "no step was taken" in make_report("x", [none, four], {}, "x", {}, 0.0).verdict.sentences[0]


def test_with_two_micro_batches_the_other_cases_say_which_name_holds(probe: Probe, judge: Judge) -> None:
    """All but the first of two is only the last: one case with more micro-batches decides."""
    two = judged(probe, judge, lost(0, 1, 2, 3), Case("two", 4, 2), kept=False)
    assert list(found(two)) == ["last-only"]
    report = make_report("x", [two, judged(probe, judge, lost(0, 1), Case("four", 2, 4), kept=False)], {}, "x", {}, 0.0)
    assert [list(found(case)) for case in report.cases] == [["all-but-first"]] * 2
    assert "every micro-batch but the first of 2" in found(report.cases[0])["all-but-first"]
    last = judged(probe, judge, lost(0, 1, 2, 3, 4, 5), Case("four", 2, 4), kept=False)
    report = make_report("x", [two, last], {}, "x", {}, 0.0)
    assert [list(found(case)) for case in report.cases] == [["last-only"]] * 2


def doubled_last(probe: Probe, judge: Judge, micro: int, accumulation: int) -> CaseResult:
    last = range(micro * (accumulation - 1), micro * accumulation)
    case = Case(f"micro {micro} x {accumulation}", micro, accumulation)
    return judged(probe, judge, lambda e, t, ids, labels: trained(labels, t) * (2 if e in last else 1), case)


def test_a_doubled_last_micro_batch_is_no_mean_of_micro_batch_means_in_any_cut(probe: Probe, judge: Judge) -> None:
    """With 60 and 30 tokens in two micro-batches the two had the same weights."""
    results = [doubled_last(probe, judge, *cut) for cut in ((4, 2), (2, 4), (1, 8))]
    assert [set(found(result)) for result in results] == [{"double-counted"}] * 3
    report = make_report("x", results, {}, "x", {}, 0.0)
    assert "some examples count more than once" in report.verdict.sentences[0]


def by_micro_batch(micro: int) -> Callable[[Probe], Weight]:
    def weights(probe: Probe) -> Weight:
        size = [sum(label != -100 for label in labels) for _, labels in probe.rows[:8]]
        tokens = [sum(size[i : i + micro]) for i in range(0, 8, micro)]
        return lambda e, t, ids, labels: trained(labels, t) / tokens[e // micro]

    return weights


def test_a_rule_that_does_not_fit_every_case_is_not_what_the_trainer_does(probe: Probe, judge: Judge) -> None:
    means = judged(probe, judge, by_micro_batch(2)(probe), Case("means", 2, 4))
    doubled = [doubled_last(probe, judge, *cut) for cut in ((4, 2), (1, 8))]
    clean = judged(probe, judge, rows_weigh(1.0), Case("clean", 2, 4))
    alone = make_report("x", [means], {}, "x", {}, 0.0).verdict.sentences[0]
    assert alone.startswith("This trainer takes the mean of micro-batch means")
    beside = make_report("x", [means, clean], {}, "x", {}, 0.0).verdict.sentences[0]
    assert "in 1 of 2 cases the weights are those of the mean of micro-batch means" in beside
    mixed = make_report("x", [means, *doubled], {}, "x", {}, 0.0).verdict
    assert mixed.objective is None
    assert "micro-batch means" not in mixed.sentences[0], "a rule of one case is no headline over three"
    assert "mean of micro-batch means (1)" in mixed.sentences[1]


def figures(report: Report) -> tuple[str, str]:
    """The sentences, and the line of the facts under them."""
    text = " ".join(report_text(report, colour=False, width=500).split())
    return " ".join(report.verdict.sentences), text[text.index("Token weight over ideal") :]


def test_all_figures_of_the_verdict_come_from_one_case(probe: Probe, judge: Judge) -> None:
    """The smallest weight of one case beside the largest of another is nobody's range."""
    much = judged(probe, judge, rows_weigh(1, 1, 1, 1, 1, 1, 2.5, 1), Case("largest", 2, 4), kept=False)
    little = judged(probe, judge, rows_weigh(0.1, 1, 1, 1, 1, 0.1, 1, 1), Case("most lost", 2, 4), kept=False)
    report = make_report("x", [much, little], {}, "x", {}, 0.0)
    sentences, facts = figures(report)
    step = little.steps[0]
    assert report.verdict.case == "most lost"
    assert f"{step.smallest:.3g} to {step.largest:.3g}" in sentences
    assert f"{step.smallest:.2f} to {step.largest:.2f} in most lost" in facts
    assert "in largest" not in facts and "'largest'" not in sentences


def test_the_detail_and_the_figures_are_of_one_step(probe: Probe, judge: Judge) -> None:
    """A case of two steps, the second worse: what is said of the first is not mixed into it."""
    mild = judged(probe, judge, rows_weigh(1, 0.8), kept=False)
    bad = judged(probe, judge, rows_weigh(1, 0.2), kept=False)
    both = CaseResult(mild.case, "judged", "", (mild.steps[0], bad.steps[0]), (Finding("grouping", "note", "x"),))
    sentences, _ = figures(make_report("x", [both], {}, "x", {}, 0.0))
    step = bad.steps[0]
    assert f"from {step.smallest:.3g} to {step.largest:.3g}" in sentences
    assert f"smallest token weight is {step.smallest:.2f} and the largest {step.largest:.2f}" in sentences
