"""The pool of graders: hostile answers, dying workers, order, time and memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.verify.verdicts import RIGHT, UNKNOWN, WRONG, verdict
from thence.errors import UserError
from thence.framed import Inbox, pack
from thence.verify import Grade, GradeRequest, GradingPool, count
from thence.verify.pool import MAX_CHARS

TOWER = "The answer is $9^{9^{9^{9}}}$"  # one multiplication in C that no exception can interrupt
EXPANSION = r"\boxed{(x+y+z+w+v)^{400}}"  # a billion terms
HOSTILE = [
    TOWER,
    r"\boxed{" + "(" * 20_000 + "1" + ")" * 20_000 + "}",
    r"\boxed{" + r"\frac{1}{" * 2_000 + "2" + "}" * 2_000 + "}",
    "{" * 1_000_000,
    r"\boxed{\binom{10^9}{5*10^8}}",
]


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state in "ZX"


def until(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


# Hostile answers, limits, dying workers -----------------------------------------------------------------------------


def test_hostile_answers_cost_only_themselves(pool: GradingPool) -> None:
    items, expected = [], []
    for i, hostile in enumerate(HOSTILE):
        items += [GradeRequest(hostile, "4"), GradeRequest(rf"\boxed{{{i}}}", str(i)), GradeRequest(r"\boxed{-1}", "7")]
        expected += [None, RIGHT, WRONG]
    start = time.monotonic()
    grades = pool.grade_many(items)
    assert time.monotonic() - start < len(HOSTILE) * (pool.seconds + 5)  # 5 s: a fresh worker on a busy machine
    for grade, wanted in zip(grades, expected, strict=True):
        assert grade.verdict is wanted if wanted else grade.verdict is not RIGHT
    assert grades[0] == Grade(UNKNOWN, 0.0, None, "time limit")


@pytest.mark.slow
def test_too_much_memory_is_unknown_and_the_pool_goes_on() -> None:
    with GradingPool(workers=1, seconds=60, memory_mb=192) as pool:
        first, second = pool.grade_many([GradeRequest(EXPANSION, "4"), GradeRequest(r"\boxed{4}", "4")])
    assert (first.verdict, first.reason) == (UNKNOWN, "memory")
    assert second.verdict is RIGHT


def test_order_is_kept_though_some_take_long(pool: GradingPool) -> None:
    answers = [str(i % 7) for i in range(60)]
    responses = [rf"\boxed{{{a}}}" if i % 3 else r"\boxed{9}" for i, a in enumerate(answers)]
    responses[10] = TOWER
    grades = pool.grade_many([GradeRequest(r, a) for r, a in zip(responses, answers, strict=True)])
    expected = [RIGHT if i % 3 else WRONG for i in range(60)]
    expected[10] = UNKNOWN
    assert [grade.verdict for grade in grades] == expected
    assert count(grades) == {"right": 39, "wrong": 20, "unknown": 1}


@pytest.mark.slow
def test_one_hanging_answer_does_not_hold_up_the_other_worker() -> None:
    with GradingPool(workers=2, seconds=4.0) as pool:
        assert count(pool.grade_many([GradeRequest("$1$", "1")] * 20))["right"] == 20
        start = time.monotonic()
        grades = pool.grade_many([GradeRequest(TOWER, "4"), GradeRequest(TOWER, "4")])
        assert time.monotonic() - start < 7.5  # one after the other would take 8 s
        assert count(grades)["unknown"] == 2


def test_a_killed_worker_costs_one_answer() -> None:
    with GradingPool(workers=1, seconds=30.0) as pool:
        assert verdict(pool, r"\boxed{4}", "4") is RIGHT
        victim = pool.pids[0]
        threading.Timer(0.5, os.kill, (victim, signal.SIGKILL)).start()
        grades = pool.grade_many([GradeRequest(TOWER, "4"), GradeRequest(r"\boxed{4}", "4")])
        assert grades[0] == Grade(UNKNOWN, 0.0, None, "grading process ended (SIGKILL)")
        assert grades[1].verdict is RIGHT

        idle = pool.pids[0]
        assert idle != victim
        os.kill(idle, signal.SIGKILL)
        assert until(lambda: gone(idle))
        assert verdict(pool, r"\boxed{4}", "4") is RIGHT  # a worker that died between calls costs nothing


def test_a_very_long_response_is_graded_by_its_tail(pool: GradingPool) -> None:
    long = r"\boxed{5} " + "word " * 100_000
    head, tail, thought = pool.grade_many(
        [
            GradeRequest(long, "5"),
            GradeRequest(long + r"\boxed{4}", "4"),
            GradeRequest("thought " * 100_000 + r"</think>\boxed{4}", "4", "after_think"),
        ]
    )
    assert head.verdict is WRONG
    assert tail.verdict is RIGHT and str(MAX_CHARS) in tail.reason
    assert thought.verdict is RIGHT and thought.reason == ""  # cut after the rule is applied, so nothing is lost


def test_any_unicode_gets_through(pool: GradingPool) -> None:
    assert verdict(pool, "\ud800 \U0001f600 \x00 答えは \\boxed{4}", "4") is RIGHT


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="at least 192"):
        GradingPool(memory_mb=16)
    with pytest.raises(UserError, match="positive"):
        GradingPool(seconds=0)
    with pytest.raises(UserError, match="at least one"):
        GradingPool(workers=0)


def test_a_closed_pool_leaves_no_process_and_says_that_it_is_closed() -> None:
    pool = GradingPool(workers=2, seconds=5)
    pool.grade_many([GradeRequest("$1$", "1")] * 4)
    pids = pool.pids
    assert len(pids) == 2
    pool.close()
    pool.close()
    assert all(gone(pid) for pid in pids)
    with pytest.raises(ValueError, match="closed"):
        pool.grade_many([])


PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with SIGINT ignored
from thence.verify import GradeRequest, GradingPool
pool = GradingPool(workers=2, seconds=float(sys.argv[1]))
pool.grade_many([GradeRequest("$1$", "1")] * 4)
print(*pool.pids, flush=True)
if sys.argv[2] == "busy":
    pool.grade_many([GradeRequest("$9^{9^{9^9}}$", "1"), GradeRequest("$1$", "1")])
elif sys.argv[2] == "wait":
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("seconds", "state", "end"),
    [
        (100.0, "leave", None),
        (100.0, "busy", signal.SIGINT),
        (100.0, "wait", signal.SIGKILL),  # idle workers see the end of their input
        # Nobody is left to enforce the limit: the worker's own alarm has to.
        pytest.param(1.0, "busy", signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_workers_end_with_their_parent(seconds: float, state: str, end: signal.Signals | None) -> None:
    command = [sys.executable, "-c", PARENT, str(seconds), state]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        if end is not None:
            time.sleep(0.3)
            parent.send_signal(end)
        parent.wait(timeout=10)
        assert until(lambda: all(gone(pid) for pid in pids))


def test_after_an_interruption_the_pool_starts_clean() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with GradingPool(workers=1, seconds=30) as pool:
        assert verdict(pool, "$1$", "1") is RIGHT
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            with pytest.raises(KeyboardInterrupt):
                pool.grade_many([GradeRequest(TOWER, "1")] * 2)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        start = time.monotonic()
        grades = pool.grade_many([GradeRequest("$1$", "1"), GradeRequest("$2$", "1")])
        assert [grade.verdict for grade in grades] == [RIGHT, WRONG]
        assert time.monotonic() - start < 15  # it does not wait for the answer that nobody asks for any more


def test_a_pool_whose_workers_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken install')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with GradingPool(workers=1) as pool, pytest.raises(UserError, match=r"broken install[\s\S]*import math_verify"):
        pool.grade_many([GradeRequest("$1$", "1")])


def test_workers_see_no_tokens_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with GradingPool(workers=1) as pool:
        pool.grade_many([GradeRequest("$1$", "1")])
        assert b"hf_secret" not in Path(f"/proc/{pool.pids[0]}/environ").read_bytes()


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers())), st.integers(1, 9))
def test_messages_survive_any_cutting(messages: list[dict], size: int) -> None:
    stream = b"".join(pack(message) for message in messages)
    inbox = Inbox()
    pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
    assert [message for piece in pieces for message in inbox.feed(piece)] == messages
