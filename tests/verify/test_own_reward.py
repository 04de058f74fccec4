"""Reward functions of the user's own: what they do is told apart from the run, whatever they do."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import thence.verify.own_function as own_function
from thence.errors import UserError
from thence.verify import Grader, Verdict, load_reward

RIGHT, WRONG, UNKNOWN, GRADED = Verdict.RIGHT, Verdict.WRONG, Verdict.UNKNOWN, Verdict.GRADED
HEAD = "def reward(prompt, response, answer):\n"


def written(folder: Path, body: str, top: str = "", after: str = "") -> str:
    """An own reward in a file; its spec. The body is indented here."""
    file = folder / "own.py"
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    file.write_text(f"{top}\n{HEAD}{lines}{after}\n")
    return f"{file}:reward"


def graded(spec: str, responses: list[str], **limits) -> list:
    with load_reward(spec, **limits) as grader:
        return grader.grade_many([f"prompt {i}" for i in range(len(responses))], responses, ["1"] * len(responses))


def error_of(spec: str, responses: list[str] | None = None, **limits) -> UserError:
    with pytest.raises(UserError) as caught:
        graded(spec, responses or ["fine", "bad"], **limits)
    return caught.value


# What ends a process ends the function's, and is its error.

ENDINGS = {
    "sys.exit(0)": ("import sys", "sys.exit(0)", "called sys.exit(0)"),
    "sys.exit()": ("import sys", "sys.exit()", "called sys.exit()"),
    "sys.exit with a text": ("import sys", "sys.exit('no\\x1b[2J')", "called sys.exit('no"),
    "SystemExit": ("", "raise SystemExit", "called sys.exit()"),
    "os._exit(0)": ("import os", "os._exit(0)", "ended its process (exit code 0)"),
    "a signal": ("import os", "os.kill(os.getpid(), 9)", "ended its process (SIGKILL)"),
    "a crash in C": ("import ctypes", "ctypes.string_at(0)", "ended its process (SIGSEGV)"),
    "KeyboardInterrupt": ("", "raise KeyboardInterrupt", "raised KeyboardInterrupt"),
    "endless recursion": ("", "return reward(prompt, response, answer)", "raised RecursionError"),
    "no memory": ("", "return len(bytearray(10**15))", "raised MemoryError"),
    "an error without a text": ("", "raise ValueError", "raised ValueError"),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_a_function_that_ends_its_process_is_named_and_does_not_end_ours(case: str, tmp_path: Path) -> None:
    top, body, said = ENDINGS[case]
    spec = written(tmp_path, f"if response == 'bad':\n    {body}\nreturn 1.0", top)
    error = error_of(spec)
    assert f"reward function {spec} {said}" in error.problem
    assert "response 2 of the batch (prompt 'prompt 1', response 'bad')" in error.problem
    assert "\x1b" not in str(error)
    assert error.remedy
    if "ended its process" not in said:
        assert (error.file, error.line) == (str(tmp_path / "own.py"), 4)


def test_the_line_that_is_named_is_the_users_own(tmp_path: Path) -> None:
    error = error_of(written(tmp_path, "import json\nreturn json.loads(response)"))
    assert (error.file, error.line) == (str(tmp_path / "own.py"), 4)
    assert "JSONDecodeError on response 1" in error.problem and "Expecting value" in error.problem


@pytest.mark.parametrize(
    ("top", "said"),
    [
        ("import sys\nsys.exit(0)", "it called sys.exit(0)"),
        ("import os\nos._exit(0)", "its process ended (exit code 0)"),
        ("raise KeyError('gone')", "KeyError: 'gone'"),
    ],
)
def test_a_file_that_ends_the_process_when_it_is_imported(top: str, said: str, tmp_path: Path) -> None:
    spec = written(tmp_path, "return 1.0", top)
    error = error_of(spec)
    assert f"reward {spec} cannot be imported" in error.problem and said in error.problem
    if "its process" not in said:
        assert (error.file, error.line) == (str(tmp_path / "own.py"), len(top.splitlines()))


def test_a_command_is_not_done_when_its_reward_calls_exit(tmp_path: Path) -> None:
    spec = written(tmp_path, "sys.exit(0)", "import sys")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'folder = "{tmp_path / "run"}"\nstages = ["rl"]\n[model]\npath = "world:chain/rich"\n[data]\nlimit = 4\n'
        f'[rl]\nreward = "{spec}"\nsteps = 1\nprompts = 2\nrollouts = 2\nmax_tokens = 4\n'
    )
    command = [sys.executable, "-m", "thence", "run", str(recipe), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "called sys.exit(0)" in done.stdout + done.stderr


# Time.


def test_a_response_that_takes_too_long_is_unknown_and_the_others_are_graded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = written(tmp_path, "while response == 'slow':\n    pass\nreturn 1.0")
    with caplog.at_level(logging.WARNING, "thence"):
        grades = graded(spec, ["a", "slow", "b", "slow", "c"], seconds=0.5)
    assert [grade.verdict for grade in grades] == [RIGHT, UNKNOWN, RIGHT, UNKNOWN, RIGHT]
    assert grades[1].reason == "time limit: the reward function took more than 0.5 s"
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    for part in (spec, "0.5 s", "response 2 of the batch", "reward_seconds"):
        assert part in told[0]


def test_a_function_that_never_answers_is_an_error(tmp_path: Path) -> None:
    spec = written(tmp_path, "time.sleep(1000)", "import time")
    start = time.monotonic()
    error = error_of(spec, ["x"] * 100, seconds=0.3)
    assert time.monotonic() - start < 20
    assert f"{spec} took more than 0.3 s on 3 responses in a row" in error.problem
    assert "prompt 'prompt 2'" in error.problem and "raise reward_seconds" in error.remedy


def test_no_trick_of_the_function_stops_the_clock(tmp_path: Path) -> None:
    # one multiplication in C, a handler for every signal, and an `except` for everything
    body = "while True:\n    try:\n        10 ** (10 ** 9)\n    except BaseException:\n        pass"
    top = "import signal\nfor number in (2, 14, 15):\n    signal.signal(number, signal.SIG_IGN)"
    assert "took more than" in error_of(written(tmp_path, body, top), ["x"], seconds=0.3, slow_in_a_row=1).problem


def test_a_file_that_never_ends_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_function, "LOAD_SECONDS", 0.5)
    error = error_of(written(tmp_path, "return 1", "while True: pass"), seconds=0.2)
    assert "still being loaded after 0.5 s" in error.problem and "reward_seconds" in error.remedy


def pids(name: str) -> list[int]:
    """Processes that have this text in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if name in path.read_bytes().decode(errors="replace") and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def none_left(name: str) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if not pids(name):
            return True
        time.sleep(0.05)
    return False


DRIVER = """
import sys
from thence.verify import load_reward
with load_reward(sys.argv[1]) as grader:
    print("ready", flush=True)
    grader.grade_many(["p"], ["r"], ["a"])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_function_ends_with_its_run_in_the_middle_of_a_call(number: int, tmp_path: Path) -> None:
    spec = written(tmp_path, "time.sleep(1000)", "import time")
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, spec], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert driver.stdout is not None and driver.stdout.readline() == b"ready\n"
    time.sleep(0.2)
    driver.send_signal(number)
    _, said = driver.communicate(timeout=20)
    assert driver.returncode not in (0, None)
    assert none_left(spec)
    if number == signal.SIGINT:
        assert b"KeyboardInterrupt" in said


# What a function may rely on.


def test_a_function_keeps_its_state_and_is_called_in_order(tmp_path: Path) -> None:
    body = "calls.append(response)\nreturn len(calls) + 10 * calls.index(response)"
    spec = written(tmp_path, body, "calls = []")
    with load_reward(spec) as grader:
        first = grader.grade_many(["p"] * 3, ["a", "b", "c"], [None] * 3)
        second = grader.grade_many(["p"] * 2, ["a", "d"], [None] * 2)
    assert [grade.score for grade in first + second] == [1, 12, 23, 4, 45]


def test_what_a_function_prints_and_reads_does_no_harm(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = "print('said')\nos.write(1, b'raw\\n')\nos.system('echo child')\nsys.stdin.read()\nreturn 1.0"
    assert graded(written(tmp_path, body, "import os, sys\nprint('loaded')"), ["r"])[0].verdict is RIGHT
    out, err = capfd.readouterr()
    assert out == ""
    assert {"loaded", "said", "raw", "child"} <= set(err.split())


def test_a_function_sees_the_same_folder_environment_and_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "helper.py").write_text("def level():\n    return 1.0\n")
    (tmp_path / "here.txt").write_text("1")
    written(tmp_path, "return helper.level() * float(open('here.txt').read()) * float(os.environ['LEVEL'])")
    source = (tmp_path / "own.py").read_text()
    (tmp_path / "own.py").write_text(f"import os, helper\n{source}")
    monkeypatch.syspath_prepend(tmp_path / "beside")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEVEL", "1")
    for spec in ("own.py:reward", "own:reward"):
        assert graded(spec, ["r"])[0].verdict is RIGHT


def test_any_text_reaches_the_function(tmp_path: Path) -> None:
    texts = ["", "\ud800", "\x00\n", "ü𝔘", "x" * 3_000_000]
    grades = graded(written(tmp_path, "return len(response)", "", "reward.right_from = 0"), texts[:4])
    assert [grade.score for grade in grades] == [len(text) for text in texts[:4]]
    assert graded(written(tmp_path, "return len(response) / 1000"), texts[4:])[0].score == 3000


def test_what_the_function_registered_for_its_end_is_done(tmp_path: Path) -> None:
    top = f"import atexit, pathlib\natexit.register(lambda: pathlib.Path({str(tmp_path / 'left')!r}).write_text('yes'))"
    graded(written(tmp_path, "return 1.0", top), ["r"])
    assert (tmp_path / "left").read_text() == "yes"


def test_nothing_of_a_module_runs_in_our_process_to_find_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from thence.evaluate.run import grader_version
    from thence.pipeline.ground import _reward_file

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "mine" / "rewards.py").write_text(f"{HEAD}    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert _reward_file("mine.rewards:reward") == [str(tmp_path / "mine" / "rewards.py")]
    assert grader_version("mine.rewards:reward").startswith("sha256 ")
    assert "sys.exit(0)" in error_of("mine.rewards:reward").problem


# Scores.

ALLOWED = {
    "True": (True, RIGHT, 1.0),
    "False": (False, WRONG, 0.0),
    "1": (1, RIGHT, 1.0),
    "0.0": (0.0, WRONG, 0.0),
    "-0.0": (-0.0, WRONG, 0.0),
    "0.1": (0.1, GRADED, 0.1),
    "-1": (-1, GRADED, -1.0),
    "1.0000001": (1.0000001, GRADED, 1.0000001),
    "-1e6": (-1e6, GRADED, -1e6),
    "fractions.Fraction(1, 2)": (0.5, GRADED, 0.5),
    "numpy.float32(0.5)": (0.5, GRADED, 0.5),
    "numpy.bool_(True)": (True, RIGHT, 1.0),
    "None": (None, UNKNOWN, 0.0),
}


def test_scores_that_are_numbers_are_taken_and_only_0_and_1_are_verdicts(tmp_path: Path) -> None:
    spec = written(tmp_path, "return eval(response)", "import fractions, numpy")
    grades = graded(spec, list(ALLOWED))
    for grade, (text, (_, verdict, score)) in zip(grades, ALLOWED.items(), strict=True):
        assert (grade.verdict, grade.score) == (verdict, score), text


REFUSED = {
    "1e308": "returned 1e+308",
    "-1000001": "returned -1e+06",
    "10**400": "returned 1000",
    "float('nan')": "returned nan",
    "float('inf')": "returned inf",
    "'1.0'": "returned '1.0'",
    "b'1'": "returned b'1'",
    "[1.0]": "returned [1.0]",
    "1j": "returned 1j (complex)",
    "numpy.ones(2)": "returned array([1., 1.]) (ndarray)",
    "object()": "returned <object object",
    "wrong()": "returned a value that cannot be shown (ValueError) (wrong)",
    "late()": "coroutine, which has to be awaited",
}


def test_scores_that_are_no_sane_number_are_the_functions_error(tmp_path: Path) -> None:
    top = "import numpy\nclass wrong:\n    def __repr__(self): raise ValueError\nasync def late(): pass"
    spec = written(tmp_path, "return eval(response)", top)
    with load_reward(spec) as grader:
        for response, said in REFUSED.items():
            with pytest.raises(UserError) as caught:
                grader.grade_many(["a prompt"], [response], [None])
            problem = caught.value.problem
            assert problem.startswith(f"reward function {spec} ") and said in problem, problem
            assert "(prompt 'a prompt', response" in problem


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("async def reward(p, r, a):\n    return 1.0\n", "is async def"),
        ("def reward(p, r, a):\n    yield 1.0\n", "is a generator"),
        (f"{HEAD}    return 1.0\nreward.right_from = 'high'\n", "right_from of reward .* is 'high'"),
        (f"{HEAD}    return 1.0\nreward.right_from = True\n", "right_from of reward .* is True"),
        (f"{HEAD}    return 1.0\nreward.right_from = float('nan')\n", "right_from of reward .* is nan"),
    ],
)
def test_functions_that_cannot_be_used_are_refused_when_loaded(lines: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(lines)
    with pytest.raises(UserError, match=said):
        load_reward(f"{tmp_path / 'own.py'}:reward")


def test_a_function_of_the_running_script_is_explained() -> None:
    with pytest.raises(UserError, match="move it into a separate file"):
        load_reward("__main__:reward")


# Who is right.


@pytest.mark.parametrize(
    ("after", "right_from", "verdicts"),
    [
        ("", None, [WRONG, GRADED, GRADED, RIGHT]),
        ("reward.right_from = 0.5", None, [WRONG, WRONG, RIGHT, RIGHT]),
        ("reward.right_from = 0.5", 0.2, [WRONG, RIGHT, RIGHT, RIGHT]),
        ("", 1, [WRONG, WRONG, WRONG, RIGHT]),
        ("reward.right_from = None", None, [GRADED] * 4),
        ("reward.right_from = None", 0.5, [WRONG, WRONG, RIGHT, RIGHT]),
    ],
)
def test_right_follows_from_the_threshold_that_is_stated(
    after: str, right_from: float | None, verdicts: list[Verdict], tmp_path: Path
) -> None:
    spec = written(tmp_path, "return float(response)", after=after)
    grades = graded(spec, ["0", "0.25", "0.5", "1"], right_from=right_from)
    assert [grade.verdict for grade in grades] == verdicts
    assert [grade.score for grade in grades] == [0, 0.25, 0.5, 1]


def test_a_threshold_is_for_own_functions_only() -> None:
    with pytest.raises(UserError, match="says by itself which responses are right"):
        load_reward("math", right_from=0.5)


def test_graders_that_are_closed_are_closed(tmp_path: Path) -> None:
    grader: Grader = load_reward(written(tmp_path, "return 1.0"))
    grader.close()
    grader.close()
    with pytest.raises(ValueError, match="closed"):
        grader.grade_many(["p"], ["r"], [None])
