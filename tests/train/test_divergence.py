"""Training that diverges is refused with what to do, and no model, checkpoint or JSON file holds NaN."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import thence.pipeline.run as running
from tests.recipes import Recipes
from thence.cli import main
from thence.errors import CheckpointError, RecipeError, StepRefused, UserError
from thence.pipeline.run import run
from thence.recipe import Model
from thence.rollout.native import Sampling, sample
from thence.toml import to_toml
from thence.train.checkpoint import newest_checkpoint
from thence.train.finite import broken
from thence.train.model import load_model, save_model
from thence.train.policy import Policy
from thence.train.trainer import Trainer

STEADY = {"schedule": "constant", "warmup": 0.0}


def strict_json(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def poison_after(monkeypatch: pytest.MonkeyPatch, step: int, value: float = float("nan")) -> None:
    """The update of this step overflows, as one at a huge rate does; loss and gradient were finite."""
    original = Trainer.step

    def poisoned(self: Trainer, *given: Any, **named: Any) -> Any:
        report = original(self, *given, **named)
        if self.steps_taken == step:
            with torch.no_grad():
                next(self.model.parameters()).view(-1)[7] = value
        return report

    monkeypatch.setattr(Trainer, "step", poisoned)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_model_that_breaks_in_the_last_step_is_not_published(
    recipes: Recipes,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    value: float,
) -> None:
    recipe = recipes([stage], **{stage: {"checkpoint_every": 1}})
    with monkeypatch.context() as patch:
        poison_after(patch, 2, value)
        with pytest.raises(StepRefused) as refused:
            run(recipe)
    folder = Path(recipe["folder"]) / "stages" / stage
    assert not (folder / "done.json").exists() and not (folder / "model").exists()
    assert f"--{stage}.lr" in refused.value.remedy and "after step 1" in refused.value.remedy
    assert refused.value.field == f"{stage}.lr"
    kept = newest_checkpoint(folder / "checkpoints")
    assert kept is not None and kept.step == 1
    run(recipe)  # from the checkpoint that stands
    assert all(value.isfinite().all() for value in load_file(folder / "model" / "model.safetensors").values())


def test_the_command_line_exits_with_2_and_the_metrics_are_json(
    recipes: Recipes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = recipes(["sft"], sft={"lr": 1e6, "steps": 40, **STEADY})
    (tmp_path / "r.toml").write_text(to_toml(recipe))
    assert main(["run", str(tmp_path / "r.toml")]) == 2
    said = capsys.readouterr().err
    assert "the step was not taken" in said and "Traceback" not in said
    assert re.search(r"sft\.lr: training diverged in step \d+ of stage sft: ", said) and "--sft.lr" in said
    folder = Path(recipe["folder"])
    assert not (folder / "stages" / "sft" / "done.json").exists()
    for line in (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else ():
        strict_json(line)


def test_weights_so_large_that_logits_overflow_are_not_published(
    recipes: Recipes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poison_after(monkeypatch, 1, 1e25)
    with pytest.raises(StepRefused, match="diverged"):
        run(recipes(["sft"], sft={"steps": 1, **STEADY}))


def test_a_checkpoint_that_an_older_version_wrote_with_nan_is_refused_and_the_remedy_works(
    recipes: Recipes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipes(["sft"], sft={"checkpoint_every": 1})
    with monkeypatch.context() as patch:
        poison_after(patch, 1)
        patch.setattr("thence.pipeline.saving.broken", lambda *given: None)
        with pytest.raises(StepRefused, match="NaN"):
            run(recipe)
    checkpoints = Path(recipe["folder"]) / "stages" / "sft" / "checkpoints"
    with pytest.raises(CheckpointError, match="step 1 is not finite") as refused:
        run(recipe)
    assert f"rename {checkpoints}" in refused.value.remedy
    checkpoints.rename(checkpoints.with_name("diverged"))
    folder = run(recipe)
    assert (folder / "stages" / "sft" / "done.json").exists()


def test_a_model_file_with_nan_is_refused_by_its_name(recipes: Recipes, tmp_path: Path) -> None:
    loaded = load_model(Model(**recipes([])["model"]), torch.device("cpu"))
    save_model(loaded.model, loaded.tokenizer, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    name = sorted(weights)[-1]
    weights[name].view(-1)[-1] = float("nan")
    save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match=rf"{name} holds NaN") as refused:
        load_model(Model(path=str(tmp_path / "m")), torch.device("cpu"))
    assert refused.value.field == "model.path"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_from_nan_is_an_error_and_not_token_0(tiny_model: Any, temperature: float) -> None:
    model = tiny_model(torch.float32)
    sampling = Sampling(max_tokens=4, temperature=temperature)
    sample(model, [[2, 3]], [0], sampling)  # how it is sampled from is found out while it is whole
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        sample(model, [[2, 3]], [0], sampling)


def test_a_step_whose_rows_weigh_nothing_notices_nan(tiny_model: Any) -> None:
    from thence.data.trajectory import Prompt, Trajectory
    from thence.methods.base import make_batch
    from thence.methods.grpo import Grpo

    model, method = tiny_model(torch.float32), Grpo()
    group = [Trajectory(Prompt(index=0, token_ids=(2, 3)), (4, 5), score=0.0) for _ in range(2)]
    batch = make_batch(method, group)
    trainer = Trainer(model, 1e-3)
    trainer.step(batch)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(StepRefused, match="NaN"):
        trainer.step(batch)


def test_what_is_broken_is_named(tiny_model: Any) -> None:
    model = tiny_model(torch.float32)
    assert broken(Policy(model)) is None
    assert broken(Policy(model), {"main/w/exp_avg_sq": torch.tensor([1.0, float("inf")])}) == (
        "the optimizer's main/w/exp_avg_sq holds infinity"
    )
    with torch.no_grad():
        model.model.norm.weight.mul_(3e38)
    assert broken(Policy(model)) in ("its logits are not finite", "model.norm.weight holds infinity")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    assert broken(Policy(model)) == "model.norm.weight holds NaN"


def test_every_json_text_goes_through_one_function() -> None:
    """`json.dumps` writes NaN, which is not JSON. Where a text is not for files it may stand, for the reason given."""
    allowed = {
        "files.py": "the function itself",
        "compare/result.py": "finite first, without spaces",
        "pages/template.py": "finite first, without spaces",
        "pages/samples.py": "finite first, without spaces",
        "locks.py": "numbers of processes",
        "launch/facts.py": "texts; it runs where thence may be missing",
        "audit/": "what a foreign trainer told, NaN included, handed to the parent",
        "data/": "text of prompts",
        "framed.py": "between processes: a score or log-probability of NaN is told to the parent, which refuses it",
        "compare/plan.py": "keys of settings, whose numbers are finite",
        "compare/collect.py": "keys of settings, whose numbers are finite",
        "compare/registration.py": "the form that is hashed, in which what is not finite is text",
        "evaluate/endpoint.py": "a request, whose numbers are finite",
        "recipe/reading.py": "a name in a remedy",
        "verify/own_function.py": "between processes: names",
        "train/checkpoint.py": "the plain state of a run, compared bit by bit",
        "cli/doctor.py": "names",
    }
    source = Path(running.__file__).parents[1]
    found = [str(p.relative_to(source)) for p in source.rglob("*.py") if "json.dump" in p.read_text(encoding="utf-8")]
    assert [name for name in found if not any(name.startswith(place) for place in allowed)] == []
