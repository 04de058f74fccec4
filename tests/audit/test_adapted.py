"""Cases that train LoRA adapters: the judge puts the same ones into its model and follows them alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.audit.test_audit import Loss, faults, losses, micro_batch_mean, no_end, token_mean
from thence.audit.judge.case import Judge
from thence.audit.result import Case, CaseResult
from thence.audit.solve.observation import Observation
from thence.audit.solve.probe import Probe
from thence.recipe import Lora
from thence.train.lora import add_adapters, places_of

RANK = 16


def judged(
    probe: Probe,
    judge: Judge,
    folder: Path,
    loss: Loss,
    *,
    steps: int = 1,
    move: str = "",
    without: str = "",
    **said: Any,
) -> CaseResult:
    """SGD steps of ``loss`` on adapters, kept as an adapter of the audit keeps them."""
    from transformers import AutoModelForCausalLM

    case = Case("case", 2, 4, steps=steps, epochs=steps, lr=0.1)
    model: Any = AutoModelForCausalLM.from_pretrained(probe.model, attn_implementation="eager")
    settings = Lora(rank=RANK)
    add_adapters(model, settings, 0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=case.lr)
    out = folder / "rank-0"
    out.mkdir()
    rows, forwards = probe.rows[: case.examples], []

    def keep(number: int) -> None:
        state = {n: p.detach().clone() for n, p in model.named_parameters() if not (without and without in n)}
        save_file(state, out / f"step-{number}.safetensors")

    keep(0)
    for number in range(steps):
        optimizer.zero_grad()
        loss(losses(model, rows), case).backward()
        optimizer.step()
        if move:
            model.get_parameter(move).data.add_(1e-3)
        for start in range(0, len(rows), 2):
            ids = [list(row) for row, _ in rows[start : start + 2]]
            longest = max(map(len, ids))
            mask = [[1] * len(i) + [0] * (longest - len(i)) for i in ids]
            padded = [i + [0] * (longest - len(i)) for i in ids]
            forwards.append({"step": number, "input_ids": padded, "attention_mask": mask, "position_ids": None})
        keep(number + 1)
    lora = {"rank": RANK, "alpha": settings.strength, "targets": sorted(places_of(model).adapted)} | said
    record = {"forwards": forwards, "said": {"lora": lora}, "steps": steps, "status": "done"}
    return judge.observation(Observation(case, folder, (json.loads(json.dumps(record)),), "done"))


def test_steps_of_adapters_are_judged_by_their_tokens(probe: Probe, judge: Judge, tmp_path: Path) -> None:
    """In the first step one factor is zero and the other has no gradient; afterwards both move."""
    result = judged(probe, judge, tmp_path, token_mean, steps=3)
    assert (result.status, faults(result), len(result.steps)) == ("judged", set(), 3), result.reason
    for step in result.steps:
        assert step.scale == pytest.approx(1, abs=1e-2)
        assert (step.smallest, step.largest) == pytest.approx((1, 1), abs=1e-2)


@pytest.mark.parametrize(("loss", "found"), [(micro_batch_mean, "micro-batch-mean"), (no_end, "end-missing")])
def test_faults_are_seen_through_adapters(probe: Probe, judge: Judge, tmp_path: Path, loss: Loss, found: str) -> None:
    assert faults(judged(probe, judge, tmp_path, loss)) == {found}


def test_a_strength_other_than_said_is_a_wrong_scale(probe: Probe, judge: Judge, tmp_path: Path) -> None:
    result = judged(probe, judge, tmp_path, token_mean, alpha=3.0 * RANK)
    assert result.steps[0].scale == pytest.approx(2 / 3, rel=1e-2)
    assert faults(result) == {"scale"}


def test_a_weight_under_the_adapters_that_moves_is_named(probe: Probe, judge: Judge, tmp_path: Path) -> None:
    result = judged(probe, judge, tmp_path, token_mean, move="lm_head.weight")
    assert "frozen-moved" in faults(result)
    (finding,) = [f for f in result.all_findings if f.id == "frozen-moved"]
    assert "1 of 21 frozen parameters (lm_head.weight)" in finding.detail


def test_without_the_weights_under_the_adapters_nothing_is_judged(probe: Probe, judge: Judge, tmp_path: Path) -> None:
    result = judged(probe, judge, tmp_path, token_mean, without="base_layer")
    assert result.status == "not judged"
    assert "were not kept" in result.reason


def test_adapters_on_modules_that_there_are_not_are_not_judged(probe: Probe, judge: Judge, tmp_path: Path) -> None:
    result = judged(probe, judge, tmp_path, token_mean, targets=["no_such_layer"])
    assert result.status == "not judged"
    assert "cannot be put into" in result.reason


def test_the_judge_of_the_whole_model_is_left_alone(probe: Probe, judge: Judge, tmp_path: Path) -> None:
    judged(probe, judge, tmp_path, token_mean)
    assert not any("lora" in name for name, _ in judge.model.named_parameters())
