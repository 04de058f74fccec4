"""The endpoint backend against a server of the tests' own: correct, busy, broken, slow, dying."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.answering_server import TASK, Answer, Server, backend_for, failed, requests_of, said
from thence.cli import main
from thence.errors import UserError
from thence.evaluate.backends import Generation
from thence.evaluate.endpoint import EndpointBackend, EndpointSettings
from thence.evaluate.store import Store


def test_a_request_says_everything_that_the_task_asks_for(server: Server) -> None:
    found = list(backend_for(server).generate(requests_of(1), TASK))
    path, body, headers = server.seen[0]
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "2+2=?"}]
    asked = {name: body[name] for name in ("model", "temperature", "top_p", "max_tokens", "seed")}
    assert asked == {"model": "tiny", "temperature": 0.5, "top_p": 0.9, "max_tokens": 64, "seed": 2**62 % 2**31}
    assert "Authorization" not in headers
    assert found[0][1] == Generation("4", 5, "stop")


def test_the_key_is_sent_and_kept_nowhere(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret-value")
    backend = backend_for(server, key_variable="MY_KEY")
    list(backend.generate(requests_of(1), TASK))
    assert server.seen[0][2]["Authorization"] == "Bearer secret-value"
    assert "secret-value" not in json.dumps(backend.facts())


def test_several_requests_are_under_way_and_every_one_is_answered(server: Server) -> None:
    def slow(count: int, path: str, body: dict[str, Any]) -> Answer:
        time.sleep(0.05)
        return said(str(body["seed"]))

    server.answer = slow
    found = list(backend_for(server, concurrency=8).generate(requests_of(24), TASK))
    assert 2 <= server.most_busy <= 8
    assert {request.problem.key: generation.text for request, generation in found} == {
        request.problem.key: str(request.seed % 2**31) for request in requests_of(24)
    }


@pytest.mark.parametrize("trouble", ["429", "500", "wrong JSON", "no choice", "cut", "slow"])
def test_passing_trouble_is_tried_again(server: Server, trouble: str) -> None:
    def answer(count: int, path: str, body: dict[str, Any]) -> Answer | None:
        if count % 2 == 0:
            return said("4")
        if trouble == "cut":
            return None
        if trouble == "slow":
            time.sleep(1.2)
        broken = {"wrong JSON": "<html>busy</html>", "no choice": '{"choices": []}'}
        return (200, {}, broken[trouble]) if trouble in broken else failed(int(trouble) if trouble.isdigit() else 503)

    server.answer = answer
    backend = backend_for(server, concurrency=1, seconds=0.6 if trouble == "slow" else 5.0)
    assert [generation.text for _, generation in backend.generate(requests_of(2), TASK)] == ["4", "4"]
    assert len(server.seen) == 4


def test_the_servers_own_waiting_time_is_kept(server: Server) -> None:
    server.answer = lambda n, path, body: failed(429, **{"Retry-After": "0.3"}) if n == 1 else said("4")
    start = time.monotonic()
    list(backend_for(server).generate(requests_of(1), TASK))
    assert time.monotonic() - start >= 0.3


def test_lasting_trouble_stops_and_what_was_answered_is_yielded(server: Server) -> None:
    server.answer = lambda n, path, body: said("4") if n <= 3 else failed(500, "out of memory")
    kept = []
    with pytest.raises(UserError, match="failed 3 times in a row: HTTP 500: out of memory"):
        for pair in backend_for(server, concurrency=1).generate(requests_of(9), TASK):
            kept.append(pair)
    assert [isinstance(found, Generation) for _, found in kept] == [True] * 3 + [False] * 2
    assert len(server.seen) == 3 + 3 * 3


@pytest.mark.parametrize(("status", "remedy"), [(405, "what the server objects to"), (401, "MY_KEY"), (404, "/v1")])
def test_a_refusal_of_everything_is_not_tried_again(server: Server, status: int, remedy: str) -> None:
    server.answer = lambda n, path, body: failed(status, "because")
    with pytest.raises(UserError, match="because") as caught:
        list(backend_for(server, key_variable="MY_KEY", concurrency=1).generate(requests_of(3), TASK))
    assert remedy in caught.value.remedy and len(server.seen) == 1


def test_a_server_that_wants_the_newer_name_of_the_limit_gets_it(server: Server) -> None:
    server.answer = lambda n, path, body: (
        failed(400, "use max_completion_tokens") if "max_tokens" in body else said("4")
    )
    found = list(backend_for(server, concurrency=2).generate(requests_of(6), TASK))
    assert len(found) == 6 and server.seen[-1][1]["max_completion_tokens"] == 64


def test_thinking_that_a_server_took_out_is_put_back(server: Server) -> None:
    server.answer = lambda n, path, body: said("4", reasoning_content="two and two", tokens=None, finish="length")
    _, generation = next(iter(backend_for(server).generate(requests_of(1), TASK)))
    assert generation == Generation("<think>\ntwo and two\n</think>\n4", None, "length")


def test_plain_prompts_go_without_a_chat(server: Server) -> None:
    server.answer = lambda n, path, body: (
        200,
        {},
        json.dumps({"choices": [{"text": body["prompt"] + "!", "finish_reason": "stop"}]}),
    )
    _, generation = next(iter(backend_for(server).generate(requests_of(1, plain=True), TASK)))
    assert server.seen[0][0] == "/v1/completions" and generation.text == "s\n\n2+2=?!"


def test_no_server_and_no_such_model_are_said_at_once(server: Server) -> None:
    with pytest.raises(UserError, match="does not answer"):
        EndpointBackend(EndpointSettings("http://127.0.0.1:9/v1"))
    with pytest.raises(UserError, match="no address"):
        EndpointBackend(EndpointSettings("localhost:8000"))
    with pytest.raises(UserError) as caught:
        backend_for(server, model="huge")
    assert "tiny" in caught.value.remedy
    server.models = ["a", "b"]
    with pytest.raises(UserError, match="which model"):
        backend_for(server)


def test_an_evaluation_of_a_server_that_dies_goes_on_when_it_is_back(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "sums.jsonl"
    rows = [{"question": f"{i}+{i}=?", "answer": str(2 * i)} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    down = threading.Event()

    def answer(count: int, path: str, body: dict[str, Any]) -> Answer | None:
        if count > 5:
            down.set()
        i = int(body["messages"][-1]["content"].partition("+")[0])
        return failed(403, "gone") if down.is_set() else said(f"#{2 * i}")

    server.answer = answer
    common = ["eval", "--endpoint", f"{server.url}/v1/", "--suite", str(data), "--grader", "exact"]
    arguments = [*common, "--folder", str(tmp_path / "e"), "--concurrency", "1"]
    assert main(arguments) == 2
    assert "gone" in capsys.readouterr().err
    assert len(Store(tmp_path / "e").samples("sums")) == 5
    server.answer = lambda n, path, body: said(f"#{2 * int(body['messages'][-1]['content'].partition('+')[0])}")
    assert main(arguments) == 0
    assert len(server.seen) == 6 + 3
    assert "100.0" in capsys.readouterr().out
