"""Keys, passwords and addresses of a server: sent, and nowhere kept or printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.evaluate.answering_server import Server, backend_for, failed, said
from tests.evaluate.asking import Evaluation, asked
from thence.cli import main
from thence.errors import UserError


def test_a_redirect_is_not_followed_with_the_key(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame-open")
    place = f"{evaluation.server.url}/elsewhere?token=sesame-open"
    assert evaluation.run(lambda i: (307, {"Location": place}, "")) == 2
    err = capsys.readouterr().err
    assert "HTTP 307" in err and "/elsewhere" in err and "sesame" not in err
    assert len(evaluation.server.seen) == 1


SECRETS = ("hunter22", "p%40ss", "p@ss", "q-u-e-r-y", "kkeeyy", "robert")


def test_no_secret_of_an_address_or_key_is_kept_or_printed(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "kkeeyy")
    place = evaluation.server.url.removeprefix("http://")
    url = f"http://robert:hunter22'p%40ss@{place}/v1?api_key=q-u-e-r-y"
    echo = f"no: {url} kkeeyy hunter22'p@ss \x1b[31m"
    monkeypatch.setattr("sys.argv", ["thence", "eval", "--endpoint", url, "--suite", "x"])
    assert evaluation.run(lambda i: failed(400, echo) if i == 0 else None, url=url) == 1
    headers = evaluation.server.seen[0][2]
    assert headers["Authorization"].startswith("Basic ") and evaluation.server.seen[0][0].endswith("?api_key=q-u-e-r-y")
    assert evaluation.run(lambda i: failed(401, echo), url=url) == 2
    texts = list(capsys.readouterr())
    texts += [path.read_text() for path in evaluation.folder.rglob("*") if path.is_file()]
    assert len(texts) > 10 and all("robert" not in path.name for path in evaluation.folder.parent.rglob("*"))
    for text in texts:
        assert not [secret for secret in (*SECRETS, "\x1b", headers["Authorization"]) if secret in text]
    # the same server with another password, and without one in the address, is the same evaluation
    other = url.replace("hunter22", "changed!").replace("q-u-e-r-y", "other")
    assert evaluation.run(url=other) == 0
    assert evaluation.run(url=f"http://{place}/v1?other=1") == 2
    assert "holds an evaluation with" in capsys.readouterr().err


def test_a_password_in_a_variable_is_sent_and_the_folder_is_named_without_secrets(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVER_PASSWORD", "open/sesame")
    place = evaluation.server.url.removeprefix("http://")
    evaluation.server.answer = lambda n, path, body: said(f"#{2 * asked(body)}")
    for user in ("me:${SERVER_PASSWORD}", "me:another"):
        url = f"http://{user}@{place}/v1?token=${{SERVER_PASSWORD}}"
        assert main(["eval", "--endpoint", url, "--suite", str(evaluation.data), "--grader", "exact"]) == 0
    assert evaluation.server.seen[0][0] == "/v1/chat/completions?token=open%2Fsesame"
    assert evaluation.server.seen[0][2]["Authorization"] == "Basic bWU6b3Blbi9zZXNhbWU="
    (folder,) = Path("evals").iterdir()
    assert folder.name == f"sums-http-{place.replace(':', '-')}-v1"


def test_an_evaluation_begun_with_a_password_in_clear_is_resumed_and_cleaned(evaluation: Evaluation) -> None:
    url = evaluation.server.url.replace("http://", "http://robert:hunter22@") + "/v1"
    assert evaluation.run(url=url) == 0
    for name in ("evaluation.toml", "environment.json"):
        path = evaluation.folder / name
        path.write_text(path.read_text().replace("[hidden]@", "robert:hunter22@"))
    environment = json.loads(path.read_text())
    path.write_text(json.dumps(environment | {"command": f"thence eval --endpoint '{url}?key=hunter22' --limit 3"}))
    assert evaluation.run(lambda i: None, "--samples", "2", url=url) == 0
    for path in evaluation.folder.rglob("*.*"):
        assert "hunter22" not in path.read_text(), path


@pytest.mark.parametrize("key", ["two words", "line\nend", "ünï"])
def test_a_key_that_no_header_can_hold_is_named_and_not_shown(
    server: Server, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(UserError, match="MY_KEY") as caught:
        backend_for(server, key_variable="MY_KEY")
    assert key not in str(caught.value)
