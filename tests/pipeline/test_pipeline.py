"""Whole runs on a tiny model: stages in any order, and what the run folder keeps."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes import LETTER, Recipes
from tests.runs import metrics, weights
from thence.compare.result import NOTHING, Run
from thence.compare.statistics import estimate_of
from thence.compare.summary import summarise
from thence.data.worlds.vocabulary import VOCABULARY
from thence.errors import UserError
from thence.evaluate.metrics import avg_at_k
from thence.jsonl import write_jsonl
from thence.pages.run.page import write_page
from thence.pipeline.run import run
from thence.recipe import load_recipe

COMMON = {"stage", "kind", "step", "loss", "grad_norm", "lr", "entropy", "sequences", "tokens", "trained_tokens"}
COMMON |= {"flops", "seconds", "tokens_per_s"}
OF_SFT = COMMON | {"epoch"}
OF_RL = COMMON | {"clip_share", "reward", "reward_std", "accuracy", "unknown", "truncated", "response_tokens"}
OF_RL |= {"mismatch_kl", "sample_seconds", "train_seconds"}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of last change and content of every file but the records of the last start."""
    of_starts = ("environment.json", ".lock")
    found = [path for path in folder.rglob("*") if path.is_file() and path.name not in of_starts]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def test_stages_run_in_the_order_asked_for_each_from_the_model_before_it(recipes: Recipes) -> None:
    still = {"lr": 1e-9, "warmup": 0.0, "schedule": "constant"}
    recipe = recipes(["rl", "eval-one", "sft", "sft-two", "eval-two", "rl-two"], **{"sft-two": still, "rl-two": still})
    folder = run(recipe)
    assert [line["stage"] for line in metrics(folder)] == ["rl"] * 2 + ["sft"] * 2 + ["sft-two"] * 2 + ["rl-two"] * 2
    assert all((folder / "stages" / name / "done.json").is_file() for name in recipe["stages"])
    rl, sft, sft_two, rl_two = (weights(folder, name) for name in ("rl", "sft", "sft-two", "rl-two"))
    assert not same(rl, sft)
    for later in (sft_two, rl_two):  # rates of 1e-9 leave them where the first SFT left them, nearly
        assert not same(sft, later)
        for name in sft:
            torch.testing.assert_close(later[name], sft[name], rtol=0, atol=1e-6)
    assert not (folder / "stages" / "eval-one" / "model").exists()


def test_an_evaluation_alone_measures_the_model_that_the_recipe_names(recipes: Recipes) -> None:
    splits = {"one": {"seed": 1}, "two": {"split": "ood", "limit": 2}}
    recipe = recipes(["eval"], eval={"splits": splits, "temperatures": [0.0, 1.0], "samples": 2})
    folder = run(recipe)
    rows = json.loads((folder / "stages" / "eval" / "result.json").read_text())["rows"]
    assert [(r["split"], r["temperature"], r["problems"]) for r in rows] == [
        ("one", 0.0, 3),
        ("one", 1.0, 3),
        ("two", 0.0, 2),
        ("two", 1.0, 2),
    ]
    assert all(r["right"] + r["wrong"] + r["unknown"] + r["graded"] == 2 * r["problems"] for r in rows)
    samples = [json.loads(line) for line in (folder / "stages" / "eval" / "samples.jsonl").read_text().splitlines()]
    assert Counter((s["split"], s["temperature"]) for s in samples) == {
        (r["split"], r["temperature"]): 2 * r["problems"] for r in rows
    }
    assert all(0 < s["tokens"] <= 8 for s in samples)


def test_evaluations_before_and_after_training_use_the_same_problems_and_random_numbers(recipes: Recipes) -> None:
    still = {"lr": 1e-12, "warmup": 0.0, "schedule": "constant", "clip_norm": 1e-9}
    folder = run(recipes(["eval-base", "sft", "eval-sft"], sft=still, eval={"temperatures": [1.0]}))
    before, after = (
        [json.loads(line) for line in (folder / "stages" / name / "samples.jsonl").read_text().splitlines()]
        for name in ("eval-base", "eval-sft")
    )
    assert [s["prompt"] for s in before] == [s["prompt"] for s in after]
    assert [s["response"] for s in before] == [s["response"] for s in after]


def test_an_evaluation_is_of_the_test_split_also_when_only_its_limit_is_set(recipes: Recipes) -> None:
    recipe = recipes(["eval"])
    recipe["eval"]["data"] = {"split": "test", "limit": 3}
    named = run(recipe)
    recipe["eval"]["data"] = {"limit": 3}
    unnamed = run(recipe | {"folder": str(recipes.folder / "unnamed")})

    def prompts(folder: Path) -> list[str]:
        lines = (folder / "stages" / "eval" / "samples.jsonl").read_text().splitlines()
        return [json.loads(line)["prompt"] for line in lines]

    assert prompts(unnamed) == prompts(named)


def test_an_evaluation_that_was_cut_off_keeps_the_measurements_that_were_made(recipes: Recipes) -> None:
    recipe = recipes(["eval"], eval={"temperatures": [0.5, 1.0]})
    folder = run(recipe)
    stage = folder / "stages" / "eval"
    result, samples = (stage / "result.json").read_bytes(), (stage / "samples.jsonl").read_bytes()
    kept, lost = (stage / "evaluation" / "samples" / f"test-{temperature}.jsonl" for temperature in (0.5, 1.0))
    before, lines = kept.stat().st_mtime_ns, lost.read_text().splitlines(keepends=True)
    for path in (stage / "done.json", stage / "result.json"):
        path.unlink()
    lost.write_text(lines[0])  # killed while it was written
    run(recipe)
    assert kept.stat().st_mtime_ns == before
    assert lost.read_text().splitlines(keepends=True) == lines
    assert (stage / "result.json").read_bytes() == result
    assert (stage / "samples.jsonl").read_bytes() == samples


def test_the_same_samples_have_the_same_interval_in_a_run_an_evaluation_a_page_and_a_comparison(
    recipes: Recipes, tmp_path: Path
) -> None:
    (tmp_path / "even.py").write_text("def even(prompt, response, answer):\n    return len(response) % 4 == 0\n")
    recipe = recipes(["eval"], eval={"reward": f"{tmp_path}/even.py:even", "samples": 2, "temperatures": [1.0]})
    recipe["eval"]["data"]["limit"] = 30
    folder = run(recipe)
    stage = folder / "stages" / "eval"
    lines = [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]
    right = [sum(line["verdict"] == "right" for line in lines if line["index"] == i) for i in range(30)]
    assert 0 < sum(right) < 60
    score = avg_at_k(right, 2)  # what `thence eval` prints
    expected = pytest.approx((score.value, score.low, score.high), abs=1e-12)

    (row,) = json.loads((stage / "result.json").read_text())["rows"]
    assert (row["accuracy"], row["low"], row["high"]) == expected
    write_page(folder)
    (shown,) = json.loads((folder / "report.json").read_text())["results"]
    assert (shown["accuracy"], shown["low"], shown["high"]) == expected
    write_jsonl(folder / "metrics.jsonl", [])  # nothing was trained
    (measured,) = summarise(folder).measured
    estimate = estimate_of([Run("arm", "base", 0, {}, NOTHING, NOTHING, (measured,), {})], measured.column)
    assert estimate is not None and (estimate.mean, estimate.low, estimate.high) == expected


def test_the_run_folder_says_what_was_run_and_where(recipes: Recipes) -> None:
    recipe = recipes(["sft"])
    folder = run(recipe)
    assert load_recipe(folder / "recipe.toml") == load_recipe(recipe)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["device"].startswith(("cpu", "cuda"))
    assert {
        "thence",
        "git_commit",
        "python",
        "transformers",
        "platform",
        "cpu",
        "threads",
        "command",
        "started",
    } <= set(environment)
    commit = environment["git_commit"]
    assert commit is None or len(commit.removesuffix("+changes")) == 40
    assert [path.name for path in folder.rglob("checkpoints")] == ["checkpoints"], "of the last training stage alone"
    assert {path.name for path in folder.rglob(".*")} == {".thence-run.json", ".lock"}


def test_metrics_have_their_fields_and_they_are_finite(recipes: Recipes) -> None:
    folder = run(recipes(["sft", "rl"], sft={"held_out": 4}, rl={"reward_right_from": 1e-9}))
    for stage, fields in (("sft", OF_SFT | {"held_out_loss"}), ("rl", OF_RL)):
        lines = metrics(folder, stage)
        assert [line["step"] for line in lines] == [1, 2]
        for line in lines:
            assert fields <= set(line)
            assert line["kind"] == stage
            numbers = {key: value for key, value in line.items() if not isinstance(value, str)}
            assert all(math.isfinite(value) for value in numbers.values())
            assert line["trained_tokens"] <= line["tokens"]
            assert min(line["tokens"], line["flops"], line["seconds"], line["tokens_per_s"], line["entropy"]) > 0
    assert all(line["sequences"] == 16 and line["response_tokens"] <= 12 for line in metrics(folder, "rl"))
    assert all(abs(line["mismatch_kl"]) < 1e-6 for line in metrics(folder, "rl"))


def test_the_model_of_every_stage_opens_with_transformers_and_stops_at_the_end_token(recipes: Recipes) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run(recipes(["sft", "rl"]))
    for stage in ("sft", "rl"):
        path = folder / "stages" / stage / "model"
        model: Any = AutoModelForCausalLM.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert model.dtype == torch.float32
        assert same({name: dict(model.state_dict())[name] for name in weights(folder, stage)}, weights(folder, stage))
        assert tokenizer.decode(tokenizer.encode("12a+3?", add_special_tokens=False)) == "12a+3?"
        assert tokenizer.eos_token_id in model.generation_config.eos_token_id
        output = model.generate(torch.tensor([tokenizer.encode("12a+3?")]), max_new_tokens=3, do_sample=False)
        assert output.shape[1] <= 7 + 3


def test_the_model_stops_at_the_end_of_the_template_that_it_was_trained_with(recipes: Recipes) -> None:
    from transformers import GenerationConfig

    data = recipes.folder / "chat.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "#1"}]} for i in range(8)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}_{% endif %}{% endfor %}"
    source = {"source": [str(data)], "template": template}
    # it learns to answer "#1_", so that RL's responses are cut only if "_" does not stop them
    sft = {"steps": 60, "lr": 3e-2}
    folder = run(recipes(["sft", "rl"], data=source, sft=sft, rl={"steps": 1, "lr": 1e-9}))
    assert metrics(folder, "sft")[-1]["loss"] < 0.3
    assert metrics(folder, "rl")[0]["truncated"] < 0.5
    found = GenerationConfig.from_pretrained(folder / "stages" / "sft" / "model").eos_token_id
    assert VOCABULARY.index("_") in (found if isinstance(found, list) else [found])


def test_a_finished_run_is_not_done_again(recipes: Recipes) -> None:
    recipe = recipes(["sft", "rl", "eval"])
    folder = run(recipe)
    before = files(folder)
    assert run(recipe) == folder
    assert files(folder) == before


def test_other_settings_in_the_same_folder_are_refused_unless_it_is_begun_anew(recipes: Recipes) -> None:
    folder = run(recipes(["sft"]))
    before = files(folder)
    with pytest.raises(UserError, match="other settings"):
        run(recipes(["sft"]), {"sft.lr": 1e-3})
    assert files(folder) == before
    run(recipes(["sft"]), {"sft.lr": 1e-3}, restart=True)
    assert len(metrics(folder)) == 2
    assert load_recipe(folder / "recipe.toml").resolved()["sft"]["lr"] == 1e-3
    assert not same(weights(folder, "sft"), load_file_bytes(before["stages/sft/model/model.safetensors"][1]))


def load_file_bytes(content: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(content)


def test_beginning_anew_never_removes_a_folder_that_holds_no_run(recipes: Recipes) -> None:
    precious = recipes.folder / "run" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("ten years of work")
    with pytest.raises(UserError):
        run(recipes(["sft"]), restart=True)
    assert precious.read_text() == "ten years of work"


def test_equal_seeds_give_equal_weights_and_other_seeds_others(recipes: Recipes) -> None:
    def final(name: str, seed: int) -> dict[str, torch.Tensor]:
        return weights(run(recipes(["sft", "rl"], seed=seed, folder=str(recipes.folder / name))), "rl")

    first = final("one", 1)
    assert same(first, final("again", 1))
    assert not same(first, final("other", 2))


def test_a_broken_reward_function_stops_the_run_and_a_fixed_one_resumes(recipes: Recipes) -> None:
    file = recipes.folder / "breaking.py"
    # it breaks in the second step, of 16 responses each; the first has left a checkpoint
    file.write_text(
        "calls = 0\n"
        "def share(prompt, response, answer):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls > 20:\n"
        "        raise RuntimeError('out of order')\n"
        f"    return response.count({LETTER!r}) / max(1, len(response))\n"
    )
    recipe = recipes(["sft", "rl"], rl={"reward": f"{file}:share", "checkpoint_every": 1})
    with pytest.raises(UserError, match="out of order"):
        run(recipe)
    folder = recipes.folder / "run"
    assert [line["stage"] for line in metrics(folder)] == ["sft", "sft", "rl"]
    sft = files(folder / "stages" / "sft")
    file.write_text((recipes.folder / "own.py").read_text())
    run(recipe)
    assert files(folder / "stages" / "sft") == sft
    assert [line["step"] for line in metrics(folder)] == [1, 2, 1, 2]
    undisturbed = run(recipe, {"folder": str(recipes.folder / "undisturbed")})
    assert same(weights(folder, "rl"), weights(undisturbed, "rl"))
