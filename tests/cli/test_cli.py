"""The command line as a user types it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from thence.cli import main
from thence.cli.app import COMMANDS, make_app
from thence.cli.fields import field_flags
from thence.cli.parsing import flags_of
from thence.jsonl import write_jsonl

SAMPLE = {
    "stage": "eval",
    "step": 0,
    "split": "test",
    "temperature": 0.6,
    "index": 0,
    "prompt": "12a+3?",
    "response": "a=15#15",
    "answer": "15",
    "verdict": "right",
    "extracted": "15",
    "reason": "",
    "score": 1.0,
    "tokens": 8,
    "finish": "stop",
}


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").write_text('stages = ["eval"]\n[model]\npath = "m"\n')
    wrong = SAMPLE | {"verdict": "wrong", "response": "a=[red]14#14", "extracted": "14"}
    write_jsonl(tmp_path / "stages" / "eval" / "samples.jsonl", [SAMPLE, wrong])
    return tmp_path


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["run", "--fields"], ["recipes"], ["--version"]])
def test_help_comes_without_torch(arguments):
    code = "import sys; from thence.cli import main; code = main(sys.argv[1:]); print('torch' in sys.modules, code)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("False 0")
    assert len(done.stdout.splitlines()) > 1


def test_the_page_of_all_commands_needs_no_heavy_package():
    code = "import sys; from thence.cli import main; main(['--help']); print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(said.splitlines()[-1].split())
    assert not loaded & {"torch", "transformers", "matplotlib", "numpy", "pyarrow", "pydantic"}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_help_page_shows_examples_and_every_flag_and_fits(command, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main([command, "--help"]) == 0
    page = capsys.readouterr().out
    examples = page.split("Example")[-1]
    assert f"thence {command}" in examples
    assert max(map(len, page.splitlines())) <= width
    assert [flag for flag in flags_of(make_app()[command]) if flag not in page] == []


def test_help_explains_a_command_by_name(capsys):
    assert main(["help", "eval"]) == 0
    page = capsys.readouterr().out
    assert main(["eval", "--help"]) == 0
    assert page == capsys.readouterr().out
    assert main(["help"]) == 0
    assert "thence COMMAND" in capsys.readouterr().out
    assert main(["help", "evla"]) == 2
    assert "eval" in capsys.readouterr().err
    assert main(["help", "eval", "run"]) == 2


def test_the_examples_of_the_help_pages_name_flags_that_there_are(capsys):
    for command in COMMANDS:
        main([command, "--help"])
        examples = capsys.readouterr().out.split("Example")[-1]
        flags = flags_of(make_app()[command]).keys() | set(field_flags())
        for line in examples.splitlines():
            words = line.partition(f"thence {command} ")[2].split(" -- ")[0].split()
            assert {word for word in words if word.startswith("--")} <= flags


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_completion_knows_commands_flags_and_fields(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in ("compare", "dry-run", "rl.steps", "ungraded"))


def test_completion_is_installed_for_a_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["completion", "fish", "--install"]) == 0
    said = capsys.readouterr().out
    assert [str(file) for file in tmp_path.rglob("*.fish") if str(file) in said]


def test_a_shell_may_ask_for_the_names_of_recipes():
    asked = [sys.executable, "-m", "thence", "__complete", "run", ""]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[1] == "\x1fbegin"
    assert "quickstart" in said.splitlines()


def test_importing_thence_does_not_import_torch():
    code = "import thence, sys; print('torch' in sys.modules, callable(thence.load_recipe))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False True"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "unknown command 'frobnicate'"),
        (["run"], "takes one recipe"),
        (["run", "quickstrat"], "did you mean 'quickstart'?"),
        (["run", "quickstart", "--sft.lrr", "1"], "did you mean 'lr'?"),
        (["run", "quickstart", "--frob", "1"], "no such flag"),
        (["run", "quickstart", "--rl.method", "gropo", "--dry-run"], "did you mean 'grpo'?"),
        (["run", "quickstart", "--rl.options.clip-hihg", "1", "--dry-run"], "rl.options.clip_hihg"),
        (["sample", "nowhere"], "no run at nowhere"),
        (["report", "nowhere"], "no run at nowhere"),
        (["methods", "nothing"], "unknown method 'nothing'"),
    ],
)
def test_a_request_that_makes_no_sense_says_so_and_exits_with_2(arguments, message, capsys):
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "remedy:" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--api-key", "Zq7hunter2Zq7"], "thence: no such flag: --api-key\n"),
        (["--api-key=Zq7hunter2Zq7"], "thence: no such flag: --api-key\n"),
        (["--tasks", "nope"], "thence: --tasks: no task 'nope'"),
        (["--set", "tasks=nope"], "thence: --set tasks: no task 'nope'"),
        (["--template", "x"], "thence: --template: template is neither"),
        (["--set", "sampels=1"], "thence: --set sampels: unknown key"),
        (
            ["--endpoint", "http://h/v1", "--key-variable", "NO_SUCH"],
            "thence: --key-variable: the environment variable",
        ),
    ],
)
def test_an_error_of_eval_names_the_flag_that_was_typed(arguments, message, capsys):
    assert main(["eval", "m", "--suite", "embedded", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert "hunter2" not in said


def test_a_dry_run_prints_a_recipe_that_can_be_run_and_its_budget(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "quickstart", "--dry-run", "--sft.lr", "2e-3"]) == 0
    printed = capsys.readouterr().out
    assert "lr = 0.002" in printed
    assert "Budget" in printed
    assert "Memory of rl" in printed
    assert not any(tmp_path.iterdir())


def test_methods_lists_all_and_explains_one(capsys):
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("sft", "grpo", "dr_grpo", "dapo"))
    assert main(["methods", "dapo"]) == 0
    explained = capsys.readouterr().out
    assert "overlong_buffer" in explained
    assert "2503.14476" in explained


def test_sample_shows_responses_as_they_are_and_filters_by_verdict(finished_run, capsys):
    assert main(["sample", str(finished_run)]) == 0
    shown = capsys.readouterr().out
    assert "a=15#15" in shown
    assert "a=[red]14#14" in shown
    assert main(["sample", str(finished_run), "--verdict", "right"]) == 0
    assert "14#14" not in capsys.readouterr().out
    assert main(["sample", str(finished_run), "--verdict", "unknown"]) == 2


def test_flags_reach_the_recipe():
    from thence.cli.fields import take_fields
    from thence.recipe import load_recipe

    rest, overrides = take_fields(["quickstart", "--sft.lr=1e-4", "--data.skip-bad", "--seed", "3", "--dry-run"])
    recipe = load_recipe(rest[0], overrides)
    assert rest == ["quickstart", "--dry-run"]
    assert recipe.seed == 3
    assert recipe.data.skip_bad is True
    assert recipe.stage("sft").model_dump()["lr"] == 1e-4


@pytest.mark.parametrize(
    ("words", "value"),
    [([], True), (["true"], True), (["false"], False), (["2"], 2), (["--dry-run"], True), (["quickstart"], True)],
)
def test_a_flag_that_may_be_true_or_a_count_needs_no_value(words, value):
    from thence.cli.fields import take_fields
    from thence.recipe import load_recipe

    rest, overrides = take_fields(["--sft.activation-checkpointing", *words])
    found = load_recipe("quickstart", overrides).stage("sft").model_dump()["activation_checkpointing"]
    assert found == value and type(found) is type(value)
    assert rest == [word for word in words if word in ("--dry-run", "quickstart")]


def test_a_method_of_another_package_is_found(tmp_path, monkeypatch):
    package = tmp_path / "other_method"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from thence.methods.grpo import Grpo\n"
        "class Other(Grpo):\n    'Another.'\n    name = 'other'\n    exactness = 'exact'\n"
    )
    info = tmp_path / "other_method-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-method\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[thence.methods]\nother = other_method:Other\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    from thence.methods.registry import make_method

    method = make_method("other", {"clip_high": 0.5}, "rl")
    assert method.name == "other"
    assert method.options.clip_high == 0.5


def test_the_example_of_the_readme_learns():
    example = ROOT / "examples" / "own_reward.py"
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, check=True)
    rewards = [float(line.split()[3]) for line in done.stdout.splitlines()]
    assert rewards[0] < 0.2
    assert rewards[-1] > 0.8


def test_a_run_that_is_done_is_no_failure_where_its_page_cannot_be_written(monkeypatch, tmp_path) -> None:
    from thence.cli import run as command
    from thence.pages.run import page

    def without_jinja(folder: Path) -> Path:
        raise ModuleNotFoundError("No module named 'jinja2'", name="jinja2")

    monkeypatch.setattr(page, "write_page", without_jinja)
    written, said = command._page_of(tmp_path)
    assert written is None
    assert "jinja2 cannot be imported" in said and f"thence report {tmp_path}" in said
