"""Arguments that adapters hand to stacks that are not installed here: nothing but the case changes the update."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from thence.audit.result import Case
from thence.audit.run.cases import cases_for
from thence.audit.run.runner import adapter_names, load_adapter


class Skipped(Exception):
    """Ends a case, as a session's skip does."""


def session(folder: Path, ranks: int = 1) -> Any:
    def skip(reason: str) -> None:
        raise Skipped(reason)

    def data(layout: str) -> str:
        return str(folder / layout)

    return SimpleNamespace(model=str(folder), scratch=str(folder), ranks=ranks, rank=0, data=data, skip=skip)


def plain(**changes: Any) -> dict[str, Any]:
    return dataclasses.asdict(Case("a", 2, 4, **changes))


@pytest.mark.parametrize("name", ["ms-swift-sft", "axolotl-sft", "skyrl-rl"])
def test_adapters_of_stacks_that_are_not_installed_have_cases(name: str) -> None:
    assert name in adapter_names()
    adapter = load_adapter(name)
    chosen = [case.name for case, reason in cases_for(adapter.axes, adapter.cases, extra=True) if not reason]
    assert "micro 2 x 4" in chosen
    assert len(chosen) == len(set(chosen))


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("ms_swift_sft", ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "optim")),
        ("axolotl_sft", ("micro_batch_size", "gradient_accumulation_steps", "learning_rate", "optimizer")),
    ],
)
def test_arguments_follow_the_case_and_switch_off_the_rest(module: str, names: tuple[str, ...], tmp_path: Path) -> None:
    adapter = importlib.import_module(f"thence.audit.adapters.{module}")
    made = adapter.arguments(plain(lr=0.5), session(tmp_path))
    assert [made[name] for name in names] == [2, 4, 0.5, "sgd"]
    assert made["max_grad_norm"] == 0.0
    assert made["weight_decay"] == 0.0
    assert made["warmup_steps"] == 0
    adamw = adapter.arguments(plain(optimizer="adamw", eps=1e4), session(tmp_path))
    assert (adamw[names[3]], adamw["adam_epsilon"], adamw["adam_beta1"]) == ("adamw_torch", 1e4, 0.0)


def test_ranks_of_ms_swift_talk_over_gloo_and_axolotl_has_one() -> None:
    from thence.audit.adapters import axolotl_sft, ms_swift_sft

    made = ms_swift_sft.arguments(plain(), session(Path(), ranks=2))
    assert made["ddp_backend"] == "gloo"
    assert "ranks" not in axolotl_sft.AXES


@pytest.mark.parametrize(("module", "option"), [("ms_swift_sft", "loss_scale"), ("axolotl_sft", "train_on_inputs")])
def test_options_of_a_case_win(module: str, option: str, tmp_path: Path) -> None:
    adapter = importlib.import_module(f"thence.audit.adapters.{module}")
    assert adapter.arguments(plain(options={option: "other"}), session(tmp_path))[option] == "other"


@pytest.mark.parametrize(
    "name", ["llamafactory-sft", "openrlhf-sft", "verl-sft", "trl-grpo", "ms-swift-sft", "axolotl-sft"]
)
def test_adapters_that_switch_saving_off_have_no_case_that_saves(name: str) -> None:
    """LLaMA-Factory's took over the axes of transformers once, so that such cases were never judged."""
    adapter = load_adapter(name)
    cases = [case for case, reason in cases_for(adapter.axes, adapter.cases, quick=False, extra=True) if not reason]
    assert cases and not [case.name for case in cases if case.beyond]
