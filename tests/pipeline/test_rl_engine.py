"""RL whose responses another engine samples: it has the newest weights, and its mismatch is measured and corrected."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import thence.pipeline.rl_stage as rl_stage
from tests.recipes import llama
from tests.runs import trained
from thence.cli import main
from thence.errors import UserError
from thence.rollout.native import Response, Sampling, sample
from thence.rollout.vllm.engine import VllmEngine
from thence.rollout.vllm.settings import PYTHON_VARIABLE
from thence.toml import to_toml


class OwnCopy:
    """Samples with a copy of the weights, renewed only when they are pushed."""

    def __init__(self, shift: float = 0.0, dies_at: int | None = None):
        self.shift, self.dies_at = shift, dies_at
        self.model: Any = None
        self.trainer: Any = None
        self.versions: list[int] = []

    def update(self, version: int) -> None:
        self.model = copy.deepcopy(self.trainer.policy.model)
        self.versions.append(version)

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[Response]:
        if self.versions[-1] == self.dies_at:
            raise UserError("vLLM ended", remedy="run again")
        found = sample(self.model, prompts, seeds, sampling)
        return [replace(r, logps=[logp + self.shift for logp in r.logps]) for r in found]


def use(monkeypatch: pytest.MonkeyPatch, engine: OwnCopy) -> None:
    @contextmanager
    def engine_of(context: Any, stage: Any, trainer: Any) -> Iterator[OwnCopy]:
        engine.trainer = trainer
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


class Heard(VllmEngine):
    """vLLM itself, with what it is asked: rows of prompts, its responses, and the weights that it had."""

    asked: ClassVar[list[tuple[Any, list[tuple[int, ...]], list[Response]]]] = []
    config: ClassVar[Any] = None

    def load_weights(self, folder: Path, *given: Any, **named: Any) -> None:
        super().load_weights(folder, *given, **named)
        (file,) = folder.glob("*.safetensors")
        self.pushed = LlamaForCausalLM(self.config)
        self.pushed.load_state_dict(load_file(file), strict=False)
        self.pushed.tie_weights()

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        limits: Sequence[int] | None = None,
    ) -> list[Response]:
        found = super().sample(prompts, seeds, sampling, limits)
        self.asked.append((self.pushed, [tuple(prompt) for prompt in prompts], found))
        return found


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_samples_a_group_in_rounds_and_goes_on_from_what_the_expert_began(
    rl_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRAPO: four rollouts of each prompt, then two and one that the expert begins, then the whole demonstration."""
    if PYTHON_VARIABLE not in os.environ:
        pytest.skip(f"set {PYTHON_VARIABLE} to the Python of an environment with vLLM")
    monkeypatch.setattr("thence.pipeline.rollout_engine.VllmEngine", Heard)
    monkeypatch.setattr("thence.rollout.responses.sample", None)  # the trainer's own sampler
    monkeypatch.setattr(Heard, "asked", [])
    begun: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []
    continued = rl_stage.RolloutSampler.continuations

    def noted(sampler: Any, prompts: Any, prefixes: Any, n: int, first: int = 0) -> Any:
        rows = [(p.token_ids, tuple(begin)) for p, begin in zip(prompts, prefixes, strict=True) for _ in range(n)]
        found = continued(sampler, prompts, prefixes, n, first)
        for (prompt, begin), trajectory in zip(rows, found, strict=True):
            begun.append((prompt, begin, first))
            assert trajectory.prefix == len(begin) and trajectory.response_ids[: len(begin)] == begin
        return found

    monkeypatch.setattr(rl_stage.RolloutSampler, "continuations", noted)
    vllm = {"kv_cache_gb": 0.25, "max_rows": 32, "threads": 1}
    options = {"thresholds": [1.0, 1.0, 1.0]}
    settings = {
        "method": "trapo",
        "rollouts": 8,
        "engine": "vllm",
        "vllm": vllm,
        "options": options,
        "steps": 2,
        "max_tokens": 48,
    }
    heads = llama(
        hidden_size=64, num_key_value_heads=1, max_position_embeddings=128
    )  # vLLM's heads are 32 wide or more
    recipe = {**rl_recipe, "model": {**rl_recipe["model"], "init": heads}}
    monkeypatch.setattr(Heard, "config", LlamaConfig(**heads))
    _, lines = trained(recipe, tmp_path / "run", **settings)
    assert [line["step"] for line in lines] == [1, 2] and all(line["mismatch_kl"] < 1e-6 for line in lines)
    assert all({"rollout", "prefix", "demonstration"} <= line["shares"].keys() for line in lines)
    rows = [
        (prompt, response) for _, prompts, found in Heard.asked for prompt, response in zip(prompts, found, strict=True)
    ]
    assert len(rows) == 2 * (16 + 8 + 4)
    assert len(Heard.asked[0][1]) == 16
    assert [first for _, _, first in begun] == ([4] * 8 + [6] * 4) * 2
    for step in range(2):
        later = [prompt for prompt, _ in rows[28 * step + 16 : 28 * step + 28]]
        expected = [(*prompt, *begin) for prompt, begin, _ in begun[12 * step : 12 * step + 12]]
        assert sorted(later) == sorted(expected) and all(begin for _, begin, _ in begun)
    for model, prompts, found in Heard.asked:  # its log-probabilities are those of the weights that it was given
        for prompt, response in zip(prompts, found, strict=True):
            ids = torch.tensor([[*prompt, *response.token_ids]])
            with torch.no_grad():
                logp = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            taken = logp.gather(1, ids[0, len(prompt) :, None])[:, 0]
            assert (taken - torch.tensor(response.logps).double()).abs().max() < 1e-3
    assert not torch.equal(Heard.asked[0][0].lm_head.weight, Heard.asked[-1][0].lm_head.weight)
