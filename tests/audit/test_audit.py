"""The audit's core: recovery, diagnosis and verdict, on steps whose weights are known."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from thence.audit.judge.case import Judge
from thence.audit.judge.evidence import Evidence
from thence.audit.judge.settle import settle
from thence.audit.judge.verdict import judge_all
from thence.audit.report import make_report
from thence.audit.result import Case, CaseResult
from thence.audit.solve.observation import ForwardRow
from thence.audit.solve.probe import LENGTHS, Probe, write_probe

Loss = Callable[[list[torch.Tensor], Case], torch.Tensor]


@pytest.fixture(scope="session")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return write_probe(tmp_path_factory.mktemp("probe"))


@pytest.fixture(scope="session")
def judge(probe: Probe) -> Judge:
    return Judge.of_probe(probe)


@cache
def _model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def losses(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[torch.Tensor]:
    """Negative log-probabilities of the trained tokens of every row."""
    result = []
    for ids, labels in rows:
        logp = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, :-1], -1)
        target = torch.tensor(labels[1:])
        kept = target != -100
        result.append(-logp[kept].gather(1, target[kept][:, None])[:, 0])
    return result


def step(
    probe: Probe, case: Case, loss: Loss, rows: Any = None, optimizer: str = "sgd"
) -> list[dict[str, torch.Tensor]]:
    """Parameters before and after one step on a loss."""
    model = copy.deepcopy(_model(probe.model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss(losses(model, probe.rows[: case.examples] if rows is None else rows), case).backward()
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "unknown": torch.optim.AdamW}[optimizer]
    extra = {"eps": case.eps, "betas": (0.0, 0.999), "weight_decay": 0.0} if optimizer == "adamw" else {}
    kind(model.parameters(), lr=case.lr, **extra).step()
    return [before, {name: p.detach().clone() for name, p in model.named_parameters()}]


def token_mean(nll: list[torch.Tensor], case: Case) -> torch.Tensor:
    return torch.cat(nll).mean()


def sequence_mean(nll: list[torch.Tensor], case: Case) -> torch.Tensor:
    return torch.stack([row.mean() for row in nll]).mean()


def micro_batch_mean(nll: list[torch.Tensor], case: Case) -> torch.Tensor:
    cuts = range(0, len(nll), case.micro_batch)
    return torch.stack([torch.cat(nll[i : i + case.micro_batch]).mean() for i in cuts]).mean()


def first_and_last(nll: list[torch.Tensor], case: Case) -> torch.Tensor:
    ends = [*nll[: case.micro_batch], *nll[-case.micro_batch :]]
    return torch.cat(ends).sum() / sum(map(len, nll))


def no_end(nll: list[torch.Tensor], case: Case) -> torch.Tensor:
    return torch.cat([row[:-1] for row in nll]).mean()


def probability_weighted(nll: list[torch.Tensor], case: Case) -> torch.Tensor:
    flat = torch.cat(nll)
    return (flat * torch.exp(-flat).detach()).mean()


def faults(result: CaseResult) -> set[str]:
    return {f.id for f in result.all_findings if f.kind == "fault"}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "unknown"])
@pytest.mark.parametrize(
    ("loss", "objective", "found"),
    [
        (token_mean, "token-mean", set()),
        (sequence_mean, "sequence-mean", {"sequence-mean"}),
        (micro_batch_mean, "micro-batch-mean", {"micro-batch-mean"}),
        (first_and_last, "token-mean", {"first-and-last-only"}),
        (no_end, "token-mean", {"end-missing"}),
        (probability_weighted, "token-mean", {"token-dependent"}),
    ],
)
def test_a_known_loss_is_named_with_every_kind_of_optimizer(
    probe: Probe, judge: Judge, loss: Loss, objective: str, found: set[str], optimizer: Any
) -> None:
    """`unknown` is AdamW as people run it, whose first update keeps nothing but signs."""
    lr = {"sgd": 1.0, "adamw": 1e4, "unknown": 1e-3}[optimizer]
    case = Case("case", 2, 4, optimizer=optimizer, lr=lr, eps=1e4)
    result = judge.case(case, Evidence(step(probe, case, loss, optimizer=optimizer), pieces=judge.plan(case)))
    assert result.status == "judged", result.reason
    assert result.steps[0].objective == objective
    assert faults(result) == found


def test_the_weights_of_single_tokens_are_those_of_the_loss(probe: Probe, judge: Judge) -> None:
    """Any weights: what comes back is what went in, to float32."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.rand(length, generator=generator) for length in LENGTHS[:8]]
    case = Case("case", 2, 4)

    def loss(nll: list[torch.Tensor], _: Case) -> torch.Tensor:
        return sum(((row * w).sum() for row, w in zip(nll, weights, strict=True)), torch.zeros(()))

    result = judge.case(case, Evidence(step(probe, case, loss), pieces=judge.plan(case)))
    for sequence, expected in zip(result.steps[0].sequences, weights, strict=True):
        got = [token.weight for token in sequence.tokens if token.role in ("first", "body", "end")]
        assert got == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
        assert [t.weight for t in sequence.tokens if t.role == "prompt"] == pytest.approx(
            [0.0] * sum(t.role == "prompt" for t in sequence.tokens), abs=1e-5
        )


def test_a_factor_of_the_accumulation_is_named_where_the_learning_rate_is_known(probe: Probe, judge: Judge) -> None:
    case = Case("case", 2, 4)
    result = judge.case(
        case, Evidence(step(probe, case, lambda nll, c: 4 * token_mean(nll, c)), pieces=judge.plan(case))
    )
    assert faults(result) == {"scale-accumulation"}
    assert result.steps[0].scale == pytest.approx(4, rel=1e-4)


def test_with_clipping_the_shape_is_judged_and_the_scale_is_not(probe: Probe, judge: Judge) -> None:
    case = Case("case", 2, 4, clip=0.5)
    result = judge.case(
        case, Evidence(step(probe, case, lambda nll, c: 0.013 * micro_batch_mean(nll, c)), pieces=judge.plan(case))
    )
    assert result.steps[0].scale is None
    assert faults(result) == {"micro-batch-mean"}


def test_advantages_are_divided_out(probe: Probe, judge: Judge) -> None:
    """A policy gradient: the weight of a row is its advantage over the number of tokens."""
    advantages = [0.5, -1.0, 0.25, 2.0, -0.5, 0.75, -1.5, 1.0]
    case = Case("case", 2, 4)

    def loss(nll: list[torch.Tensor], _: Case) -> torch.Tensor:
        total = sum((a * row.sum() for a, row in zip(advantages, nll, strict=True)), torch.zeros(()))
        return total / sum(map(len, nll))

    states = step(probe, case, loss)
    result = judge.case(case, Evidence(states, pieces=judge.plan(case), advantages=advantages))
    assert not faults(result)
    assert result.steps[0].largest == pytest.approx(1, rel=1e-3)
    scaled = judge.case(
        case, Evidence(states, pieces=judge.plan(case), advantages=[a / 2 if a > 0 else a for a in advantages])
    )
    assert faults(scaled), "advantages other than claimed must show"


def test_an_example_with_advantage_zero_cannot_be_seen_and_is_named(probe: Probe, judge: Judge) -> None:
    case = Case("case", 2, 4)
    result = judge.case(
        case, Evidence(step(probe, case, token_mean), pieces=judge.plan(case), advantages=[1, 0, 1, 1, 1, 1, 1, 1])
    )
    assert result.status == "not judged"
    assert "example 2" in result.reason


def test_an_objective_that_was_asked_for_is_a_choice_and_no_fault(probe: Probe, judge: Judge) -> None:
    case = Case("case", 2, 4, asked="sequence-mean")
    result = judge.case(case, Evidence(step(probe, case, sequence_mean), pieces=judge.plan(case)))
    assert [(f.id, f.kind) for f in result.all_findings] == [("sequence-mean", "choice")]
    report = make_report("x", [result], {}, "x", {}, 0.0)
    assert report.ok and report.verdict.objective == "sequence-mean"
    wrong = judge.case(case, Evidence(step(probe, case, token_mean), pieces=judge.plan(case)))
    assert faults(wrong) == {"token-mean"}, "a token mean where a sequence mean was asked for"


def test_no_step_and_a_foreign_update_are_verdicts_of_their_own(probe: Probe, judge: Judge) -> None:
    case = Case("case", 2, 4)
    before, after = step(probe, case, token_mean)
    assert faults(judge.case(case, Evidence([before, before], pieces=judge.plan(case)))) == {"no-step"}
    noise = {
        name: p + 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for name, p in after.items()
    }
    result = judge.case(case, Evidence([before, noise], pieces=judge.plan(case)))
    assert result.status == "not judged"
    assert "of the update is unexplained" in result.reason
    report = make_report("x", [result], {}, "x", {}, 0.0)
    assert report.verdict.outcome == "cannot judge"
    assert report.verdict.exit_code == 2


def test_an_update_that_drowns_in_rounding_is_not_judged(probe: Probe, judge: Judge) -> None:
    case = Case("case", 2, 4, lr=1e-8)
    result = judge.case(case, Evidence(step(probe, case, token_mean), pieces=judge.plan(case)))
    assert result.status == "not judged"
    assert "learning rate" in result.reason


def test_parameters_that_got_other_rows_are_named(probe: Probe, judge: Judge) -> None:
    """An all-reduce left out for one parameter: no fit over all, an exact one for each."""
    case = Case("case", 2, 4)
    before, whole = step(probe, case, token_mean)
    half = step(probe, case, lambda nll, c: torch.cat(nll[:4]).sum() / sum(map(len, nll)))[1]
    mixed = {name: half[name] if "layers.1.mlp" in name else whole[name] for name in whole}
    assert "differs-by-parameter" in faults(judge.case(case, Evidence([before, mixed], pieces=judge.plan(case))))


def test_a_leak_of_the_step_before_is_named_with_its_factor(probe: Probe, judge: Judge) -> None:
    case = Case("case", 2, 2, examples=8, steps=2, lr=0.1)
    model = copy.deepcopy(_model(probe.model))
    states = [{name: p.detach().clone() for name, p in model.named_parameters()}]
    for start in (0, 4):
        token_mean(losses(model, probe.rows[start : start + 4]), case).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad  # the gradient is never set to zero
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
    result = judge.case(case, Evidence(states, pieces=judge.plan(case)))
    assert faults(result) == {"leak"}
    assert not result.steps[0].findings
    assert "1 times the update of 1 step before" in result.steps[1].findings[0].detail


def test_micro_batches_dealt_in_another_order_are_read_from_equal_weights(probe: Probe, judge: Judge) -> None:
    case = Case("case", 2, 4)
    order = [5, 0, 3, 6, 1, 7, 2, 4]

    def shuffled(nll: list[torch.Tensor], c: Case) -> torch.Tensor:
        return micro_batch_mean([nll[i] for i in order], c)

    result = judge.case(case, Evidence(step(probe, case, shuffled), pieces=judge.plan(case)))
    assert result.steps[0].objective == "micro-batch-mean"
    details = " ".join(f.detail for f in result.all_findings)
    assert "1, 6" in details and "4, 7" in details


def test_packed_rows_that_see_each_other_are_told_from_rows_that_do_not(probe: Probe, judge: Judge) -> None:
    rows = probe.rows[:4]
    ids = [token for row, _ in rows for token in row]
    labels = [-100 if i == 0 else label for row, own in rows for i, label in enumerate(own)]
    forward = [ForwardRow(tuple(ids), (1,) * len(ids), None, 0, 0)]
    case = Case("case", 1, 1, examples=4, packing=True)
    apart = judge.case(case, Evidence(step(probe, case, token_mean), rows=[forward]))
    together = judge.case(case, Evidence(step(probe, case, token_mean, rows=[(ids, labels)]), rows=[forward]))
    assert faults(apart) == set()
    assert faults(together) == {"contaminated"}


@pytest.mark.parametrize("shift", [1, -1])
def test_shifted_labels_are_named(probe: Probe, judge: Judge, shift: int) -> None:
    rows = []
    for ids, labels in probe.rows[:8]:
        moved = [*labels[1:], -100] if shift == 1 else [-100, *labels[:-1]]
        rows.append((ids, moved))
    case = Case("case", 8, 1)
    result = judge.case(case, Evidence(step(probe, case, token_mean, rows=rows), pieces=judge.plan(case)))
    assert "labels-shifted" in faults(result)


def test_a_trained_prompt_is_named(probe: Probe, judge: Judge) -> None:
    rows = [(ids, (-100, *ids[1:])) for ids, _ in probe.rows[:8]]
    case = Case("case", 2, 4)
    assert "prompt-trained" in faults(
        judge.case(case, Evidence(step(probe, case, token_mean, rows=rows), pieces=judge.plan(case)))
    )


def test_label_smoothing_other_than_asked_for_is_named(probe: Probe, judge: Judge) -> None:
    def smoothed(share: float) -> list[dict[str, torch.Tensor]]:
        model = copy.deepcopy(_model(probe.model))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        total, tokens = torch.zeros(()), 0
        for ids, labels in probe.rows[:8]:
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            target = torch.tensor(labels[1:])
            total = total + torch.nn.functional.cross_entropy(logits, target, reduction="sum", label_smoothing=share)
            tokens += int((target != -100).sum())
        (total / tokens).backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        return [before, {name: p.detach().clone() for name, p in model.named_parameters()}]

    case = Case("case", 8, 1, label_smoothing=0.1)
    assert not faults(judge.case(case, Evidence(smoothed(0.1), pieces=judge.plan(case))))
    result = judge.case(case, Evidence(smoothed(0.3), pieces=judge.plan(case)))
    assert faults(result) == {"smoothing"}
    assert "0.3 where 0.1" in result.all_findings[0].detail


def test_several_cases_settle_what_one_cannot_tell(probe: Probe, judge: Judge) -> None:
    """With one row in a micro-batch a mean of micro-batch means is a mean of sequence means."""
    results = []
    for micro, accumulation in ((1, 8), (2, 4), (8, 1)):
        case = Case(f"{micro} x {accumulation}", micro, accumulation)
        results.append(judge.case(case, Evidence(step(probe, case, micro_batch_mean), pieces=judge.plan(case))))
    assert results[0].steps[0].objective == "sequence-mean"
    settled = settle(results)
    assert {case.steps[0].objective for case in settled} == {"micro-batch-mean"}
    verdict = judge_all(settled, {"transformers": "4.45.2"}, target="transformers")
    assert verdict.objective == "micro-batch-mean"
    assert verdict.exit_code == 1
    assert verdict.known and verdict.known[0].installed and "34191" in verdict.known[0].sources[0]


def test_a_scale_that_follows_the_number_of_tokens_is_a_constant_divisor(probe: Probe, judge: Judge) -> None:
    """One batch cannot tell; batches with different numbers of tokens can."""
    results = []
    for examples in (8, 7, 5):
        case = Case(f"{examples} examples", 8, 1, examples=examples)
        states = step(probe, case, lambda nll, _: torch.cat(nll).sum() / 64)
        results.append(judge.case(case, Evidence(states, pieces=judge.plan(case))))
    report = make_report("x", results, {}, "x", {}, 0.0)
    assert report.verdict.objective == "constant-divisor"
    assert "constant divisor" in report.verdict.sentences[0]
    assert report.verdict.exit_code == 1


def test_clean_steps_of_several_sizes_are_no_constant_divisor(probe: Probe, judge: Judge) -> None:
    results = []
    for examples in (8, 7, 5):
        case = Case(f"{examples} examples", 8, 1, examples=examples)
        results.append(judge.case(case, Evidence(step(probe, case, token_mean), pieces=judge.plan(case))))
    assert make_report("x", results, {}, "x", {}, 0.0).ok
