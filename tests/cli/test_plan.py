"""`thence plan`: what people and programs read of it, its exit codes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from thence.cli import main
from thence.toml import to_toml

SHORT = ["--stages", '["sft", "rl"]', "--data.limit", "64", "--rl.steps", "2"]


@pytest.fixture(autouse=True)
def anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def told(capsys: pytest.CaptureFixture[str], *given: str) -> tuple[int, dict[str, Any]]:
    code = main(["plan", *given, "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    return code, json.loads(line)


def test_a_plan_says_what_it_costs_and_what_it_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "quickstart", *SHORT, "--hardware", "h100x2", "--price", "3"]) == 0
    printed = capsys.readouterr().out
    for part in ("quickstart on h100 x 2", "607,104 parameters", "Budget", "Memory of one device", "key-value cache"):
        assert part in printed
    for part in ("Estimated time", "It fits", "Layouts that fit", "price", "reach 40%", "NVIDIA H100 datasheet"):
        assert part in printed
    assert "arithmetic" not in printed
    assert main(["plan", "quickstart", *SHORT, "--hardware", "h100x2", "--explain"]) == 0
    explained = capsys.readouterr().out
    assert "arithmetic" in explained and "607,104 parameters x 4 B" in " ".join(explained.split())


def test_a_program_reads_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = told(capsys, "quickstart", *SHORT, "--hardware", "h100x2", "--price", "3", "--utilisation", "0.2")
    assert code == 0 and found["event"] == "plan" and found["parameters"] == 607_104
    assert found["hardware"]["devices"] == 2 and found["hardware"]["price_per_hour"] == 3.0
    assert found["rates"]["training"] == 0.2 and found["unread"] is None
    given = found["as_given"]
    assert given["fits"] and given["settings"] == {} and found["remedies"] == []
    sft, rl = given["stages"]
    assert sft["rule_flops"] == 6 * 607_104 * sft["trained_tokens"]
    assert given["peak"] == max(stage["memory"]["peak"] for stage in (sft, rl))
    assert given["seconds"]["least"] <= given["seconds"]["most"]
    assert given["price"]["most"] == pytest.approx(given["seconds"]["most"] / 3600 * 2 * 3)
    assert {layout["layout"] for layout in found["layouts"]} >= {"ddp", "fsdp2"}
    _, slower = told(capsys, "quickstart", *SHORT, "--hardware", "h100x2", "--utilisation", "0.1")
    passes = [
        next(part["seconds"] for part in each["as_given"]["times"][0]["parts"] if "passes" in part["name"])
        for each in (found, slower)
    ]
    assert passes[1] == pytest.approx(2 * passes[0])


def test_what_does_not_fit_says_the_smallest_change(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Path("small.toml").write_text('like = "h100"\nname = "small"\nmemory_gb = 0.05\nper_node = 2\n')
    assert main(["plan", "quickstart", *SHORT, "--hardware", "small.toml"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "It does not fit as it is" in printed and "smallest change that makes it fit" in printed
    code, found = told(capsys, "quickstart", *SHORT, "--hardware", "small.toml")
    assert code == 1 and not found["as_given"]["fits"] and found["as_given"]["too_large"]
    best = found["remedies"][0]
    assert best["fits"] and best["keeps_result"] and best["peak"] <= best["room"]
    flags = [word for name, value in best["settings"].items() for word in (f"--{name}", str(value).lower())]
    assert main(["plan", "quickstart", *SHORT, "--hardware", "small.toml", *flags]) == 0


def test_a_cpu_has_no_times_and_shares_the_memory_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    _, one = told(capsys, "quickstart", *SHORT, "--hardware", "cpu")
    _, two = told(capsys, "quickstart", *SHORT, "--hardware", "cpux2")
    assert one["hardware"]["memory"] == 2 * two["hardware"]["memory"]
    assert one["as_given"]["seconds"] is None
    assert "the peak of cpu in float32" in one["as_given"]["times"][0]["unknown"]


def test_a_model_that_is_not_counted_is_called_so(capsys: pytest.CaptureFixture[str]) -> None:
    tables = {"stages": ["sft"], "model": {"init": {"model_type": "gpt2"}, "tokenizer": "world:chain"}}
    tables |= {"data": {"limit": 8}}
    Path("own.toml").write_text(to_toml(tables))
    assert main(["plan", "own.toml", "--hardware", "h100"]) == 1
    printed = capsys.readouterr().out
    assert "Whether it fits is not known" in printed and "models of type gpt2 are not counted" in printed
    assert "Layouts" not in printed


@pytest.mark.parametrize(
    ("given", "field", "remedy"),
    [
        ([], "", "thence plan --help"),
        (["quickstart"], "--hardware", "--hardware h100x8"),
        (["quickstart", "--hardware", "h10x8"], "--hardware", "did you mean h100x1"),
        (["quickstart", "--hardware", "h100x0"], "--hardware", "1 or more"),
        (["quickstart", "--hardware", "h100x8", "--rl.prompts", "7"], "rl.prompts", "divisible"),
        (["quickstart", "--hardware", "h100x8", "--parallel", "none"], "parallel", "auto"),
        (["quickstart", "--hardware", "h100x8", "--parallel", "hsdp"], "sharding.replicas", "divisor"),
        (
            ["quickstart", "--hardware", "h100x8", "--rl.engine", "vllm", "--rl.vllm.ranks-per-engine", "3"],
            "rl.vllm.ranks_per_engine",
            "divides 8",
        ),
        (["quickstart", "--hardware", "h100x2", "--rl.method", "nosuch"], "rl.method", "grpo"),
        (["quickstart", "--hardware", "h100x2", "--sharding.context", "2"], "packing", "packing = true"),
        (["quickstart", "--hardware", "h100x2", "--utilisation", "1.5"], "--utilisation", "at most 1"),
        (["nosuch", "--hardware", "h100x2"], "", "thence recipes"),
    ],
)
def test_what_makes_no_sense_is_refused_as_a_run_would(
    given: list[str], field: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*given, "--sft.packing", "false"] if "sharding.context" in " ".join(given) else given
    assert main(["plan", *given]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and field in printed.err and remedy in printed.err


def test_heads_that_cannot_be_dealt_and_4_bits_that_cannot_be_cut_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shared = ["--sharding.context", "8", "--stages", '["sft"]', "--sft.steps", "2"]
    assert main(["plan", "paper-qwen", "--hardware", "h100x8", *shared]) == 2
    assert "28 attention heads" in capsys.readouterr().err
    four = ["--model.lora.rank", "8", "--model.lora.quantize", "nf4", "--parallel", "fsdp2", "--stages", '["sft"]']
    assert main(["plan", "paper-qwen", "--hardware", "h100x8", *four]) == 2
    assert "cannot be cut" in capsys.readouterr().err
