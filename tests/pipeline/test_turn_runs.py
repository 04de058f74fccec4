"""Runs with an environment: RL and evaluation of several turns, on ranks, by another engine, killed and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipeline.on_ranks import assert_same, case, drive, largest_difference, lines, sampled
from tests.pipeline.test_rl_engine import OwnCopy, use
from tests.recipes import Tables, changed, world_recipe
from tests.runs import trained
from thence.cli import main
from thence.data.trajectory import Prompt
from thence.errors import RecipeError, UserError
from thence.methods.registry import methods, stage_method
from thence.pipeline.preflight import preflight
from thence.pipeline.rehearsal import Rehearsal
from thence.pipeline.run import run
from thence.pipeline.sampler import RolloutSampler
from thence.recipe import load_recipe
from thence.recipe.schema import Rl
from thence.rollout.native import Response, Sampling, sample
from thence.rollout.turns import Player
from thence.toml import to_toml

TALK = """
import os
import signal
from pathlib import Path


class Talk:
    '''Says how long the turn was; done when it was short, or after three turns.'''

    right_from = 1.0

    def reset(self, row, seed):
        self.turns, self.seed = 0, seed
        return None

    def step(self, text):
        self.turns += 1
        kill = Path(__file__).with_name("kill")
        if kill.exists() and len(text) == 5:
            kill.unlink()
            os.kill(os.getppid(), signal.SIGKILL)
        done = len(text) < 3 or self.turns == 3
        return f"{len(text) % 10};{self.seed % 10}", float(sum(map(ord, text)) % 3 == 0), done
"""
ONE = """
class Talk:
    def reset(self, row):
        pass

    def step(self, text):
        return None, float(sum(map(ord, text)) % 3 == 0), True
"""


def talking(folder: Path, stages: Sequence[str] = ("rl",), body: str = TALK, **tables: Any) -> Tables:
    """Three steps of RL in an environment, and an evaluation in it."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "talk.py").write_text(body)
    environment = {"path": f"{folder / 'talk.py'}:Talk", "max_turns": 4}
    rl = {"steps": 3, "max_tokens": 40, "checkpoint_every": 1, "reward": "math", "environment": environment}
    evaluation = {"max_tokens": 40, "samples": 2, "data": {"split": "dev", "limit": 5}, "reward": "math"}
    evaluation["environment"] = environment
    made = world_recipe(folder, list(stages), data={"limit": 7}, rl=rl, eval=evaluation)
    return changed({**made, "folder": str(folder / "run")}, tables)


def test_turns_and_what_was_read_are_told_and_no_observation_counts_as_sampled_or_trained(tmp_path: Path) -> None:
    recipe = talking(tmp_path)
    run(recipe)
    found = lines(tmp_path / "run")
    assert all(1 < line["turns"] <= 3 and line["observation_tokens"] > 2 for line in found)
    assert all(line["trained_tokens"] == line["sampled_tokens"] for line in found)
    assert all(line["sampled_tokens"] == pytest.approx(line["response_tokens"] * 16) for line in found)
    assert all(line["environment_errors"] == line["environment_timeouts"] == line["turn_limit"] == 0 for line in found)
    assert all(line["mismatch_kl"] < 1e-9 for line in found), "sampled turn by turn and trained as one row"
    kept = [json.loads(text) for text in (tmp_path / "run/stages/rl/samples.jsonl").read_text().splitlines()]
    several = [row for row in kept if len(row["turns"]) > 2]
    assert several and all(row["turns"][1]["who"] == "environment" for row in several)


def test_a_single_turn_has_the_bits_of_a_stage_without_an_environment(tmp_path: Path) -> None:
    value = "float(sum(map(ord, response)) % 3 == 0) if len(response) < 12 else 0.0"  # a cut turn earns nothing
    rl = {"steps": 3, "max_tokens": 12}
    plain = world_recipe(tmp_path / "..", ["rl"], value, data={"limit": 7}, rl=rl)
    (tmp_path / "talk.py").write_text(ONE)
    expected, before = trained(plain, tmp_path / "plain")
    settings = {"reward": "math", "environment": {"path": f"{tmp_path / 'talk.py'}:Talk", "max_turns": 1}}
    found, after = trained(plain, tmp_path / "turns", **settings)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    told = ("loss", "grad_norm", "reward", "accuracy", "flops", "executed_flops", "tokens", "truncated")
    assert [[line[name] for name in told] for line in after] == [[line[name] for name in told] for line in before]
    assert all(line["turns"] == 1 and line["observation_tokens"] == 0 for line in after)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    base = talking(folder)
    base["model"]["compute_dtype"] = "float64"
    cases = [case(base, folder / f"turns-{world}", world, {"mini_batch": 2}) for world in (1, 2)]
    stopped = [case(base, folder / "moved", 2, {"mini_batch": 2}, stop=2)]
    drive(folder, [*cases, *stopped, case(base, folder / "moved", 1, {"mini_batch": 2}, suffix="-more")])
    return folder


def test_two_ranks_play_and_train_what_one_does(ranks: Path) -> None:
    assert_same(ranks / "turns-2", ranks / "turns-1")
    told = ("turns", "observation_tokens", "environment_errors")
    for got, expected in zip(lines(ranks / "turns-2"), lines(ranks / "turns-1"), strict=True):
        assert [got[name] for name in told] == [expected[name] for name in told]


def test_a_run_of_two_ranks_is_resumed_by_one(ranks: Path) -> None:
    assert sampled(ranks / "moved") + sampled(ranks / "moved", "-more")
    assert largest_difference(ranks / "moved", ranks / "turns-1") < 1e-6


@pytest.mark.everything
def test_a_run_that_is_killed_while_it_plays_ends_with_the_same_bits(tmp_path: Path) -> None:
    recipe = talking(tmp_path, ["rl", "eval"])
    code = "import json, sys; from thence.pipeline.run import run; run(json.loads(sys.argv[1]))"
    found = []
    for name, kill in (("plain", False), ("killed", True), ("killed", False)):
        if kill:
            (tmp_path / "kill").touch()
        own = json.dumps({**recipe, "folder": str(tmp_path / name)})
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        found.append(subprocess.run([sys.executable, "-c", code, own], env=variables, capture_output=True).returncode)
    assert found == [0, -9, 0]
    assert largest_difference(tmp_path / "killed", tmp_path / "plain") == 0.0
    results = [(tmp_path / name / "stages/eval/result.json").read_text() for name in ("plain", "killed")]
    assert results[0] == results[1]


class Limited(OwnCopy):
    """Another engine, which can hold rows of 60 tokens."""

    max_model_len = 60

    def sample(  # type: ignore[override]
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, limits: Any = None
    ) -> list[Response]:
        assert limits is not None and all(len(p) + n <= 60 for p, n in zip(prompts, limits, strict=True))
        return sample(self.model, prompts, seeds, sampling, limits)


def test_another_engine_plays_the_same_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = talking(tmp_path)
    native, expected = trained(recipe, tmp_path / "native")
    use(monkeypatch, Limited())
    monkeypatch.setattr("thence.rollout.responses.sample", None)  # the trainer's own sampler
    other, found = trained(recipe, tmp_path / "other", max_tokens=36)
    monkeypatch.undo()
    native, expected = trained(recipe, tmp_path / "again", max_tokens=36)
    assert any(line["context_limit"] for line in found) or all(torch.equal(native[n], other[n]) for n in native)
    assert [line["turns"] for line in found] != [1.0] * 3 and len(found) == len(expected)


@pytest.mark.parametrize("method", ["dapo", "hpt"])
def test_no_rollout_and_no_demonstration_reads_the_first_observation_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Each rollout of a group begins with an observation of its own, which follows from its seed."""
    recipe = talking(tmp_path, body=TALK.replace("return None", 'return f"{seed % 10};"', 1))
    options = {"first_rollouts": 2, "overlong_buffer": 0, "max_generations": 2} if method == "dapo" else {}
    read: list[Prompt] = []
    play, make = Player.play, RolloutSampler.demonstrations

    def playing(self: Player, tokenizer: Any, prompts: Sequence[Prompt], *rest: Any) -> Any:
        read.extend(prompts)
        found = play(self, tokenizer, prompts, *rest)
        assert all(t.prompt.asked == prompt.token_ids for t, prompt in zip(found, prompts, strict=True))
        assert all(len(t.prompt.token_ids) > len(t.prompt.asked or ()) for t in found)
        return found

    def shown(self: RolloutSampler, prompts: Sequence[Prompt]) -> Any:
        found = make(self, prompts)
        read.extend(trajectory.prompt for trajectory in found)
        return found

    monkeypatch.setattr(Player, "play", playing)
    monkeypatch.setattr(RolloutSampler, "demonstrations", shown)
    changes = {"stages": ["rl"], "rl.steps": 1, "rl.method": method, "rl.options": options, "rl.rollouts": 4}
    run(changed(recipe, changes))
    assert len(read) > 4 and all(prompt.asked is None for prompt in read)
    plain = {prompt.index: prompt.token_ids for prompt in read}
    assert all(prompt.token_ids == plain[prompt.index] for prompt in read)


def test_an_evaluation_is_played_kept_and_not_graded_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = talking(tmp_path, ["rl", "eval"])
    run(recipe)
    (row,) = json.loads((tmp_path / "run/stages/eval/result.json").read_text())["rows"]
    assert row["problems"] == 5 and row["right"] + row["wrong"] == 10 and row["accuracy"] is not None
    store = tmp_path / "run/stages/eval/evaluation"
    kept = [json.loads(text) for text in next((store / "samples").glob("*.jsonl")).read_text().splitlines()]
    assert any(len(sample["turns"]) > 2 for sample in kept)
    assert sum(sample["score"]["verdict"] == "right" for sample in kept) == row["right"]
    next((store / "grades").glob("*.jsonl")).unlink()  # killed between sampling and grading
    (tmp_path / "run/stages/eval/done.json").unlink()
    run(recipe)
    (again,) = json.loads((tmp_path / "run/stages/eval/result.json").read_text())["rows"]
    assert again == row
    assert main(["eval", "--regrade", str(store)]) != 0
    assert "scored these responses while they were sampled" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "run"), "--n", "3"]) == 0
    assert "observed" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run/report.html").read_text()
    assert 'class="observed"' in page and "read, never trained" in page


def test_validation_while_training_plays_too_and_is_what_the_evaluation_measures(tmp_path: Path) -> None:
    recipe = talking(tmp_path, ["rl", "eval"], **{"rl.eval_every": 3})
    run(recipe)
    (row,) = json.loads((tmp_path / "run/stages/eval/result.json").read_text())["rows"]
    assert lines(tmp_path / "run")[2]["eval/dev"] == pytest.approx(row["accuracy"])


def test_demonstrations_of_a_mixed_method_are_graded_as_a_single_turn(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    body = TALK.replace("done = len(text) < 3 or", "done = '#' in text or len(text) < 3 or")
    recipe = talking(tmp_path / "own", body=body, **{"rl.method": "luffy", "rl.steps": 2})
    run(recipe)
    assert all("demonstration" in line["shares"] and line["turns"] > 1 for line in lines(tmp_path / "own/run"))


# What is refused.


def test_methods_that_take_responses_apart_are_refused_before_the_first_step(tmp_path: Path) -> None:
    """Which these are follows from what they do: continuations, replays, and a teacher who reads another prompt."""
    rows = [Prompt(i, (3, 4), (5, 6, 7, 0), "1", "1+1?") for i in range(8)]
    for name, made in methods().items():
        if made.stage != "rl":
            continue
        takes_apart = made.__name__ == "ExGrpo" or made({}).teacher is not None
        stage = Rl(method=name, environment="own.py:Own", reward="math", rollouts=8, prompts=8)  # type: ignore[arg-type]
        plain = stage_method(stage.model_copy(update={"environment": None}), "rl", 64)

        class Watched(Rehearsal):
            def continuations(self, *given: Any, **named: Any) -> Any:
                nonlocal takes_apart
                takes_apart = True
                return super().continuations(*given, **named)

        if not takes_apart:
            for hopeless in (False, True):
                plain.compose(Watched(stage, rows, hopeless), 8, 8)
        if takes_apart:
            with pytest.raises(RecipeError, match="several turns") as caught:
                stage_method(stage, "rl", 64)
            assert caught.value.field == "rl.environment"
        else:
            assert stage_method(stage, "rl", 64).name == name
        assert bool(made.single_turn) == takes_apart, name


def test_an_environment_beside_a_reward_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the environment gives the rewards"):
        load_recipe(talking(tmp_path, **{"rl.reward": "exact"}))


def test_an_environment_that_changed_is_refused_on_resume_and_another_time_limit_is_not(tmp_path: Path) -> None:
    recipe = talking(tmp_path)
    run(recipe)
    longer = changed(recipe, {"rl.steps": 4, "rl.environment.seconds": 20.0})
    with pytest.raises(UserError, match=r"rl\.environment\.max_turns"):
        run(changed(longer, {"rl.environment.max_turns": 2}))
    (tmp_path / "run/stages/rl/done.json").rename(tmp_path / "done.json")
    (tmp_path / "talk.py").write_text(TALK + "\n# another\n")
    with pytest.raises(UserError, match="is not the one that stage rl was begun with"):
        run(recipe)
    (tmp_path / "talk.py").write_text(TALK)
    run(recipe)


def test_an_environment_that_failed_may_be_fixed_and_the_run_resumed(tmp_path: Path) -> None:
    broken = TALK.replace("done = len", "done = text[9] and len")
    recipe = talking(tmp_path, body=broken, **{"rl.data": {"limit": 7}})
    with pytest.raises(UserError, match=r"step raised IndexError on (example|response)"):
        run(recipe)
    (tmp_path / "talk.py").write_text(TALK)
    run(recipe)
    assert len(lines(tmp_path / "run")) == 3


def test_a_dry_run_tries_the_environment_and_says_that_observations_are_not_known(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(to_toml(talking(tmp_path)))
    found = {each.part: each for each in preflight(load_recipe(tmp_path / "recipe.toml"))}
    (part,) = [name for name in found if "environment" in name]
    assert found[part].state == "ok" and "not known" in found[part].reason


def test_the_fault_that_trains_observations_trains_them(tmp_path: Path) -> None:
    clean, before = trained(talking(tmp_path), tmp_path / "clean")
    fault = {"names": ["environment-trained"], "accumulation": 4}
    found, after = trained(talking(tmp_path), tmp_path / "faulty", fault=fault)
    assert not all(torch.equal(clean[name], found[name]) for name in clean)
    assert before[0]["sampled_tokens"] == after[0]["sampled_tokens"]
    with pytest.raises(RecipeError, match="tokens of tools or environments"):
        trained(world_recipe(tmp_path, ["rl"], data={"limit": 7}), tmp_path / "none", fault=fault)


@pytest.mark.parametrize("unknown", ["leave-out", "zero"])
def test_rollouts_whose_environment_fails_are_left_out_or_zero_as_asked(unknown: str, tmp_path: Path) -> None:
    body = TALK.replace("return None", "if seed % 3 == 0: raise ValueError('no')\n        return None")
    recipe = talking(tmp_path, body=body, **{"rl.environment.on_error": "unknown", "rl.unknown": unknown})
    run(recipe)
    found = lines(tmp_path / "run")
    assert all(0 < line["environment_errors"] == line["unknown"] < 16 for line in found)
    for line in found:
        left = 16 - line["unknown"]
        assert line["sequences"] == 16 if unknown == "zero" else 0 < line["sequences"] <= left
