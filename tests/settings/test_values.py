"""Numbers that a user gives: every numeric field of every table, and every flag, refuses what is no sensible value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from thence.cli import main
from thence.compare.recipe import load_comparison
from thence.errors import UserError
from thence.evaluate.suites import Task, load_suite
from thence.methods.registry import make_method, methods
from thence.recipe import Data, Eval, Faulty, Recipe, Rl, Sft, load_recipe
from thence.rollout.vllm.settings import VllmSettings, vllm_settings
from thence.settings.annotations import bounds_of, members_of, whole_type
from thence.settings.section import Section

MODEL = {"path": "some/model"}
ARMS = {"base": {}, "sft": {"kind": "sft"}}
COMPARISON = {"reference": "base", "seeds": [1], "bases": {"b": {"path": "m"}}, "arms": ARMS, "sft": {"steps": 2}}
NEVER = (True, False, "8", "nan", math.nan, -math.inf, 10**5000, -(10**400), [8], {"x": 8})
UNENDING = {"dual_clip", "ratio_bound"}
"""Fields in which inf has a meaning."""


def numeric(kind: type[Section]) -> Iterator[tuple[str, Any]]:
    """The numeric fields of a section with their types, lists and pairs of numbers too; not those that may be true."""
    for name, field in kind.model_fields.items():
        whole = whole_type(field)
        if {int, float} & set(members_of(whole)) and bool not in members_of(whole):
            yield name, whole


def bad_values(name: str, kind: Any) -> list[Any]:
    members, bounds = members_of(kind), bounds_of(kind)
    bad = [*NEVER, math.inf, 1e300, 10**30]
    if name in UNENDING:
        bad = [*NEVER, 1]
    if not bounds.get("ge", 0) < 0:
        bad += [-1, -0.5]
    if float not in members:
        bad += [8.0, 8.5, 1e3]
    return bad


def in_recipe(table: str, wrap: Callable[[Any], Any] = lambda value: value) -> Callable[[str, Any], Any]:
    def build(name: str, value: Any) -> Any:
        own = {table: wrap({name: value})} if table else {name: value}
        return load_recipe({"model": MODEL, "stages": ["sft", "rl", "eval"], **own})

    return build


def in_suite(name: str, value: Any) -> Any:
    return load_suite("gsm8k", {name: value} if not isinstance(value, str) else {name: f'"{value}"'})


def in_options(method: str) -> Callable[[str, Any], Any]:
    return lambda name, value: make_method(method, {name: value}, methods()[method].stage)


def places() -> Iterator[tuple[str, type[Section], Callable[[str, Any], Any]]]:
    yield "", Recipe, in_recipe("")
    yield "data", Data, in_recipe("data")
    yield "sft", Sft, in_recipe("sft")
    yield "rl", Rl, in_recipe("rl")
    yield "eval", Eval, in_recipe("eval")
    yield "sft.data", Data, in_recipe("sft", lambda table: {"data": table})
    yield "eval.splits", Data, in_recipe("eval", lambda table: {"splits": {"mine": table}})
    yield "sft.fault", Faulty, in_recipe("sft", lambda table: {"fault": {"names": ["mean-of-means"], **table}})
    yield "suite", Task, in_suite
    yield "vllm", VllmSettings, lambda name, value: vllm_settings({name: value}, "rl.vllm")
    for method, known in methods().items():
        yield f"options of {method}", known.Options, in_options(method)
    from thence.compare import recipe as compare
    from thence.compare import sections

    yield "budget", compare.ArmBudget, lambda name, value: load_comparison({**COMPARISON, "budget": {name: value}})
    for kind, section in sections.KINDS.items():

        def build(name: str, value: Any, kind: str = kind) -> Any:
            return load_comparison({**COMPARISON, "sections": [{"kind": kind, name: value}]})

        yield f"section {kind}", section, build


CASES = [
    pytest.param(name, kind, build, id=f"{place}.{name}")
    for place, section, build in places()
    for name, kind in numeric(section)
]


@pytest.mark.matrix(60)
@pytest.mark.parametrize(("name", "kind", "build"), CASES)
def test_a_numeric_field_refuses_what_is_no_sensible_number(name: str, kind: Any, build: Any) -> None:
    for value in bad_values(name, kind):
        with pytest.raises(UserError) as caught:
            build(name, value)
        assert name in str(caught.value.field)
        assert caught.value.remedy
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(("name", "kind", "build"), [case for case in CASES if case.values[0] not in UNENDING])
def test_every_numeric_field_has_bounds_on_both_sides(name: str, kind: Any, build: Any) -> None:
    bounds = bounds_of(kind)
    assert {"ge", "gt"} & set(bounds)
    assert {"le", "lt"} & set(bounds)


def test_fields_were_found() -> None:
    assert len(CASES) > 150
    assert {"sft.lr", "eval.samples", "options of dapo.clip_low"} <= {str(case.id) for case in CASES}


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("packing", [True, False], (1, 8)),
        ("activation_checkpointing", [True, False, 1, 2, 65_536], (65_537, 2.0, "2")),
    ],
)
def test_a_field_that_is_true_or_false_takes_nothing_else_but_a_count_where_it_says_so(
    field: str, good: list[Any], bad: tuple[Any, ...]
) -> None:
    def built(value: Any) -> Any:
        return load_recipe({"model": MODEL, "stages": ["sft"], "sft": {field: value}}).stage("sft")

    for value in good:
        found = getattr(built(value), field)
        assert found == value and type(found) is type(value)
    for value in (*NEVER[2:], *bad, 0, -1, 8.5, "yes", "true"):
        with pytest.raises(UserError, match=field) as refused:
            built(value)
        assert refused.value.remedy and len(str(refused.value)) < 1000


LISTS = [
    ("eval", "temperatures", [[True], ["0.6"], [math.nan], [math.inf], [-1], [1e300], [1e-9], []]),
    ("eval", "temperatures", [0.6, [[0.6]], [0.6, 0.6]]),
    ("sft", "betas", [[0.9, 1.0], [1, 0.9], [-0.1, 0.9], [0.9], [0.9, 0.9, 0.9], [True, 0.9], ["0.9", 0.9], 0.9]),
    ("sft", "betas", [[math.nan, 0.9], [0.9, 2]]),
    ("data", "source", [[], "a.jsonl", [3], [""], [" "], ["a\0b"], ["https://x/y.jsonl"]]),
]


@pytest.mark.parametrize(("table", "field", "values"), LISTS)
def test_a_list_refuses_what_one_of_its_members_cannot_be(table: str, field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UserError) as caught:
            load_recipe({"model": MODEL, "stages": ["sft", "eval"], table: {field: value}})
        assert f"{table}.{field}" in str(caught.value.field)


@pytest.mark.parametrize("value", [True, -1, 1.5, "1", math.nan, 10**30])
def test_seeds_of_a_comparison_are_whole_numbers_given_once(value: Any) -> None:
    for changed in ({"seeds": [value]}, {"tuning": {"seeds": [value]}}):
        with pytest.raises(UserError, match="seeds"):
            load_comparison({**COMPARISON, **changed})
    with pytest.raises(UserError, match="twice"):
        load_comparison({**COMPARISON, "seeds": [1, 2, 1]})


def test_a_grid_of_more_tries_than_anybody_makes_is_refused() -> None:
    grid = {name: list(range(1, 200)) for name in ("batch", "steps")}
    arms = {"base": {}, "sft": {"kind": "sft", "grid": grid}}
    with pytest.raises(UserError, match="39,601 combinations"):
        load_comparison({**COMPARISON, "arms": arms})


def test_a_grid_holds_values_of_its_field() -> None:
    for bad in (True, "1e-3", math.nan, -1):
        arms = {"base": {}, "sft": {"kind": "sft", "grid": {"lr": [1e-3, bad]}}}
        with pytest.raises(UserError, match="sft"):
            load_comparison({**COMPARISON, "arms": arms})


# TOML files: the line is named.


@pytest.mark.parametrize("literal", ["true", "nan", "inf", "-1", '"8"', "8.0", "8.5", "1e300", "[]", "9" * 400])
def test_a_bad_number_in_a_file_is_named_with_file_line_field_and_what_it_takes(literal: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f'stages = ["sft-short"]\n[model]\npath = "m"\n[sft]\nlr = 1e-3\nsteps = {literal}\n')
    with pytest.raises(UserError) as caught:
        load_recipe(file)
    assert (caught.value.file, caught.value.line, caught.value.field) == (str(file), 6, "sft.steps")
    assert "a whole number from 1 to" in caught.value.remedy
    assert "optimizer steps" in caught.value.remedy.lower()


def test_a_bad_number_of_a_suite_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    tasks = '[[tasks]]\nname = "a"\nsource = "x"\n\n[[tasks]]\nname = "b"\nsource = "x"\nsamples = true\n'
    file.write_text(tasks)
    with pytest.raises(UserError) as caught:
        load_suite(str(file))
    assert (caught.value.file, caught.value.line, caught.value.field) == (str(file), 8, "tasks.b.samples")
    file.write_text('[defaults]\nsource = "x"\ntemperature = nan\n' + tasks.replace("samples = true\n", ""))
    with pytest.raises(UserError) as caught:
        load_suite(str(file))
    assert (caught.value.line, caught.value.field) == (3, "tasks.a.temperature")


# Flags.


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a refused command says; it writes nothing."""
    before = sorted(Path().rglob("*"))
    assert main(argv) == 2
    said = capsys.readouterr()
    assert "remedy:" in said.err
    assert "Traceback" not in said.err
    assert sorted(Path().rglob("*")) == before
    return said.err


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def test_a_forgotten_value_is_not_taken_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, "run", "quickstart", "--sft.lr", "--sft.steps", "8")
    assert "--sft.lr" in said and "needs a value" in said and "a number above 0" in said
    assert "needs a value" in told(capsys, "run", "quickstart", "--rl.options.std")
    assert "needs a value" in told(capsys, "run", "quickstart", "--seed")
    assert "--sft.lr" in told(capsys, "run", "quickstart", "--sft.lr", "true")


def test_a_true_or_false_flag_stands_alone_and_takes_nothing_that_follows() -> None:
    from thence.cli.fields import take_fields

    assert take_fields(["--data.skip-bad", "mine.toml"]) == (["mine.toml"], {"data.skip-bad": "true"})
    for value in ("true", "false"):
        positional, overrides = take_fields(["mine", "--data.skip-bad", value])
        assert positional == ["mine"]
        assert load_recipe({"model": MODEL}, overrides).data.skip_bad is (value == "true")


BAD_NUMBERS = ("nan", "inf", "-inf", "-1", "true", "", " ", "8.5x", "1e300", "9" * 5000, "1e-400x", '"8"', "1_", "[8]x")
RUN = ["run", "quickstart"]
EVAL = ["eval", "world:chain/rich", "--suite", "embedded"]
NUMBER_FLAGS = [
    (RUN, "--sft.lr"), (RUN, "--sft.steps"), (RUN, "--seed"), (RUN, "--rl.max-tokens"), (RUN, "--sft.eps"),
    (RUN, "--rl.clip-norm"), (RUN, "--sft.flops"), (RUN, "--sft.epochs"), (RUN, "--rl.reward-seconds"),
    (["check", "world:chain/rich"], "--data.limit"),
    (EVAL, "--limit"), (EVAL, "--samples"), (EVAL, "--temperature"), (EVAL, "--top-p"), (EVAL, "--max-tokens"),
    (EVAL, "--seed"), (EVAL, "--rows"), (EVAL, "--concurrency"), (EVAL, "--timeout"),
    (["compare", "quick", "--dry-run"], "--jobs"), (["compare", "quick", "--dry-run"], "--threads"),
    (["compare", "quick", "--dry-run"], "--seeds"),
    (["sample", "nowhere"], "--n"),
    (["audit", "trl-sft"], "--seed"), (["audit", "trl-sft"], "--time-limit"), (["audit", "command"], "--lr"),
]  # fmt: skip


@pytest.mark.matrix(9)
@pytest.mark.parametrize(("command", "flag"), NUMBER_FLAGS, ids=lambda part: part if isinstance(part, str) else part[0])
def test_a_flag_for_a_number_refuses_everything_else(
    command: list[str], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = flag.rpartition(".")[2].strip("-")
    for value in BAD_NUMBERS:
        if flag == "--seeds" and value == "8.5x":
            continue
        said = told(capsys, *command, f"{flag}={value}")
        assert name in said or name.replace("-", "_") in said, (value, said)
        assert len(said) < 1500
    for value in ("-1", "nan"):
        assert name.replace("-", "_") in told(capsys, *command, flag, value).replace("-", "_")
    for second in ("3", "4"):
        assert "twice" in told(capsys, *command, flag, "3", f"{flag}={second}")
    assert "needs a value" in told(capsys, *command, flag)


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["run", "quickstart", "-sft.lr", "2e-5"], "--sft.lr"),
        (["run", "quickstart", "–sft.lr", "2e-5"], "hyphen"),
        (["run", "quickstart", "sft.lr", "2e-5"], "--sft.lr"),
        (["run", "quickstart", "sft.lr=2e-5"], "--sft.lr"),
        (["run", "mine.toml", "sft.lr=2e-5"], "--sft.lr"),
        (["run", "quickstart", "--dry-run=yes"], "stands alone"),
        (["run", "quickstart", "--dryrun"], "--dry-run"),
        (["run", "quickstart", "--restart", "--restart"], "twice"),
        (["run", "quickstart", "--data", "x.jsonl"], "--data.source"),
        (["run", "quickstart", "--sft.micro-batch-tokens", "9", "--sft.micro_batch_tokens", "9"], "twice"),
        (["run", "quickstart", "--data.source", "a", "--data.source", "b"], "twice"),
        (["run", "quickstart", "--data.columns", "a=b", "--data.columns", "a=c"], "twice"),
        (["run", "quickstart", "--folder="], "folder"),
        (["run", "quickstart", ""], "empty"),
        (["run", "--", "quickstart"], "no such flag"),
        (["run"], "none was given"),
        (["compare", "quick", "--only", "sft,,rl"], "--only"),
        (["compare", "quick", "--jobs"], "needs a value"),
        (["compare", "quick", "--folder", ""], "empty"),
        (["eval", "m", "--suite"], "needs a value"),
        (["eval", "m", "--suite", "a", "--suite", "b"], "twice"),
        (["eval", "--compare", "a"], "two or more"),
        (["eval", "m", "--tempreature", "1"], "--temperature"),
        (["eval", "m", "--backend", "other", "--suite", "gsm8k"], "--backend"),
        (["sample", "x", "--verdict"], "needs a value"),
        (["sample", "x", "--problem="], "empty"),
        (["doctor", "--pyton", "x"], "--python"),
        (["audit", "trl-sft", "--keep"], "needs a value"),
        (["serve", "a", "--port", "x"], "--port"),
        (["report", "--x"], "no such flag"),
        (["recipes", "quickstrat"], "quickstart"),
        (["methods", "grpo", "dapo"], "not 2"),
        (["check"], "none was given"),
        (["check", "m", "--data", "a.jsonl", "--data.source", "b.jsonl"], "twice"),
    ],
)
def test_a_mistyped_command_line_is_refused_with_the_flag(
    argv: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hint in told(capsys, *argv)


@pytest.mark.parametrize(
    "command", ["run", "check", "data", "compare", "eval", "sample", "report", "audit", "doctor", "methods", "recipes"]
)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_given_wherever_it_is_asked_for(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([command, flag], [command, "something", flag]):
        try:
            code = main(argv)
        except SystemExit as stop:
            code = stop.code
        assert code == 0
        assert f"thence {command}" in capsys.readouterr().out


def test_values_that_begin_with_a_dash_or_hold_one_are_read() -> None:
    from thence.cli.fields import take_fields

    _, overrides = take_fields(["--data.system", "- be brief", "--data.template=--x--", "--seed", "-1"])
    assert overrides == {"data.system": "- be brief", "data.template": "--x--", "seed": "-1"}
    assert take_fields(["--data.system", ""])[1] == {"data.system": ""}


def test_a_value_cannot_smuggle_in_another_field() -> None:
    with pytest.raises(UserError):
        load_recipe({"model": MODEL}, {"seed": "1\nname = 'x'"})


@pytest.mark.parametrize("port", ["0", "65536", "99999", "-1", "x", "", "1e3", "８０"])
def test_a_port_is_one(port: str) -> None:
    with pytest.raises(UserError, match="server"):
        vllm_settings({"server": f"127.0.0.1:{port}"}, "rl.vllm")


@pytest.mark.parametrize("table", ["options", "data", "vllm"])
def test_tables_of_a_users_own_keys_hold_no_nonsense(table: str) -> None:
    deep: Any = 1
    for _ in range(10_000):
        deep = {"a": deep}
    for value in (math.nan, -math.inf, 10**5000, deep):
        with pytest.raises(UserError, match=table):
            load_recipe({"model": MODEL, "stages": ["rl"], "rl": {table: {"limit": value}}})
