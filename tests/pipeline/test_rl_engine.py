"""RL whose responses another engine samples: it has the newest weights, and its mismatch is measured and corrected."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import thence.pipeline.rl_stage as rl_stage
from tests.runs import trained
from thence.cli import main
from thence.errors import UserError
from thence.rollout.native import Response, Sampling, sample
from thence.toml import to_toml


class OwnCopy:
    """Samples with a copy of the weights, renewed only when they are pushed."""

    def __init__(self, shift: float = 0.0, dies_at: int | None = None):
        self.shift, self.dies_at = shift, dies_at
        self.model: Any = None
        self.versions: list[int] = []

    def push_weights(self, model: Any, version: int) -> None:
        self.model = copy.deepcopy(model)
        self.versions.append(version)

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[Response]:
        if self.versions[-1] == self.dies_at:
            raise UserError("vLLM ended", remedy="run again")
        found = sample(self.model, prompts, seeds, sampling)
        return [replace(r, logps=[logp + self.shift for logp in r.logps]) for r in found]


def use(monkeypatch: pytest.MonkeyPatch, engine: OwnCopy) -> None:
    @contextmanager
    def engine_of(context: Any, stage: Any) -> Iterator[OwnCopy]:
        yield engine

    monkeypatch.setattr(rl_stage, "engine_of", engine_of)


def test_another_engine_has_the_newest_weights_at_every_step(
    rl_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native, _ = trained(rl_recipe, tmp_path / "native")
    engine = OwnCopy()
    use(monkeypatch, engine)
    other, lines = trained(rl_recipe, tmp_path / "other")
    assert engine.versions == [0, 1, 2]
    assert all(torch.equal(native[name], other[name]) for name in native)
    assert all(line["mismatch_kl"] < 1e-9 for line in lines)


def test_every_round_of_a_group_is_sampled_by_the_other_engine(
    rl_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"method": "trapo", "rollouts": 8, "options": {"thresholds": [1.0, 1.0, 1.0]}}
    native, expected = trained(rl_recipe, tmp_path / "native", **settings)
    use(monkeypatch, OwnCopy())
    monkeypatch.setattr("thence.rollout.responses.sample", None)  # the trainer's own sampler
    other, lines = trained(rl_recipe, tmp_path / "other", **settings)
    assert all(torch.equal(native[name], other[name]) for name in native)
    assert [line["shares"] for line in lines] == [line["shares"] for line in expected]
    assert all({"rollout", "prefix", "demonstration"} <= line["shares"].keys() for line in lines)


def test_the_mismatch_of_sampler_and_trainer_is_measured(
    rl_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, OwnCopy(shift=-0.1))
    _, lines = trained(rl_recipe, tmp_path / "run")
    # k3 of a log-ratio of 0.1: exp(0.1) - 1 - 0.1
    assert [line["mismatch_kl"] for line in lines] == pytest.approx([0.00517] * 3, rel=1e-2)


@pytest.mark.parametrize(("shift", "factor"), [(-0.3, 1.349859), (-3.0, 2.0), (0.7, 0.496585)])
def test_tokens_are_weighed_by_the_truncated_importance_ratio_where_asked(
    rl_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float, factor: float
) -> None:
    use(monkeypatch, OwnCopy(shift=shift))
    _, plain = trained(rl_recipe, tmp_path / "plain")
    _, corrected = trained(rl_recipe, tmp_path / "corrected", importance_bound=2.0)
    assert corrected[0]["grad_norm"] == pytest.approx(factor * plain[0]["grad_norm"], rel=1e-4)


def test_a_run_whose_engine_ended_goes_on_with_a_new_one(
    rl_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, _ = trained(rl_recipe, tmp_path / "native")
    use(monkeypatch, OwnCopy(dies_at=2))
    with pytest.raises(UserError, match="vLLM ended"):
        trained(rl_recipe, tmp_path / "run")
    use(monkeypatch, OwnCopy())
    weights, lines = trained(rl_recipe, tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(torch.equal(weights[name], undisturbed[name]) for name in weights)


def test_wrong_settings_of_vllm_are_refused_before_anything_is_computed(
    rl_recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {**rl_recipe, "folder": str(tmp_path / "run"), "rl": {**rl_recipe["rl"], "engine": "vllm"}}
    file = tmp_path / "recipe.toml"
    for settings, said in (({"pyton": "python3"}, "rl.vllm.pyton"), ({"server": "10.0.0.1:80"}, "127.0.0.1")):
        file.write_text(to_toml({**own, "rl": {**own["rl"], "vllm": settings}}))
        assert main(["run", str(file)]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_python_without_vllm_is_an_error_with_a_remedy(
    rl_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("THENCE_VLLM_PYTHON", raising=False)
    file = tmp_path / "recipe.toml"
    file.write_text(
        to_toml({**rl_recipe, "folder": str(tmp_path / "run"), "rl": {**rl_recipe["rl"], "engine": "vllm"}})
    )
    assert main(["run", str(file)]) == 2
    assert "THENCE_VLLM_PYTHON" in capsys.readouterr().err
