"""Adapters trained by methods with a teacher or with rounds of sampling: the start is the model without adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipeline.on_ranks import assert_same, case, drive, largest_difference
from tests.recipes import Tables, changed, world_recipe
from tests.runs import trained
from thence.pipeline.context import StageContext
from thence.train.policy import Policy, Unadapted

FORM = {"form": "{solution};{prompt}"}
METHODS: dict[str, dict[str, Any]] = {
    "sdft-jsd": {"method": "sdft", "options": {**FORM, "divergence": "jsd", "top_k": 6, "tail": True}},
    "trapo": {"method": "trapo", "rollouts": 8, "options": {"thresholds": [1.0, 1.0, 1.0]}},
    "sdft": {"method": "sdft", "options": FORM},
    "sdft-now": {"method": "sdft", "options": {**FORM, "divergence": "forward-kl", "teacher": "current"}},
    "sdpo": {"method": "sdpo", "options": {**FORM, "teacher": "start"}},
    "sdpo-whole": {"method": "sdpo", "options": {**FORM, "teacher": "start", "divergence": "reverse-kl"}},
}
EXACT = 1e-12
"""Largest difference of a weight after four steps in float64."""


def adapted(base: Tables) -> Tables:
    return {**base, "model": {**base["model"], "lora": {"rank": 2, "modules_to_save": ["model.norm"]}}}


def stage_of(name: str) -> dict[str, Any]:
    return {"mini_batch": 2, **METHODS[name]}


@pytest.mark.matrix(1)
@pytest.mark.parametrize("name", METHODS)
def test_the_start_is_the_model_with_its_adapters_off(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends as with a second copy of the model for a teacher, and the adapters have learned."""
    value, rl = "float(sum(map(ord, response)) % 3 == 0)", {"steps": 3, "max_tokens": 12}
    recipe = adapted(world_recipe(tmp_path, ["rl"], value, data={"limit": 7}, rl=rl))
    recipe = changed(recipe, {"model.compute_dtype": "float64"})
    given: list[Any] = []
    frozen = StageContext.frozen_policy

    def off(context: StageContext) -> Any:
        given.append(frozen(context))
        return given[-1]

    def second(context: StageContext) -> Any:
        return Policy(copy.deepcopy(context.policy.model).requires_grad_(False))

    monkeypatch.setattr(StageContext, "frozen_policy", off)
    found, lines = trained(recipe, tmp_path / "off", **stage_of(name))
    monkeypatch.setattr(StageContext, "frozen_policy", second)
    expected, _ = trained(recipe, tmp_path / "copy", **stage_of(name))
    asks = METHODS[name]["method"] != "trapo" and METHODS[name]["options"].get("teacher") != "current"
    assert [type(one) for one in given] == ([Unadapted] if asks else [])
    assert max(float((found[key] - value).abs().max()) for key, value in expected.items()) < EXACT
    assert any(line["grad_norm"] > 0 for line in lines)
    start, _ = trained(recipe, tmp_path / "start", **{**stage_of(name), "steps": 1, "lr": 1e-30})
    assert any(not torch.equal(found[key], value) for key, value in start.items())


@pytest.fixture(scope="module")
def runs(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, own, cases = tmp_path_factory.mktemp("adapted"), adapted(base), []
    for number, name in enumerate(METHODS):
        layout = ("ddp", "fsdp2")[number % 2]
        cases += [case(own, folder / f"{name}-1", 1, stage_of(name))]
        cases += [case({**own, "parallel": layout}, folder / f"{name}-2", 2, stage_of(name))]
    drive(folder, cases)
    return folder


@pytest.mark.everything
@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_train_the_adapters_of_one_process(name: str, runs: Path) -> None:
    assert_same(runs / f"{name}-2", runs / f"{name}-1")
    assert largest_difference(runs / f"{name}-2", runs / f"{name}-1") < EXACT
