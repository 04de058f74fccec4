"""Servers that answer some requests and not others: nothing is lost, stopped or counted wrong."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.answering_server import TASK, Answer, Server, backend_for, failed, requests_of, said
from tests.evaluate.asking import TOO_LONG, Evaluation, asked, short
from thence.cli import main
from thence.errors import UserError
from thence.evaluate.backends import Generation, Refused
from thence.evaluate.store import Store
from thence.evaluate.summary import compare_evaluations


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (failed(400, TOO_LONG), "too long"),
        (failed(413, "Payload Too Large"), "too long"),
        ((422, {}, json.dumps({"detail": "prompt exceeds the context window"})), "too long"),
        (failed(400, "The response was filtered due to Azure's content management policy"), "filtered"),
        (failed(400, "odd characters"), "refused"),
        (said("half a", finish="content_filter"), "filtered"),
        ((200, {}, json.dumps({"error": {"code": 400, "message": TOO_LONG}})), "too long"),
        (failed(500, "CUDA error"), "failed"),
        ((200, {"Content-Type": "text/html"}, "<html><title>Busy</title></html>"), "failed"),
        ((200, {}, "[" * 50_000), "failed"),
    ],
    ids=short,
)
@pytest.mark.parametrize("concurrency", ["1", "4"])
def test_one_problem_that_cannot_be_asked_is_counted_apart_and_the_suite_continues(
    evaluation: Evaluation, capsys: pytest.CaptureFixture[str], refusal: Answer, kind: str, concurrency: str
) -> None:
    code = evaluation.run(lambda i: refusal if i == 0 else None, "--concurrency", concurrency)
    out, err = capsys.readouterr()
    assert code == 1 and "1 problem was not answered" in err
    row = evaluation.row
    assert (len(row.shares), row.expected, row.missing, row.avg.value) == (7, 8, 0, 1.0)
    assert list(row.not_answered_kinds) == [kind] and len(row.not_answered) == 1
    text = " ".join(out.split())
    assert "7 of 8" in text and f"1 of 8 problems were not answered ({kind} 1)" in text
    found = json.loads((evaluation.folder / "results.json").read_text())
    assert found["thence"]["not_answered"] == 1 and found["n-samples"]["sums"] == {"original": 8, "effective": 7}
    (reason,) = found["thence"]["tasks"][0]["not_answered"].values()
    with (evaluation.folder / "results.csv").open() as file:
        assert next(csv.DictReader(file))["not_answered"] == "1"
    page = (evaluation.folder / "report.html").read_text()
    assert '<h2 id="not-answered">Not answered</h2>' in page and "0000+0=?" in page and reason[:20] in text


def test_what_was_refused_is_asked_again_and_the_rest_is_not(
    evaluation: Evaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluation.run(lambda i: failed(400, TOO_LONG) if i in (2, 5) else None) == 1
    seen = len(evaluation.server.seen)
    assert evaluation.run(lambda i: failed(400, TOO_LONG) if i == 5 else None) == 1
    assert sorted(asked(body) for _, body, _ in evaluation.server.seen[seen:]) == [2, 5]
    capsys.readouterr()
    assert evaluation.run() == 0
    assert "not answered" not in "".join(capsys.readouterr())
    assert (len(evaluation.row.shares), evaluation.row.missing, evaluation.row.not_answered) == (8, 0, {})
    assert evaluation.run(lambda i: failed(500)) == 0  # nothing is left to ask


def test_problems_that_a_server_cannot_answer_do_not_stop_the_same_command_for_ever(evaluation: Evaluation) -> None:
    bad = (0, 1, 2, 4, 5, 6)
    for refusal in (failed(400, TOO_LONG), failed(500, "CUDA error")):
        assert evaluation.run(lambda i, refusal=refusal: refusal if i in bad else None) == 1
        assert evaluation.run(lambda i, refusal=refusal: refusal if i in bad else None) == 1
        assert len(evaluation.row.not_answered) == 6 and len(evaluation.row.shares) == 2


def test_a_server_that_refuses_all_the_rest_is_said_too(
    evaluation: Evaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluation.run(lambda i: failed(401) if i == 1 else None) == 2
    capsys.readouterr()
    assert evaluation.run(lambda i: failed(400, "the adapter is gone")) == 2
    assert "none of the first 5 requests was answered" in capsys.readouterr().err
    assert evaluation.run() == 0 and len(evaluation.row.shares) == 8


def test_requests_wait_for_their_turn_while_a_busy_server_answers_others(server: Server) -> None:
    last = [0.0]

    def one_at_a_time(count: int, path: str, body: dict[str, Any]) -> Answer:
        now = time.monotonic()
        with server.lock:
            free = now - last[0] > 0.02
            last[0] = now if free else last[0]
        return said("4") if free else failed(429, "slow down")

    server.answer = one_at_a_time
    found = list(backend_for(server, concurrency=8, pause=0.008, tries=4).generate(requests_of(20), TASK))
    assert all(isinstance(generation, Generation) for _, generation in found) and len(found) == 20


def test_a_server_that_fails_on_the_first_three_problems_stops_once_and_not_for_ever(evaluation: Evaluation) -> None:
    codes = [evaluation.run(lambda i: failed(500, "CUDA error") if i < 3 else None) for _ in range(3)]
    assert codes == [2, 1, 1] and len(evaluation.row.shares) == 5 and len(evaluation.row.not_answered) == 3


@pytest.mark.parametrize(("problems", "requests"), [(8, 5), (3, 3)])
def test_a_server_that_refuses_everything_is_said_and_nothing_is_measured(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], problems: int, requests: int
) -> None:
    evaluation = Evaluation(server, tmp_path, problems)
    assert evaluation.run(lambda i: failed(400, f"max_tokens is too large: {TOO_LONG}")) == 2
    err = capsys.readouterr().err
    assert f"none of the first {requests} requests was answered" in err and "lower --max-tokens" in err
    assert TOO_LONG in err and requests <= len(server.seen) <= requests + 3
    assert evaluation.run() == 0 and len(evaluation.row.shares) == problems


def test_the_shortest_prompt_is_asked_first(server: Server, tmp_path: Path) -> None:
    evaluation = Evaluation(server, tmp_path, 7)
    long = [json.dumps({"question": f"{i:04d}+{i}=?" + " " * 50 + "x", "answer": str(2 * i)}) for i in range(6)]
    evaluation.data.write_text("\n".join([*long, json.dumps({"question": "0006+6=?", "answer": "12"})]) + "\n")
    assert evaluation.run(lambda i: failed(400, TOO_LONG) if i != 6 else None) == 1
    assert len(evaluation.row.not_answered) == 6 and evaluation.row.avg.value == 1.0


@pytest.mark.parametrize("status", [401, 403, 404, 405, 308])
def test_what_concerns_every_request_stops_at_once(
    evaluation: Evaluation, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    assert evaluation.run(lambda i: failed(status, "all of you") if i == 3 else None) == 2
    assert f"HTTP {status}" in capsys.readouterr().err
    assert len(Store(evaluation.folder).samples("sums")) == 3 and len(evaluation.server.seen) == 4


def test_a_problem_of_which_some_samples_are_refused_is_not_counted(evaluation: Evaluation) -> None:
    count = [0]

    def refuse(i: int) -> Answer | None:
        count[0] += i == 3
        return failed(400, "flagged by moderation") if i == 3 and count[0] == 2 else None

    assert evaluation.run(refuse, "--samples", "3") == 1
    row = evaluation.row
    assert (len(row.shares), row.missing, len(row.not_answered)) == (7, 0, 1)
    assert len(Store(evaluation.folder).samples("sums")) == 23


def test_a_damaged_record_of_refusals_only_asks_again(evaluation: Evaluation) -> None:
    assert evaluation.run(lambda i: failed(400, TOO_LONG) if i == 2 else None) == 1
    path = evaluation.folder / "refused" / "sums.jsonl"
    path.write_bytes(b'\xff\n3\n{"problem": []}\n[[[\n')
    assert evaluation.row.missing == 1
    assert evaluation.run(lambda i: failed(400, TOO_LONG) if i == 2 else None) == 1
    assert (evaluation.row.missing, len(evaluation.row.not_answered)) == (0, 1)


def test_comparing_leaves_out_what_one_of_them_was_not_answered(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stores = []
    for name, missing, wrong in (("a", 1, 4), ("b", 2, 5)):
        (tmp_path / name).mkdir()
        evaluation = Evaluation(server, tmp_path / name)
        evaluation.run(
            lambda i, missing=missing, wrong=wrong: (
                failed(400, TOO_LONG) if i == missing else said("#no") if i == wrong else None
            )
        )
        stores.append(Store(evaluation.folder))
    found = compare_evaluations(*stores)
    assert found.rows[0].paired.problems == 6 and found.rows[0].a == found.rows[0].b == pytest.approx(5 / 6)
    capsys.readouterr()
    assert main(["eval", "--compare", *(str(store.folder) for store in stores)]) == 0
    assert "problems not answered" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("status", "words"), [(400, "Unsupported parameter: 'seed'"), (422, "seed: Extra inputs")])
def test_a_server_that_refuses_seeds_is_asked_without_and_that_is_recorded(
    evaluation: Evaluation, capsys: pytest.CaptureFixture[str], status: int, words: str
) -> None:
    def answer(count: int, path: str, body: dict[str, Any]) -> Answer:
        return failed(status, words) if "seed" in body else said(f"#{2 * asked(body)}")

    evaluation.server.answer = answer
    assert evaluation.again() == 0
    assert len(evaluation.server.seen) == 9 and evaluation.row.avg.value == 1.0
    assert "refuses 'seed'" in " ".join(capsys.readouterr().out.split())
    facts = Store(evaluation.folder).environment()
    assert facts["not_sent"] == ["seed"] and "refused by the server" in facts["seeds"]


def test_everything_that_says_no_more_than_its_absence_may_be_left_out(server: Server) -> None:
    def answer(count: int, path: str, body: dict[str, Any]) -> Answer:
        unknown = [name for name in ("seed", "n", "stream", "top_p", "max_tokens") if name in body]
        words = f"'{unknown[0]}' is not supported" if unknown else ""
        return failed(400, words.replace("'max_tokens'", "use max_completion_tokens")) if unknown else said("4")

    server.answer = answer
    backend = backend_for(server, concurrency=1)
    found = list(backend.generate(requests_of(2), TASK.model_copy(update={"top_p": 1.0})))
    assert [generation.text for _, generation in found if isinstance(generation, Generation)] == ["4", "4"]
    assert len(server.seen) == 5 + 2
    # what changes the distribution is not left out
    (_, refused), *_ = backend_for(server, concurrency=1).generate(requests_of(1), TASK)
    assert isinstance(refused, Refused) and "top_p" in refused.reason


def test_a_long_prompt_about_seeds_does_not_cost_the_others_their_seed(server: Server) -> None:
    server.answer = lambda n, path, body: failed(400, "your text on a seed is too long") if n <= 2 else said("4")
    backend = backend_for(server, concurrency=1)
    found = [generation for _, generation in backend.generate(requests_of(2), TASK)]
    assert isinstance(found[0], Refused) and found[0].kind == "too long"
    assert "seed" in server.seen[2][1] and "not_sent" not in backend.facts()


def test_other_ends_are_shown_beside_the_table(evaluation: Evaluation, capsys: pytest.CaptureFixture[str]) -> None:
    ends = {1: said("", finish="tool_calls"), 2: said("#4", finish=""), 3: said("\x1b", finish="\x1b[2J")}
    assert evaluation.run(ends.get) == 0
    out = capsys.readouterr().out
    assert "not told 1, tool_calls 1" in " ".join(out.split()) and "\x1b" not in out
    assert evaluation.row.other_ends == {"not told": 1, "tool_calls": 1, "\\x1b[2j": 1}


@pytest.mark.parametrize("value", ["NaN", "inf", "1e400", "-5", "Fri, 31 Dec 9999 23:59:59 GMT", "99999999", "x"])
def test_no_retry_after_makes_a_request_wait_for_ever(server: Server, monkeypatch: Any, value: str) -> None:
    monkeypatch.setattr("thence.evaluate.endpoint.LONGEST_WAIT", 0.05)
    server.answer = lambda n, path, body: failed(429, **{"Retry-After": value}) if n == 1 else said("4")
    ((_, found),) = backend_for(server).generate(requests_of(1), TASK)
    assert isinstance(found, Generation)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_time_limit_that_is_none_is_refused(server: Server, seconds: float) -> None:
    with pytest.raises(UserError, match="--timeout"):
        backend_for(server, seconds=seconds)
