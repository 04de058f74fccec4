"""Reports: from finished, unfinished and damaged run folders, with hostile samples."""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from thence.errors import UserError
from thence.foreign_text import visible
from thence.pages.run.outcome import outcome
from thence.pages.run.page import write_page
from thence.pages.run.tables import results_table
from thence.pages.terminal import TableView
from thence.pipeline.run import method_labels
from thence.pipeline.run_files import read_run
from thence.recipe import load_recipe
from thence.toml import to_toml

HOSTILE = "</pre><script>alert(1)</script>{{ 7 * 7 }} \u202etxt.exe \x00\x1b[31m \ud800"


def metrics(steps: int) -> list[dict]:
    sft = [
        {"stage": "sft", "kind": "sft", "step": s, "loss": 1 / s, "grad_norm": 2.0, "lr": 1e-3, "trained_tokens": 10}
        | {"flops": 1e6, "seconds": 0.5, "tokens": 12, "entropy": 0.2}
        for s in range(1, steps + 1)
    ]
    for line in sft[:1]:
        line["held_out_loss"] = 1.5
    rl = [
        {"stage": "rl", "kind": "rl", "step": s, "loss": 0.0, "grad_norm": 0.1, "lr": 1e-4, "reward": s / 10}
        | {"response_tokens": 40, "clip_share": 0.01, "entropy": 0.1, "trained_tokens": 20, "seconds": 1.0}
        for s in range(1, steps + 1)
    ]
    return sft + rl


def result(stage: str, accuracy: float, half: float = 0.02, split: str = "test") -> dict:
    row = {"split": split, "temperature": 0.6, "problems": 512, "samples": 4, "accuracy": accuracy}
    row |= {"low": accuracy - half, "high": accuracy + half, "right": 100, "wrong": 410, "unknown": 2}
    return {"stage": stage, "rows": [row | {"mean_tokens": 41.5, "truncated": 7}]}


def make_run(folder: Path, base: float = 0.1, sft: float = 0.4, rl: float = 0.5, steps: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    tables = {"name": "trial", "model": {"path": "m"}, "stages": ["eval-base", "sft", "eval-sft", "rl", "eval-rl"]}
    (folder / "recipe.toml").write_text(to_toml(load_recipe(tables).resolved()))
    about = {"thence": "0.1.0", "git_commit": "abc123", "command": "thence run trial --seed 0", "threads": 2}
    (folder / "environment.json").write_text(json.dumps(about))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(steps)))
    for stage, accuracy in (("eval-base", base), ("eval-sft", sft), ("eval-rl", rl)):
        place = folder / "stages" / stage
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps(result(stage, accuracy)))
        rows = [
            {"stage": stage, "split": "test", "temperature": 0.6, "index": i, "prompt": "1+1?", "response": HOSTILE}
            | {
                "answer": "2",
                "verdict": ("right", "wrong", "unknown")[i % 3],
                "extracted": "2",
                "tokens": 3,
                "finish": "stop",
            }
            for i in range(30)
        ]
        (place / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Tags(HTMLParser):
    """Every start tag of a page, its attributes, and whether the tags nest."""

    void = frozenset({"meta", "br", "path", "use", "link"})

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def test_a_finished_run_has_table_curves_samples_recipe_and_command(tmp_path):
    page = write_page(make_run(tmp_path / "run", steps=5))
    text = page.read_text(encoding="utf-8")
    assert not Tags(text).open
    assert text.count('class="chart"') == 4 + 7
    for needed in (
        "8.0 to 12.0",
        "38.0 to 42.0",
        "n = 512 × 4",
        "thence run trial --seed 0",
        "abc123",
        "nats a trained token",
    ):
        assert needed in text, needed
    assert "Unfinished" not in text
    assert "5 steps, 50 trained tokens, 5e+06 FLOPs, 2.5 s" in text
    assert text.count('<b class="unknown">') == 9


def test_the_page_says_what_was_sampled_ahead_and_never_trained_and_draws_the_wait(tmp_path):
    folder = make_run(tmp_path / "run", steps=5)
    lines = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    last = max(i for i, line in enumerate(lines) if line["kind"] == "rl")
    for line in lines:
        line |= {"staleness": 1.0, "waited_share": 0.25} if line["kind"] == "rl" else {}
    for wasted, shown in ((1234, True), ("many", False)):
        lines[last] |= {"wasted_tokens": wasted}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        text = write_page(folder).read_text(encoding="utf-8")
        assert ("1,234 tokens sampled and never trained" in text) is shown
    assert "Waiting for responses" in text and "Age of the weights that sampled" in text


def test_the_page_says_what_was_sampled_and_is_in_no_batch(tmp_path):
    folder = make_run(tmp_path / "run", steps=2)
    assert "that no batch holds" not in write_page(folder).read_text(encoding="utf-8")
    lines = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"unused_tokens": 1200} if line["kind"] == "rl" else {}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "2,400 tokens sampled that no batch holds" in write_page(folder).read_text(encoding="utf-8")


def test_the_page_names_the_method_of_every_stage_and_says_what_is_a_reconstruction(tmp_path):
    folder = make_run(tmp_path / "run", steps=3)
    recipe = load_recipe("quickstart", {"sft.fault": "mean-of-means", "rl.method": "superrl"})
    labels = method_labels(recipe)
    (folder / "environment.json").write_text(json.dumps({"methods": labels}))
    page = write_page(folder).read_text()
    assert "sft with mean-of-means" in page and "superrl (reconstruction)" in page
    assert method_labels(load_recipe("quickstart")) == {"sft": "sft", "rl": "grpo"}


def test_the_page_needs_nothing_from_outside_and_runs_only_its_own_scripts(tmp_path):
    text = write_page(make_run(tmp_path / "run", steps=5)).read_text(encoding="utf-8")
    tags = Tags(text).found
    assert not {"img", "iframe", "link", "object"} & {tag for tag, _ in tags}
    allowed = re.findall(r"'sha256-([^']+)'", text[: text.index("</head>")])
    bodies = re.findall(r'<script type="module">(.*?)</script>', text, re.DOTALL)
    assert len(bodies) == 4
    assert allowed == [base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies]
    assert "default-src 'none'" in text and "unsafe-eval" not in text
    assert {a.get("type") for tag, a in tags if tag == "script"} == {"module", "application/json", "text/plain"}
    text = re.sub(r'<script type="module">.*?</script>', "", text, flags=re.DOTALL)
    for _, attributes in tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value.startswith("#"), (name, value)
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text


def test_model_output_is_shown_and_not_obeyed(tmp_path):
    text = write_page(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "{{ 7 * 7 }}" in text
    held = samples_of(text)
    assert "</pre><script>alert(1)</script>{{ 7 * 7 }} [U+202E]txt" in held["samples"][0][7]
    for shown in (text[: text.index('<script type="module">')], json.dumps(held, ensure_ascii=False)):
        assert "\u202e" not in shown and "[U+202E]" in shown
        assert "\x00" not in shown and "\u2400" in shown


def samples_of(page: str) -> dict:
    """What a page holds of its samples."""
    data = re.search(r'id="samples-data">([^<]*)<', page)
    assert data
    return json.loads(gzip.decompress(base64.b64decode(data[1])))


def test_a_page_holds_all_samples_with_what_they_can_be_filtered_by(tmp_path):
    held = samples_of(write_page(make_run(tmp_path / "run")).read_text())
    assert len(held["samples"]) == 90
    ids = [row[0] for row in held["samples"]]
    assert ids[:2] == ["sample-eval-base-1", "sample-eval-base-2"] and len(set(ids)) == 90
    assert {held["texts"][row[1]] for row in held["samples"]} == {
        f"eval-{model}, test, T = 0.6" for model in ("base", "sft", "rl")
    }
    assert {row[2] for row in held["samples"]} == {"right", "wrong", "unknown"}
    assert {row[4] for row in held["samples"]} == {3}


def test_hostile_names_in_recipe_and_results_are_escaped(tmp_path):
    run = make_run(tmp_path / "run")
    place = run / "stages" / "eval-rl" / "result.json"
    place.write_text(json.dumps(result("eval-rl", 0.5, split="<img src=x onerror=alert(1)>")))
    recipe = (run / "recipe.toml").read_text().replace('name = "trial"', 'name = "<script>x</script>"')
    (run / "recipe.toml").write_text(recipe)
    tags = {tag for tag, _ in Tags(write_page(run).read_text(encoding="utf-8")).found}
    assert "img" not in tags


@given(st.text(alphabet=st.characters(exclude_categories=[]), max_size=60))
def test_visible_text_can_always_be_written_and_keeps_plain_text(text):
    shown = visible(text)
    shown.encode("utf-8")
    assert not any(ord(c) < 0x20 and c not in "\n\t" for c in shown)
    assert visible("naïve 数学 \n\t∑") == "naïve 数学 \n\t∑"


@pytest.mark.parametrize(
    "sft, rl, words",
    [
        (0.40, 0.50, "do not overlap: rl is higher"),
        (0.50, 0.40, "do not overlap: rl is lower"),
        (0.40, 0.42, "overlap: these numbers alone do not tell the two apart"),
    ],
)
def test_the_outcome_says_no_more_than_the_intervals(tmp_path, sft, rl, words):
    run = make_run(tmp_path / "run", sft=sft, rl=rl)
    said = outcome(read_run(run))
    assert words in said
    assert f"{100 * rl:.1f}% (rl)" in said and "512 problems × 4 samples" in said


def test_without_intervals_no_claim_is_made(tmp_path):
    run = make_run(tmp_path / "run")
    for stage, accuracy in (("eval-sft", 0.1), ("eval-rl", 0.9)):
        content = result(stage, accuracy)
        del content["rows"][0]["low"]
        (run / "stages" / stage / "result.json").write_text(json.dumps(content))
    assert "nothing can be said" in outcome(read_run(run))


def test_an_unfinished_run_reports_what_is_there(tmp_path):
    run = make_run(tmp_path / "run", steps=5)
    (run / "stages" / "eval-rl" / "result.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:7]) + lines[7][:20])
    text = write_page(run).read_text(encoding="utf-8")
    assert "Unfinished: nothing yet from eval-rl." in text
    assert "1 unreadable line left out" in text
    assert "40.0% (sft)" in text


@pytest.mark.parametrize(
    "damage",
    [
        {},
        {"recipe.toml": "name = "},
        {"metrics.jsonl": "\n[1, 2]\nnot json\n{}\n", "environment.json": "["},
        {"metrics.jsonl": '{"stage": "sft", "step": 1, "loss": NaN, "lr": null, "grad_norm": "x"}\n'},
        {"stages/eval/result.json": '{"rows": [{"split": "a"}, 3, {"accuracy": 0.5}]}'},
        {"stages/eval/result.json": "null", "stages/eval/samples.jsonl": '{"verdict": "right"}\n{"verdict": 3}\n'},
    ],
)
def test_missing_and_broken_files_never_break_the_report(tmp_path, damage):
    for name, content in damage.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert not Tags(write_page(tmp_path).read_text(encoding="utf-8")).open
    json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert len(results_table(read_run(tmp_path)).rows) >= 0


def test_a_folder_that_is_not_there_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        write_page(tmp_path / "absent")


def test_steps_that_were_taken_twice_count_once_and_the_later_counts(tmp_path):
    run = make_run(tmp_path / "run", steps=5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "rl", "kind": "rl", "step": 5, "reward": 0.9, "trained_tokens": 30}) + "\n")
    rl = read_run(run).training[1]
    assert rl.series("reward") == ([1, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4, 0.9])
    assert rl.total("trained_tokens") == 4 * 20 + 30


def test_json_and_csv_hold_the_same_results(tmp_path):
    run = make_run(tmp_path / "run", steps=5)
    write_page(run)
    whole = json.loads((run / "report.json").read_text())
    with (run / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["subject"] for row in rows] == ["base", "sft", "rl"] == [cell["subject"] for cell in whole["results"]]
    assert [float(row["accuracy"]) for row in rows] == [cell["accuracy"] for cell in whole["results"]]
    assert len(whole["training"][0]["curve"]) == 5
    assert whole["training"][1]["trained_tokens"] == 100


def test_two_evaluations_of_one_model_share_a_row(tmp_path):
    tables = {"model": {"path": "m"}, "stages": ["sft", "eval-many", "eval-once", "rl", "eval-rl"]}
    (tmp_path / "recipe.toml").write_text(to_toml(load_recipe(tables).resolved()))
    for stage, split in (("eval-many", "AIME"), ("eval-once", "MATH"), ("eval-rl", "MATH")):
        place = tmp_path / "stages" / stage
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps(result(stage, 0.5, split=split)))
    run = read_run(tmp_path)
    assert run.subjects == ["sft", "rl"]
    assert run.columns == [("AIME", 0.6), ("MATH", 0.6)]
    table = results_table(run)
    assert [row.cells[0].text for row in table.rows] == ["50.0 (2 unknown)", "–", "512 x 4"]
    assert table.rows[0].cells[0].sub == "48.0 to 52.0"


def test_the_terminal_table_prints_models_by_split_and_temperature(tmp_path):
    console = Console(width=100)
    with console.capture() as captured:
        console.print(TableView(results_table(read_run(make_run(tmp_path / "run")))))
    printed = captured.get()
    assert "T = 0.6" in printed and "512 x 4" in printed
    assert re.search(r"rl\s+50\.0.*\n\s+48\.0 to 52\.0", printed)
    assert "±" not in printed  # an interval of a proportion is not symmetric


def test_the_same_run_gives_the_same_page(tmp_path):
    run = make_run(tmp_path / "run", steps=5)
    first = write_page(run).read_bytes()
    assert write_page(run).read_bytes() == first
