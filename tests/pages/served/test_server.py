"""`thence serve`: what is answered, to whom, and that it grows."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pages.test_report import make_run
from thence.cli import main
from thence.errors import UserError
from thence.pages.served.server import PageServer
from thence.pages.served.shelf import Shelf, shelf_of


def known_run(folder: Path, steps: int = 0) -> Path:
    """A run that thence knows as its own."""
    run = make_run(folder, steps=steps)
    about = json.loads((run / "environment.json").read_text()) | {"started": "2026-01-01"}
    (run / "environment.json").write_text(json.dumps(about))
    return run


@pytest.fixture
def served(tmp_path: Path) -> Iterator[PageServer]:
    run = known_run(tmp_path / "trial", steps=3)
    other = tmp_path / "an <evaluation>"
    other.mkdir()
    (other / "evaluation.toml").write_text("")
    (tmp_path / "secret.txt").write_text("not for the browser")
    with PageServer(Shelf((run, other)), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def asked(server: PageServer, path: str, method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.putrequest(method, path, skip_host=True)
    for name, value in {"Host": f"127.0.0.1:{server.server_port}", **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())


def test_it_listens_on_this_machine_alone_and_shows_all_pages(served: PageServer) -> None:
    assert served.server_address[0] == "127.0.0.1"
    status, index, headers = asked(served, "/")
    assert status == 200 and "trial" in index and "an &lt;evaluation&gt;" in index and "no page yet" in index
    assert headers["Cache-Control"] == "no-store" and "default-src 'none'" in headers["Content-Security-Policy"]
    for path in ("/show/0", "/page/0", "/shell.js"):
        assert asked(served, path)[0] == 200
    assert asked(served, "/page/0", "HEAD")[:2] == (200, "")


def test_a_page_grows_with_its_run_and_nothing_is_written(served: PageServer, tmp_path: Path) -> None:
    run = tmp_path / "trial"
    before = set(tmp_path.rglob("*"))
    first = json.loads(asked(served, "/state/0")[1])
    page = asked(served, "/page/0")[1]
    assert "3 steps" in page and "stopped" in first["said"]
    assert json.loads(asked(served, "/state/0")[1]) == first
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "rl", "kind": "rl", "step": 4, "reward": 0.7, "seconds": 1.0}) + "\n")
    assert json.loads(asked(served, "/state/0")[1])["stamp"] != first["stamp"]
    assert "4 steps" in asked(served, "/page/0")[1]
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "path",
    [
        "/page/2",
        "/page/1",
        "/page/-1",
        "/page/0/../../secret.txt",
        "/../secret.txt",
        "/secret.txt",
        "//etc/passwd",
        "/recipe.toml",
        "/page/%2e%2e%2fsecret.txt",
        "/show/999999999999",
        "/page/%D9%A0",
    ],
)
def test_nothing_else_is_served(served: PageServer, path: str) -> None:
    status, text, _ = asked(served, path)
    assert status == 404 and "not for the browser" not in text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1.evil.example", ""])
def test_another_name_for_this_address_is_refused(served: PageServer, host: str) -> None:
    assert asked(served, "/page/0", Host=host)[0] == 403


def test_another_site_is_refused_and_nothing_can_be_sent(served: PageServer) -> None:
    assert asked(served, "/state/0", Origin="http://evil.example")[0] == 403
    assert asked(served, "/state/0", Origin=served.url.rstrip("/"))[0] == 200
    assert asked(served, "/page/0", "POST")[0] == 501
    assert asked(served, "/page/0", "DELETE")[0] == 501


def test_a_written_page_is_served_but_no_link_out(served: PageServer, tmp_path: Path) -> None:
    page = tmp_path / "an <evaluation>" / "report.html"
    page.symlink_to(tmp_path / "secret.txt")
    assert asked(served, "/page/1")[0] == 404
    page.unlink()
    page.write_text("<p>scores</p>")
    assert asked(served, "/page/1")[1] == "<p>scores</p>"


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    run = known_run(tmp_path / "<script>alert(1)<.script>", steps=1)
    with PageServer(Shelf((run,)), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            for path in ("/", "/show/0"):
                assert "<script>alert" not in asked(server, path)[1]
        finally:
            server.shutdown()
            thread.join()


def test_what_is_served_where_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nothing to show"):
        shelf_of(())
    (tmp_path / "runs").mkdir()
    known_run(tmp_path / "runs" / "trial")
    (tmp_path / "runs" / "notes").mkdir()
    assert shelf_of(()).folders == shelf_of(("trial",)).folders == (Path("runs/trial"),)
    with pytest.raises(UserError, match="no run, evaluation or comparison at notes"):
        shelf_of(("notes",))


def test_a_port_in_use_and_a_wrong_name_are_said(served: PageServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "nothing-of-this-name"]) == 2
    folder = str(served.shelf.folders[1])
    assert main(["serve", folder, "--port", str(served.server_port)]) == 2
    assert "is in use" in capsys.readouterr().err
