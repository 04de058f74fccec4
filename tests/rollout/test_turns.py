"""Rollouts of several turns: what the policy reads, what counts as its own, how they end, and what goes wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.rollout.environments import COUNTER, Scripted, player, prompts, sampling, write
from thence.data.template import ChatFormat, chat_format
from thence.data.trajectory import Trajectory
from thence.data.worlds.vocabulary import build_tokenizer
from thence.errors import UserError
from thence.methods.base import bare_row
from thence.rollout.turns import Player, passes

END = 0
TOKENIZER = build_tokenizer()
CHAT: ChatFormat = chat_format(TOKENIZER)
RESET = "def reset(self, row):\n    pass\n"


def played(
    own: Player,
    say: Callable[[int, int], str] = lambda turn, i: "1",
    count: int = 1,
    limit: int | None = 200,
    **how: Any,
) -> list[Trajectory]:
    with own:
        script = Scripted(TOKENIZER, say, END)
        seeds = [100 + i for i in range(count)]
        return own.play(TOKENIZER, prompts(TOKENIZER, count), seeds, sampling(**how), script, limit)


def error_of(spec: str, *, response: str = "1", **settings: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        played(player(spec, CHAT, **settings), lambda turn, i: response)
    return caught.value


def text(ids: Any) -> str:
    return TOKENIZER.decode(list(ids))


def test_the_policy_reads_its_own_tokens_as_sampled_and_what_the_environment_said_behind_them(tmp_path: Path) -> None:
    own = player(write(tmp_path, COUNTER, "Counter"), CHAT)
    script = Scripted(TOKENIZER, lambda turn, i: "ab"[turn % 2] * (turn + 1), END)
    with own:
        (found,) = own.play(TOKENIZER, prompts(TOKENIZER), [7], sampling(), script, 200)
    assert [text(asked[0]) for asked in script.asked] == ["$1+1?", "$1+1?a$1", "$1+1?a$1bb$2"]
    assert text(found.response_ids) == "a$bb$aaa$"
    assert found.sampler_logps == (-0.5,) * 9
    assert [(o.after, text(o.token_ids)) for o in found.observations] == [(2, "1"), (5, "2")]
    assert found.transcript == (
        ("policy", "a"), ("environment", "1"), ("policy", "bb"), ("environment", "2"), ("policy", "aaa"),
        ("environment", "3"),
    )  # fmt: skip
    assert (found.turns, found.observation_tokens, found.finish, found.text) == (3, 2, "stop", "a$1bb$2aaa")
    assert len({seed for (seed,) in script.seeds}) == 3 and script.seeds[0] == [7]


def test_no_token_of_an_observation_is_trained_and_all_of_the_policy_are(tmp_path: Path) -> None:
    (found,) = played(player(write(tmp_path, COUNTER, "Counter"), CHAT))
    row = bare_row(found)
    assert text(row.token_ids) == "$1+1?1$11$21$"
    assert text(row.token_ids[row.trained]) == "1$1$1$" and row.n_trained == len(found.response_ids)
    assert text(row.token_ids[~row.trained]) == "$1+1?12"


def test_what_was_read_and_sampled_is_counted_turn_by_turn(tmp_path: Path) -> None:
    found = played(player(write(tmp_path, COUNTER, "Counter"), CHAT))
    read, sampled = passes(found)
    assert [text(ids) for ids in read] == ["$1+1?", "$1+1?1$1", "$1+1?1$11$2"] and sampled == [2, 2, 2]


@pytest.mark.parametrize(("score", "expected", "verdict"), [("sum", 3.0, "right"), ("last", 1.5, "wrong")])
def test_the_score_is_the_sum_of_the_rewards_or_the_last(
    score: Any, expected: float, verdict: str, tmp_path: Path
) -> None:
    (found,) = played(player(write(tmp_path, COUNTER, "Counter"), CHAT, right_from=2.0, score=score))
    assert (found.score, found.verdict) == (expected, verdict)


def test_an_environment_gets_the_row_and_a_seed_that_follows_from_the_rollout(tmp_path: Path) -> None:
    body = (
        "def reset(self, row, seed):\n    self.row, self.seed = row, seed\n"
        "def step(self, text):\n"
        "    same = self.row == {'prompt': '1+1?', 'answer': '2', 'level': 3}\n"
        "    return str(self.seed), float(same), True\n"
    )
    spec = write(tmp_path, body)
    found = [t for _ in range(2) for t in played(player(spec, CHAT), count=2)]
    assert all(t.score == 1.0 for t in found)
    assert found[0].transcript == found[2].transcript != found[1].transcript == found[3].transcript


def test_a_first_observation_is_part_of_the_prompt(tmp_path: Path) -> None:
    body = "def reset(self, row):\n    return '55'\ndef step(self, text):\n    return None, 1.0, True\n"
    (found,) = played(player(write(tmp_path, body), CHAT))
    assert text(found.prompt.token_ids) == "$1+1?55" and found.observations == ()
    assert found.transcript == (("environment", "55"), ("policy", "1"))


def endings() -> dict[str, tuple[dict[str, Any], dict[str, Any], str, str, float]]:
    return {
        "turns": ({"max_turns": 2}, {}, "turns", "1$1$", 1.5),
        "one turn": ({"max_turns": 1}, {}, "turns", "1$", 0.5),
        "tokens, a turn cut": ({}, {"max_tokens": 3}, "length", "1$1", 0.5),
        "tokens, at the end of a turn": ({}, {"max_tokens": 2}, "length", "1$", 0.5),
        "observations": ({"max_observation_tokens": 1}, {}, "context", "1$1$", 1.5),
        "the model's context": ({}, {"limit": 8}, "context", "1$", 0.5),
        "the model's context, a turn cut": ({}, {"limit": 9}, "context", "1$1", 0.5),
    }


@pytest.mark.parametrize("case", endings())
def test_a_rollout_ends_at_each_limit_with_what_it_has_earned(case: str, tmp_path: Path) -> None:
    settings, how, finish, response, score = endings()[case]
    (found,) = played(player(write(tmp_path, COUNTER, "Counter"), CHAT, **settings), **how)
    assert (found.finish, text(found.response_ids), found.score) == (finish, response, score)
    assert not found.observations or found.observations[-1].after < len(found.response_ids)


def test_rollouts_that_are_over_are_not_sampled_on_beside_those_that_go_on(tmp_path: Path) -> None:
    body = RESET + "def step(self, text):\n    return '1', 1.0, text == 'b'\n"
    own = player(write(tmp_path, body), CHAT, max_turns=3)
    found = played(own, lambda turn, i: "b" if (turn, i) == (0, 0) else "c", count=3)
    assert [t.turns for t in found] == [1, 3, 2] or [t.turns for t in found] == [1, 3, 3]
    assert [t.finish for t in found] == ["stop", "turns", "turns"]


def test_any_number_of_processes_plays_the_same(tmp_path: Path) -> None:
    spec = write(tmp_path, COUNTER, "Counter")
    one, three = (played(player(spec, CHAT, processes=n), count=5) for n in (1, 3))
    assert one == three


# What an environment does wrong.

WRONG_STEPS = {
    "an observation of NaN": ("float('nan'), 0.0, False", "the observation nan, not a text"),
    "an observation in bytes": ("b'1', 0.0, False", "the observation b'1', not a text"),
    "half a character": ("'\\ud800', 0.0, False", "half a character"),
    "no observation, not done": ("None, 0.0, False", "no observation (None), and is not done"),
    "a huge observation": ("'1' * 2_000_000, 0.0, False", "2,000,000 characters"),
    "a reward of NaN": ("'1', float('nan'), False", "the reward nan, not a finite number"),
    "a reward in words": ("'1', 'good', False", "the reward 'good', not a finite number"),
    "a huge reward": ("'1', 1e9, True", "beyond 1,000,000"),
    "done in words": ("'1', 1.0, 'yes'", "'yes' for done, not True or False"),
    "two values": ("'1', 1.0", "not (observation, reward, done)"),
    "nothing": ("None", "not (observation, reward, done)"),
}


@pytest.mark.parametrize("case", WRONG_STEPS)
def test_what_step_may_not_return_is_named_with_class_and_row(case: str, tmp_path: Path) -> None:
    value, expected = WRONG_STEPS[case]
    spec = write(tmp_path, RESET + f"def step(self, text):\n    return {value}\n")
    error = error_of(spec)
    assert spec in error.problem and expected in error.problem and "example 1 (prompt '1+1?')" in error.problem
    assert "on_error" in error.remedy


def test_an_error_names_class_file_line_and_row(tmp_path: Path) -> None:
    spec = write(tmp_path, RESET + "def step(self, text):\n    return {}['key']\n")
    error = error_of(spec)
    assert "step raised KeyError on example 1 (prompt '1+1?'): 'key'" in error.problem
    assert (error.file, error.line) == (spec.rpartition(":")[0], 8)


@pytest.mark.parametrize("body", ["raise ValueError('no')", "raise SystemExit", "import os; os._exit(3)"])
def test_an_environment_that_fails_has_no_score_where_that_is_asked_for(
    body: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = write(tmp_path, RESET + f"def step(self, text):\n    if text == 'b': {body}\n    return '1', 1.0, True\n")
    own = player(spec, CHAT, on_error="unknown")
    with caplog.at_level(logging.WARNING):
        found = played(own, lambda turn, i: "b" if i == 1 else "a", count=2)
    assert [(t.finish, t.verdict) for t in found] == [("stop", "right"), ("error", "unknown")]
    assert spec in found[1].reason and "example 2" in caplog.text


def test_a_step_that_takes_too_long_is_interrupted_and_has_no_score(tmp_path: Path) -> None:
    body = RESET + "def step(self, text):\n    if text == 'b': time.sleep(60)\n    return '1', 1.0, True\n"
    own = player(write(tmp_path, body), CHAT, seconds=0.2)
    found = played(own, lambda turn, i: "b" if i == 0 else "a", count=3)
    assert [(t.finish, t.verdict) for t in found] == [("timeout", "unknown"), ("stop", "right"), ("stop", "right")]
    assert "more than 0.2 s" in found[0].reason


def test_a_step_that_cannot_be_interrupted_ends_its_process_and_the_rollouts_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thence.rollout.environments.MARGIN", 0.3)
    body = (
        RESET + "def step(self, text):\n    while text == 'b':\n        try:\n            time.sleep(60)\n"
        "        except BaseException:\n            pass\n    return '1', 1.0, text == 'c'\n"
    )
    own = player(write(tmp_path, body), CHAT, seconds=0.2)
    found = played(own, lambda turn, i: ("a", "c")[turn] if i else "b", count=3)
    assert [t.finish for t in found] == ["timeout", "error", "error"]
    assert {t.verdict for t in found} == {"unknown"} and "another rollout" in found[1].reason


def test_three_steps_in_a_row_that_take_too_long_end_the_run(tmp_path: Path) -> None:
    spec = write(tmp_path, RESET + "def step(self, text):\n    time.sleep(60)\n")
    with pytest.raises(UserError, match=r"step took more than 0.1 s on example 3 .*3 in a row"):
        played(player(spec, CHAT, seconds=0.1), count=4)


def test_an_environment_that_is_done_without_a_reward_has_no_score(tmp_path: Path) -> None:
    (found,) = played(player(write(tmp_path, RESET + "def step(self, text):\n    return '1', None, True\n"), CHAT))
    assert (found.verdict, found.finish) == ("unknown", "stop") and "gave no reward" in found.reason


def test_an_empty_turn_is_handed_on_as_an_empty_text(tmp_path: Path) -> None:
    body = RESET + "def step(self, text):\n    return str(len(text)), 1.0, True\n"
    (found,) = played(player(write(tmp_path, body), CHAT), lambda turn, i: "")
    assert text(found.response_ids) == "$" and found.transcript == (("policy", ""), ("environment", "0"))


def test_an_observation_that_the_tokenizer_can_only_write_as_a_control_token_is_an_error(tmp_path: Path) -> None:
    spec = write(tmp_path, RESET + "def step(self, text):\n    return '1$2', 0.0, False\n")
    error = error_of(spec)
    assert "'$'" in error.problem and "control token" in error.problem and "example 1" in error.problem
    spec = write(tmp_path, RESET + "def step(self, text):\n    return 'forty', 0.0, False\n")
    assert "does not know a character" in error_of(spec).problem


def test_a_first_observation_without_room_for_a_turn_is_an_error(tmp_path: Path) -> None:
    body = "def reset(self, row):\n    return '1' * 300\ndef step(self, text):\n    return None, 1.0, True\n"
    assert "leaves no room for a turn" in error_of(write(tmp_path, body)).problem


CLASSES = {
    "no class": ("# no class \nOwn = 3\n", "'Own' in", "is not a class"),
    "no reset": ("class Own:\n    def step(self, text):\n        pass\n", "has no reset", ""),
    "step without a text": (
        "class Own:\n    def reset(self, row):\n        pass\n    def step(self):\n        pass\n",
        "step cannot be called with text", "",
    ),
    "arguments": (
        "class Own:\n    def __init__(self, x):\n        pass\n    def reset(self, row):\n        pass\n"
        "    def step(self, text):\n        pass\n",
        "without arguments", "",
    ),
    "async": (
        "class Own:\n    def reset(self, row):\n        pass\n    async def step(self, text):\n        pass\n",
        "step is async", "",
    ),
    "a file that fails": ("class Own:\n    x = 1 / 0\n", "cannot be imported", "ZeroDivisionError"),
}  # fmt: skip


@pytest.mark.parametrize("case", CLASSES)
def test_a_class_that_is_no_environment_is_refused_with_what_is_wrong(case: str, tmp_path: Path) -> None:
    body, *expected = CLASSES[case]
    with pytest.raises(UserError) as caught:
        player(write(tmp_path, body), CHAT)
    assert all(words in caught.value.problem for words in expected) and caught.value.field == "environment.path"


def test_a_single_response_is_graded_as_the_only_turn(tmp_path: Path) -> None:
    with player(write(tmp_path, RESET + "def step(self, text):\n    return '1', 1.0, text == 'a'\n"), CHAT) as own:
        found = own.grade_many(["1+1?"] * 2, ["a", "b"], ["2"] * 2, ["", ""])
    assert [(grade.verdict.value, grade.score) for grade in found] == [("right", 1.0), ("unknown", 0.0)]
