"""Hard problems with guided prompts: which are found, what is written, resuming, training on the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.on_ranks import lines
from tests.recipes import Tables, changed, file_recipe, write_reward, write_rows
from thence.cli import main
from thence.errors import UserError
from thence.jsonl import read_jsonl
from thence.pipeline import pope
from thence.pipeline.pope import Guidance, Search, find_guidance, record_of
from thence.pipeline.prompts import load_prompts
from thence.pipeline.run import run
from thence.recipe import load_recipe

FROM_THREE = "float(prompt[0] in '01' or len(prompt.partition('?')[2]) >= 3 and prompt[0] != '2')"
"""Problems 0 and 1 are easy; of the others three tokens of the solution help, but for problem 2."""
HOW = Guidance(2, (0.15, 0.3, 0.45, 0.6))


@pytest.fixture
def recipe(tmp_path: Path) -> Tables:
    tables = changed(file_recipe(tmp_path), {"stages": ["rl"], "rl.rollout_rows": 4})
    return changed(tables, {"rl.reward": write_reward(tmp_path, FROM_THREE, "helped")})


def search(recipe: Tables, how: Guidance = HOW) -> Search:
    return Search(load_recipe(recipe), how)


def test_hard_problems_get_the_shortest_prefix_that_helps(recipe: Tables, tmp_path: Path) -> None:
    out = tmp_path / "hard.jsonl"
    decided = find_guidance(search(recipe), out)
    assert [d["right"] for d in decided] == [2, 2, 0, 0, 0, 0, 0, 0]
    tried = {"shares": [0.15, 0.3, 0.45, 0.6], "successes": [0, 0, 0, 0], "share": None}
    assert decided[2] == {"problem": 2, "right": 0, "samples": 2, **tried}
    assert (decided[3]["successes"], decided[3]["share"], decided[3]["tokens"]) == ([0, 0, 2], 0.45, 3)
    rows = read_jsonl(out)
    assert [(row["problem"], row["pope"]) for row in rows] == [
        (i, kind) for i in range(3, 8) for kind in ("guided", "plain")
    ]
    assert (rows[0]["prompt"], rows[1]["prompt"]) == ("3+3?3+3", "3+3?")
    assert not any("completion" in row for row in rows), "the prefix is never a target"


def test_rl_trains_on_the_rows_and_the_prefix_is_in_the_prompt(recipe: Tables, tmp_path: Path) -> None:
    out = tmp_path / "hard.jsonl"
    found = search(recipe)
    find_guidance(found, out)
    tables = changed(recipe, {"rl.data": {"source": [str(out)]}, "rl.prompts": 10, "rl.steps": 1})
    loaded = load_recipe(tables)
    guided, plain = load_prompts(loaded.stage_data({"source": [str(out)]}), found.tokenizer)[:2]
    problem = found.pairs[3][1]
    assert plain.token_ids == problem.token_ids and plain.demonstration_ids is None
    assert guided.token_ids == (*problem.token_ids, *(problem.demonstration_ids or ())[:3])
    (line,) = lines(run(tables))
    assert line["reward"] == 0.5, "all five guided prompts are answered, and no plain one is"


def test_an_interrupted_search_resumes_and_decides_the_same(
    recipe: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    expected = find_guidance(search(recipe), whole)
    seen: list[int] = []

    def told(decided: Any, total: int) -> None:
        seen.append(len(decided))
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_guidance(search(recipe), cut, told)
    assert not cut.exists() and seen == [0, 2, 4]
    with record_of(cut).open("a") as file:
        file.write('{"problem": 4, "ri')  # of a killed process
    asked: list[int] = []
    respond = pope.respond
    monkeypatch.setattr(pope, "respond", lambda *given: asked.extend(p.index for p in given[3]) or respond(*given))
    assert find_guidance(search(recipe), cut) == expected
    assert set(asked) == {4, 5, 6, 7}
    assert cut.read_text() == whole.read_text()


def test_what_was_decided_with_other_settings_is_not_taken(recipe: Tables, tmp_path: Path) -> None:
    out = tmp_path / "hard.jsonl"
    find_guidance(search(recipe), out)
    with pytest.raises(UserError, match="the file exists"):
        find_guidance(search(recipe), out)
    out.unlink()
    for other, how in ((changed(recipe, {"rl.temperature": 0.5}), HOW), (recipe, Guidance(4, HOW.fractions))):
        with pytest.raises(UserError, match="decided with another model, other rows or other settings"):
            find_guidance(search(other, how), out)
    assert not out.exists()


def test_a_guided_prompt_without_room_is_not_tried(recipe: Tables, tmp_path: Path) -> None:
    tight = changed(recipe, {"rl.data": {"max_prompt_tokens": 6}})
    decided = find_guidance(search(tight), tmp_path / "hard.jsonl")
    assert decided[3]["shares"] == [0.15] and decided[3]["share"] is None


def test_a_recipe_that_gives_nothing_to_search_is_refused(recipe: Tables, tmp_path: Path) -> None:
    bare = [{"prompt": "1+1?", "answer": "2"}]
    without = changed(recipe, {"rl.data": {"source": [write_rows(tmp_path / "bare.jsonl", bare)]}})
    for tables, says in (
        (changed(recipe, {"stages": ["sft"]}), "no stage of the recipe is of kind rl"),
        (without, "none of 1 rows has a demonstration"),
    ):
        with pytest.raises(UserError, match=says) as refused:
            search(tables)
        assert refused.value.remedy


def test_a_reward_of_degrees_is_refused_unless_it_says_what_is_right(recipe: Tables, tmp_path: Path) -> None:
    degrees = changed(recipe, {"rl.reward": write_reward(tmp_path, "0.5")})
    with pytest.raises(UserError, match="a problem is hard where no response is right"):
        find_guidance(search(degrees), tmp_path / "one.jsonl")
    decided = find_guidance(search(changed(degrees, {"rl.reward_right_from": 0.5})), tmp_path / "two.jsonl")
    assert all(decision["right"] == 2 for decision in decided)


@pytest.mark.parametrize("shares", [(), (0.2, 0.1), (0.1, 0.1), (0.0, 0.1), (0.5, 1.0)])
def test_shares_that_do_not_ascend_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="do not ascend"):
        Guidance(2, shares)


@pytest.mark.parametrize("form", ["{problem}", "{prefix}", "{problem}{prefix}{prefix}"])
def test_a_form_without_both_parts_is_refused(form: str) -> None:
    with pytest.raises(UserError, match="has not each of"):
        Guidance(2, form=form)


def test_the_command_says_what_it_found(recipe: Tables, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from thence.toml import to_toml

    file, out = tmp_path / "mine.toml", tmp_path / "hard.jsonl"
    file.write_text(to_toml(recipe))
    assert main(["pope", str(file), str(out), "--samples", "2", "--shares", "0.15,0.3,0.45"]) == 0
    said = capfd.readouterr()
    assert "8 problems, 6 hard, 5 of these with a prefix that helps" in said.out
    assert f"written: {out}, 10 rows" in said.out
    assert main(["pope", str(file), str(tmp_path / "b.jsonl"), "--shares", "a"]) != 0
    assert json.loads(out.read_text().splitlines()[0])["pope"] == "guided"
