"""Exports sent to a hub: a server of the test's own on this machine takes what is sent."""

from __future__ import annotations

import base64
import json
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import thence
from tests.recipes import file_recipe
from thence.cli import main

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


class FakeHub(ThreadingHTTPServer):
    """Keeps what it is sent; ``private`` and ``card`` say what its repository is before."""

    private, card, status = True, False, 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.asked: list[tuple[str, str]] = []
        self.created: list[dict[str, object]] = []
        self.files: dict[str, bytes] = {}
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: FakeHub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_one(self) -> None:
        hub, path = self.server, self.path.split("?")[0]
        hub.asked.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.status != 200:
            self.answer({"error": f"not with the token {self.headers['Authorization']}"}, hub.status)
        elif path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self.answer({"url": f"{hub.address}/me/mine", "name": "me/mine"})
        elif path == "/api/models/me/mine":
            self.answer({"id": "me/mine", "private": hub.private, "siblings": []})
        elif path.endswith("/README.md") and not hub.card:
            self.answer({}, 404, X_Error_Code="EntryNotFound")
        elif path.endswith("/README.md"):
            self.answer({}, ETag='"x"', X_Repo_Commit="0" * 40)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitOid": "0" * 40, "commitUrl": f"{hub.address}/me/mine/commit/0", "success": True})
        else:
            self.answer({"error": "no such place"}, 404)

    do_GET = do_POST = do_HEAD = handle_one


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    server = FakeHub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    place = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + place)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = {**file_recipe(tmp_path_factory.mktemp("hub")), "stages": ["sft"]}
    del recipe["rl"], recipe["eval"]
    return thence.run(recipe, progress=False).folder


def test_the_folder_is_sent_as_it_is_to_a_private_repository(
    hub: FakeHub, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(finished), str(out), "--push-to-hub", "me/mine"]) == 0
    said = capsys.readouterr()
    there = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "manifest.json"}
    assert hub.files == there and {"README.md", "model.safetensors", "tokenizer.json"} <= set(there)
    assert hub.created[0]["visibility"] == "private"
    assert f"sent: {hub.address}/me/mine" in said.out
    assert TOKEN not in said.out + said.err
    assert all(f"{len(content):,} bytes  {name}" in said.out for name, content in there.items())


def test_a_dry_run_asks_the_hub_nothing(
    hub: FakeHub, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(finished), str(tmp_path / "out"), "--push-to-hub", "me/mine", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not hub.asked and "model.safetensors" in said and said.endswith("nothing was sent\n")


def test_without_the_flag_nothing_is_sent_and_flags_about_sending_are_refused(
    hub: FakeHub, finished: Path, tmp_path: Path
) -> None:
    for flag in ("--public", "--dry-run"):
        assert main(["export", str(finished), str(tmp_path / "out"), flag]) == 2
    assert main(["export", str(finished), str(tmp_path / "out"), "--push-to-hub", "nobody"]) == 2
    assert not (tmp_path / "out").exists()
    assert main(["export", str(finished), str(tmp_path / "out")]) == 0
    assert not hub.asked


def test_a_public_repository_needs_a_word(
    hub: FakeHub, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.private = False
    assert main(["export", str(finished), str(tmp_path / "one"), "--push-to-hub", "me/mine"]) == 2
    assert "the repository me/mine is public" in capsys.readouterr().err and not hub.files
    assert main(["export", str(finished), str(tmp_path / "two"), "--push-to-hub", "me/mine", "--public"]) == 0
    assert "model.safetensors" in hub.files


def test_a_card_that_is_there_stays(
    hub: FakeHub, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.card = True
    assert main(["export", str(finished), str(tmp_path / "out"), "--push-to-hub", "me/mine"]) == 0
    assert "stays as it was" in capsys.readouterr().out
    assert "README.md" not in hub.files and "model.safetensors" in hub.files


@pytest.mark.parametrize(("status", "remedy"), [(401, "hf auth login"), (403, "a token that may write")])
def test_a_refusal_keeps_the_folder_and_shows_no_token(
    status: int, remedy: str, hub: FakeHub, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.status = status
    assert main(["export", str(finished), str(tmp_path / "out"), "--push-to-hub", "me/mine"]) == 2
    said = capsys.readouterr()
    assert remedy in said.err and (tmp_path / "out" / "model.safetensors").is_file()
    assert TOKEN not in said.out + said.err and not hub.files


@pytest.mark.parametrize(("flags", "seen"), [([], ["--private"]), (["--public"], [])])
def test_the_command_that_sends_later_names_the_folder_and_stays_private(
    flags: list[str], seen: list[str], hub: FakeHub, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.status, out = 401, tmp_path / "my model"
    assert main(["export", str(finished), str(out), "--push-to-hub", "me/mine", *flags]) == 2
    later = shlex.split(capsys.readouterr().err.split("`")[-2])
    assert later == ["hf", "upload", "me/mine", str(out), *seen]
