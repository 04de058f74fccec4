"""Steps of your own that do what no clean step does: NaN, a turned sign, frozen or reshaped parameters, AdamW in RL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.audit.homemade import HomeMade
from thence.audit import Report, check
from thence.audit.judge.cuts import first_update
from thence.audit.run.own_step import random_rows

ROOT = Path(__file__).parents[2]
SHORT = random_rows(40, lengths=(2, 11, 3, 7))


class Around:
    """A right step with something done before and after it."""

    lr = 0.5

    def __init__(self, before: Any = None, after: Any = None):
        self.before, self.after = before, after

    def __call__(self, model: Any, rows: Any, micro_batch: int, accumulation: int) -> None:
        if self.before is not None:
            self.before(model)
        HomeMade("sgd")(model, rows, micro_batch, accumulation)
        if self.after is not None:
            with torch.no_grad():
                self.after(model)


@pytest.fixture
def checked(tiny_model: Callable[..., Any]) -> Callable[..., Report]:
    return lambda step, **more: check(step, model=tiny_model(torch.float32), batch=SHORT, **more)


def ids(report: Report) -> set[str]:
    return {fault.id for case in report.cases for fault in case.faults}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parameters_that_are_no_numbers_are_named_and_no_weights_are_given(checked: Any, value: float) -> None:
    def spoil(model: Any) -> None:
        next(model.parameters()).view(-1)[3] = value

    report = checked(Around(after=spoil))
    assert ids(report) == {"not-finite"} and report.verdict.exit_code == 1, str(report)
    assert "1 values in 1 of" in str(report) and "nan%" not in str(report)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_update_against_the_gradient_is_no_wrong_size(checked: Any, optimizer: str) -> None:
    report = checked(HomeMade(optimizer, scale=-1.0))
    assert "against-gradient" in ids(report) and "scale" not in ids(report), str(report)
    assert "sign of the loss" in report.verdict.remedy


def test_what_a_step_freezes_is_its_own_doing(checked: Any, tiny_model: Any) -> None:
    def freeze(model: Any) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embed" in name or "lm_head" in name)

    report = checked(Around(before=freeze), lr=0.5)
    assert not report.ok and "parameters-untouched" in ids(report), str(report)
    frozen = tiny_model(torch.float32)
    next(frozen.parameters()).requires_grad_(False)
    said = check(HomeMade("sgd"), model=frozen, batch=SHORT)
    assert said.ok and any("taken for frozen on purpose" in line for line in said.not_verified), str(said)


def test_a_step_that_changes_shapes_is_not_judged(checked: Any) -> None:
    report = checked(Around(after=lambda model: model.resize_token_embeddings(model.config.vocab_size + 8)))
    assert report.verdict.exit_code == 2 and "changes the shape of" in str(report), str(report)


def test_what_most_cases_show_stands_before_what_one_looks_like(checked: Any) -> None:
    def clip(model: Any, rows: Any, micro_batch: int, accumulation: int) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        total = sum(label != -100 for row in rows for label in row["labels"][1:])
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
            logits = model(input_ids=ids).logits[0, :-1]
            (torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / total).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()

    report = checked(clip)
    most = max((sum(f in {x.id for x in c.faults} for c in report.cases), f) for f in ids(report))
    assert report.verdict.exit_code == 1 and "first micro-batch" not in report.verdict.sentences[0], (most, str(report))


def test_updates_that_begin_elsewhere_are_not_compared() -> None:
    one, other = {"a": torch.ones(4)}, {"a": torch.zeros(4)}
    starts = [first_update(state, {"a": state["a"] - 0.1}, [0], 0.0, "float32").start for state in (one, one, other)]
    assert starts[0] == starts[1] != starts[2]


@pytest.mark.slow
def test_a_policy_step_under_adamw_is_judged_by_its_signs() -> None:
    text = (ROOT / "docs/audit-rl.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    text = text.replace("torch.optim.SGD(model.parameters(), lr=0.3)", "torch.optim.AdamW(model.parameters(), lr=1e-3)")
    text = text.replace(", lr=0.3)\nprint", ")\nprint").split("print(report)")[0]
    assert "AdamW" in text and "lr=0.3" not in text
    found = []
    for version in (text, text.replace('row["reward"] - sum(group) / len(group)', 'row["reward"]')):
        scope: dict[str, Any] = {}
        exec(version, scope)
        found.append(scope["report"])
    assert found[0].ok and found[0].verdict.exit_code == 0, str(found[0])
    assert found[1].verdict.exit_code == 1 and "advantage-baseline" in ids(found[1]), str(found[1])
