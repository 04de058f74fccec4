"""Whatever stands in a model's words, a file's name or a server's message: the terminal only ever shows it."""

import csv
import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

import thence.cli
from thence.cli import main
from thence.errors import UserError
from thence.foreign_text import clean, one_line
from thence.jsonl import write_jsonl
from thence.pages.run.page import write_page
from thence.streams import Guarded, guarded
from thence.terminal import cleaned, logging_to, make_console

HOSTILE = "A\x1b[2J\x1b]0;title\x07\x9b31mB\x00C\x08\x7f\u202eD\u2066E\u200fF\ud800G\r\nH\u2028I\ufeffJ\U000e0041K"
FORBIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029\ufeff\ud800-\udfff]"
)
MARKUP = "[red]x[/red] [link=http://evil]y[/link] :smile: [/nothing]"


def test_clean_shows_what_a_terminal_would_obey_and_keeps_every_script():
    said = clean(HOSTILE)
    assert not FORBIDDEN.search(said)
    assert "\\x1b[2J" in said
    assert "\\u202e" in said
    assert said.encode("utf-8")
    plain = "naïve 漢字 עברית العربية हिन्दी می‌خواهم 👩‍👩‍👧 ∑x² \t½\n"
    assert clean(plain) == plain
    assert clean(said) == said
    assert "\n" not in one_line(HOSTILE)
    assert one_line("x" * 99, 10) == "x" * 9 + "…"


# --- the console ---


@pytest.fixture(autouse=True)
def not_into_the_report_of_the_test():
    """A log line with half a character in it would end the processes that share the tests."""

    def nothing(_: logging.LogRecord) -> bool:
        return False

    handlers = list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(nothing)
    yield
    for handler in handlers:
        handler.removeFilter(nothing)


def drawn(*things, **options) -> str:
    out = io.StringIO()
    console = make_console(file=out, width=200, **options)
    for thing in things:
        console.print(thing)
    return out.getvalue()


def a_table() -> Table:
    table = Table(title=HOSTILE + MARKUP)
    table.add_column(HOSTILE + MARKUP)
    table.add_row(HOSTILE + MARKUP)
    table.add_row(Text(HOSTILE))
    return table


@pytest.mark.parametrize(
    "thing",
    [HOSTILE, Text(HOSTILE), a_table(), Text.assemble((HOSTILE, "bold red"), ("b", "green"))],
    ids=["text", "rich text", "table", "styled"],
)
def test_nothing_foreign_passes_the_console(thing):
    said = drawn(thing)
    assert not FORBIDDEN.search(said)
    assert "\\x1b" in said


@pytest.mark.parametrize("thing", [MARKUP, a_table()], ids=["string", "table"])
def test_square_brackets_and_colons_mean_nothing(thing):
    said = drawn(thing)
    for piece in ("[red]x[/red]", "[link=http://evil]", ":smile:", "[/nothing]"):
        assert piece in said


def test_own_styles_pass_and_foreign_ones_do_not():
    said = drawn(Text.assemble(("ok\x1b[31m", "bold green")), force_terminal=True, color_system="standard")
    assert said.startswith("\x1b[1;32mok")
    assert re.sub("\x1b\\[(0|1;32)m", "", said) == "ok\\x1b[31m\n"


def test_styles_stay_on_their_words_when_text_grows():
    text = cleaned(Text.assemble(("a\x1bb", "red"), ("c", "green")))
    assert text.plain == "a\\x1bbc"
    spans = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert spans["c"] == "green"
    assert "".join(part for part, style in spans.items() if style == "red") == "a\\x1bb"


def test_bars_and_log_lines_are_cleaned_too():
    out = io.StringIO()
    console = make_console(file=out, force_terminal=True, width=200, color_system=None)
    with Progress(TextColumn("{task.description}", markup=False), console=console) as bar:
        bar.add_task(MARKUP + "\x1b[2Jend\u202e", total=1)
    said = re.sub(r"\x1b\[(\?25[lh]|\d*[KAm]|2K)", "", out.getvalue()).replace("\r", "")
    assert not FORBIDDEN.search(said)
    assert "[red]x[/red]" in said
    out = io.StringIO()
    with logging_to(make_console(file=out, width=200)):
        logging.getLogger("thence.x").warning("model %s %s", HOSTILE, MARKUP)
    assert not FORBIDDEN.search(out.getvalue())
    assert "[red]x[/red]" in out.getvalue()


# --- the streams ---


def test_every_print_is_cleaned_while_a_command_runs(capfd, monkeypatch):
    def act(_):
        print(HOSTILE)
        print(HOSTILE, file=sys.stderr)
        logging.getLogger("some.library").warning(HOSTILE)
        raise UserError(HOSTILE, remedy=HOSTILE, file=HOSTILE, field=HOSTILE)

    monkeypatch.setattr(thence.cli, "_command", lambda _: act)
    assert main(["x"]) == 2
    said = capfd.readouterr()
    assert "\\x1b[2J" in said.out
    assert "remedy: A\\x1b[2J" in said.err
    assert not FORBIDDEN.search(said.out + said.err)


def test_the_guard_is_taken_away_again(capsys):
    before = sys.stdout, sys.stderr
    main(["--version"])
    assert (sys.stdout, sys.stderr) == before
    with guarded():
        assert isinstance(sys.stdout, Guarded)
        assert sys.stdout.encoding
        assert not sys.stdout.isatty()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_of_another_encoding_gets_escapes(encoding, tmp_path):
    code = (
        "import sys, thence.cli as c; from rich.table import Table\n"
        "from thence.terminal import make_console\n"
        "def act(rest):\n"
        "    print('漢字 ✓ \\ud800'); table = Table(title='é漢'); table.add_row('✓'); make_console().print(table)\n"
        "    print('漢字', file=sys.stderr); return 0\n"
        "c._command = lambda name: act\n"
        "sys.exit(c.main(['x']))"
    )
    env = {
        "PATH": "/usr/bin:/bin",
        "PYTHONIOENCODING": encoding,
        "PYTHONPATH": str(Path(thence.cli.__file__).parents[2]),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    assert b"\\u6f22\\u5b57" in done.stdout
    assert b"Traceback" not in done.stderr


# --- commands ---

SAMPLE = {
    "stage": "eval",
    "step": 0,
    "split": HOSTILE,
    "temperature": 0.6,
    "index": 0,
    "prompt": HOSTILE + MARKUP,
    "response": HOSTILE + MARKUP,
    "answer": HOSTILE,
    "verdict": "right",
    "extracted": HOSTILE,
    "reason": HOSTILE,
    "score": 1.0,
    "tokens": 8,
    "finish": "stop",
}
RESULT = {"split": HOSTILE + MARKUP, "temperature": 0.6, "accuracy": 0.5, "problems": 2, "samples": 1}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run\x1b[31m\u202e[red]"
    (folder / "stages" / "eval").mkdir(parents=True)
    (folder / "recipe.toml").write_text(
        'name = "n\\u001b[2J\\u202e[red]"\ndescription = "\\u009b[bold]"\nstages = ["eval"]\n'
        '[model]\npath = "m\\u001b"\n'
    )
    write_jsonl(folder / "stages" / "eval" / "samples.jsonl", [SAMPLE])
    (folder / "environment.json").write_text(
        json.dumps({"thence": "0", "started": "x", "command": HOSTILE, "platform": HOSTILE})
    )
    return folder


def test_sample_shows_and_obeys_nothing(run, capfd):
    assert main(["sample", str(run)]) == 0
    said = capfd.readouterr()
    assert not FORBIDDEN.search(said.out + said.err)
    assert "[red]x[/red]" in said.out
    assert "\\x1b[2J" in said.out
    assert "\\ud800" in said.out


def test_report_and_its_files_hold_nothing_raw(run, capfd):
    assert main(["report", str(run)]) == 0
    said = capfd.readouterr()
    assert not FORBIDDEN.search(said.out + said.err)
    write_page(run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    json.loads((run / "report.json").read_text())
    list(csv.reader(io.StringIO((run / "report.csv").read_text())))


@pytest.mark.parametrize(
    "arguments",
    [
        ["NAME"],
        ["run", "NAME"],
        ["run", "quickstart", "--NAME", "1"],
        ["run", "quickstart", "--rl.method", "NAME", "--dry-run"],
        ["run", "quickstart", "--data.source", "NAME", "--dry-run"],
        ["sample", "NAME"],
        ["report", "NAME"],
        ["methods", "NAME"],
        ["check", "NAME"],
        ["eval", "NAME", "--suite", "NAME"],
        ["eval", "NAME", "--suite", "embedded", "--limit", "1", "--folder", "e"],
        ["eval", "--compare", "NAME", "NAME"],
        ["eval", "--NAME"],
        ["compare", "NAME"],
        ["compare", "quick", "--only", "NAME"],
        ["audit", "NAME"],
        ["audit", "trl-sft", "--python", "NAME"],
        ["doctor", "--python", "NAME"],
        ["doctor", "--NAME"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_no_command_prints_a_name_raw_in_its_refusal(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hostile = "x\x1b[2J\x9b\u202e\udcff[red]y[/red][/z]"
    assert main([word.replace("NAME", hostile) for word in arguments]) in (1, 2)
    said = capfd.readouterr()
    assert not FORBIDDEN.search(said.out + said.err)
    assert "Traceback" not in said.err
    assert "fault of thence" not in said.err
    assert said.err or said.out


def test_an_audit_of_a_hostile_program_gives_well_formed_files(tmp_path, capfd):
    program = [
        sys.executable,
        "-c",
        "print('\\x1b[2J\\x00\\u202e\\uffff'); raise SystemExit(3)",
        "{model}",
        "{data}",
        "{out}",
    ]
    files = {kind: tmp_path / f"a.{kind}" for kind in ("json", "html", "junit")}
    wanted = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    flags = ["--quick", "--only", "micro 8 x 1"]
    main(["audit", "command", *flags, *wanted, "--", *program, "a\x1b\u202e\udcff\ufffe"])
    said = capfd.readouterr()
    assert not FORBIDDEN.search(said.out + said.err)
    json.loads(files["json"].read_text(encoding="utf-8"))
    ElementTree.parse(files["junit"])
    page = files["html"].read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", page)


def test_everything_that_prints_goes_through_the_one_console():
    """A console of rich's own would draw text raw; standard streams are guarded by `main`."""
    source = Path(thence.cli.__file__).parents[1]
    made = [
        f"{path.name}:{number}"
        for path in source.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(r"(?<![\w.])Console\(|RichHandler\(|sys\.__std|from_markup|os\.write\([12]\b", line)
        and path.name != "terminal.py"
    ]
    assert made == []
