"""Real stacks under audit: the newest TRL, transformers and DeepSpeed in their own environment, and thence here."""

from __future__ import annotations

import os
import sys

import pytest

from thence.audit import Report, audit_stack

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def stacks_python() -> str:
    """The Python of the environment in which the stacks are installed."""
    python = os.environ.get("THENCE_AUDIT_PYTHON")
    if not python:
        pytest.skip("the packages of the audited stacks could not be installed; `make test` sets THENCE_AUDIT_PYTHON")
    return python


def faults(report: Report) -> set[str]:
    return {finding.id for case in report.cases for finding in case.all_findings if finding.kind == "fault"}


def assert_clean(report: Report, *, ranks: bool = True) -> None:
    """No fault, every case judged unless the stack lacks what it is about, and one row's weight like another's."""
    assert report.verdict.outcome == "no finding", str(report)
    assert report.verdict.exit_code == 0
    assert not faults(report)
    left_out = [case for case in report.cases if case.status != "judged"]
    assert all(case.status == "skipped" and case.reason.startswith("this stack lacks") for case in left_out), str(
        report
    )
    judged = [case for case in report.cases if case.status == "judged"]
    assert len(judged) >= 3 and {case.case.ranks for case in judged} == {1, 2}
    for case in judged:
        assert case.steps, case.case.name
        for step in case.steps:
            assert step.scale == pytest.approx(1, abs=0.01), case.case.name
            assert (step.smallest, step.largest) == pytest.approx((1, 1), abs=0.01), case.case.name


@pytest.mark.stacks
@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("trl-sft", {"trl", "transformers", "accelerate", "datasets", "torch"}),
        ("trl-grpo", {"trl", "transformers", "accelerate", "datasets", "torch"}),
        ("deepspeed", {"deepspeed", "transformers", "torch"}),
        ("transformers", {"transformers", "accelerate", "torch"}),
    ],
)
@pytest.mark.matrix(3)  # TRL's trainer of SFT is that of transformers
def test_the_newest_stack_trains_what_it_says(name: str, packages: set[str], stacks_python: str) -> None:
    report = audit_stack(name, python=stacks_python, quick=True)
    assert_clean(report)
    assert set(report.versions) == packages | {"python"}
    assert all(report.versions.values())
    assert f"thence audit {name} --quick --python {stacks_python}" == report.command
    assert 0 < report.import_seconds < report.seconds


@pytest.mark.everything
def test_thence_trains_what_it_says() -> None:
    """`make test` audits thence by its command: tests/audit/test_ways.py."""
    report = audit_stack("thence", quick=True)
    assert_clean(report)
    assert set(report.versions) == {"python", "thence", "transformers", "torch"}
    assert report.command == "thence audit thence --quick"
    assert sys.executable not in report.command


@pytest.mark.everything
def test_thence_trains_adapters_and_cut_weights_as_it_says() -> None:
    """The rest of the matrix of ranks, layouts, adapters and precision is run by hand: `thence audit thence`."""
    report = audit_stack("thence", only=["LoRA, micro 2 x 4", "LoRA, weights cut, 2 ranks", "cut, clipped"])
    assert report.verdict.exit_code == 0, str(report)
    assert [case.status for case in report.cases] == ["judged"] * 4
    assert not faults(report)
    clipped = [case for case in report.cases if case.case.clip]
    assert len(clipped) == 2 and all(case.steps[0].scale is None for case in clipped)


def named(report: Report) -> dict[str, set[str]]:
    return {c.case.name: {f.id for f in c.all_findings if f.kind == "fault"} for c in report.cases}


@pytest.mark.everything
def test_a_plain_fsdp2_loop_that_counts_all_tokens_and_adds_gradients_up_is_in_order() -> None:
    names = ["7 examples, micro 1 x 4, 2 ranks", "2 replicas of 2", "clipped by the whole norm", "bfloat16, 2 ranks"]
    report = audit_stack("torch-fsdp2", only=names)
    assert report.verdict.exit_code == 0, str(report)
    assert [case.status for case in report.cases] == ["judged"] * 4
    assert not faults(report)


@pytest.mark.everything
def test_what_plain_fsdp2_loops_get_wrong_is_named() -> None:
    wrong = {
        "all tokens, then averaged, 2 ranks": {"scale-ranks"},
        "all tokens, then averaged, 4 ranks": {"scale-ranks"},
        "divisor set on the root module only, 2 ranks": {"scale-by-parameter", "scale-ranks"},
        "divided by the rank's tokens, 2 ranks": {"rank-mean"},
        "documented loop, 2 ranks, micro 2 x 2": {"micro-batch-mean"},
        "clipped by the norm of the shard, 2 ranks": {"clipped-by-shard"},
        "clipped by the norm of the shard, 4 ranks": {"clipped-by-shard"},
    }
    report = audit_stack("torch-fsdp2", only=list(wrong))
    assert report.verdict.exit_code == 1
    assert named(report) == wrong, str(report)
    scales = {case.case.name: case.steps[0].scale for case in report.cases}
    assert scales["all tokens, then averaged, 4 ranks"] == pytest.approx(1 / 4, rel=1e-3)
    assert "set_gradient_divide_factor" in report.verdict.remedy and "clip_grad_norm_" in report.verdict.remedy


def test_a_plain_loop_of_mean_losses_on_ranks_is_a_mean_of_rank_means() -> None:
    report = audit_stack("torch-fsdp2", only=["documented loop, 2 ranks, micro 4 x 1"])
    (case,) = report.cases
    (step,) = case.steps
    assert {"rank-mean", "micro-batch-mean"} <= {step.objective, *step.alike}  # one micro-batch a rank: they are one


@pytest.mark.everything
@pytest.mark.stacks
def test_transformers_told_not_to_average_tokens_over_ranks_is_found(stacks_python: str) -> None:
    report = audit_stack("transformers", python=stacks_python, only=["average_tokens_across_devices off"])
    assert report.verdict.outcome == "finding" and report.verdict.exit_code == 1, str(report)
    assert report.verdict.objective == "rank-mean"
    assert "rank-mean" in faults(report)
    assert report.verdict.remedy, "a finding without a remedy"
    (case,) = report.cases
    weights = {s.rank: s.weight for s in case.steps[0].sequences}
    # Ranks with fewer tokens weigh more: the ratio of the ranks' weights is the inverse one of their tokens.
    tokens = {r: sum(t.ideal > 0 for s in case.steps[0].sequences if s.rank == r for t in s.tokens) for r in weights}
    assert weights[0] / weights[1] == pytest.approx(tokens[1] / tokens[0], rel=0.01)
    assert tokens[0] != tokens[1]


@pytest.mark.everything
@pytest.mark.stacks
def test_deepspeed_resumes_and_saves_what_it_trained_with_the_optimizer_on_the_cpu(stacks_python: str) -> None:
    only = ["ZeRO 2, offload cpu, resume", "ZeRO 2, offload cpu, what is saved"]
    report = audit_stack("deepspeed", python=stacks_python, only=only)
    assert report.verdict.exit_code == 0, str(report)
    assert [case.status for case in report.cases] == ["judged", "judged"]


@pytest.mark.everything
@pytest.mark.stacks
def test_the_accelerate_loop_of_its_documentation_is_found(stacks_python: str) -> None:
    report = audit_stack("accelerate", python=stacks_python, only=["documented"])
    assert report.verdict.outcome == "finding", str(report)
    assert report.verdict.objective == "micro-batch-mean"


@pytest.mark.everything
@pytest.mark.stacks
def test_weights_that_depend_on_the_token_are_found_in_trl(stacks_python: str) -> None:
    report = audit_stack("trl-sft", python=stacks_python, only=["loss type dft"])
    assert report.verdict.outcome == "finding", str(report)
    assert "token-dependent" in faults(report)


@pytest.mark.everything
@pytest.mark.stacks
def test_the_dft_of_trl_and_of_thence_is_one_update(stacks_python: str) -> None:
    """Both are asked for the same objective by its formula, over several optimizer steps."""
    theirs = audit_stack("trl-sft", python=stacks_python, only=["dft, 3 steps"])
    own = audit_stack("thence", only=["RL: dft, "])
    for report, cases in ((theirs, 2), (own, 1)):
        assert [case.status for case in report.cases] == ["judged"] * cases, str(report)
        assert report.verdict.exit_code == 0, str(report)
        assert all("surrogate of demonstrations" in case.policy.verified for case in report.cases if case.policy)
