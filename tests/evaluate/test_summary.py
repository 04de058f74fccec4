"""Tables, exports and pages say what the store of an evaluation holds."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import pytest

from tests.evaluate.counting import Counting, run, settings_of
from thence.cli import main
from thence.errors import UserError
from thence.evaluate.backends import Generation, Request
from thence.evaluate.run import regrade
from thence.evaluate.store import Store
from thence.evaluate.suites import Task
from thence.evaluate.summary import compare_evaluations, summarise
from thence.pages.evaluation.tables import comparison_tables, letters, notes, p_value
from thence.stats.multiplicity import holm


def test_numbers_of_a_known_case(tmp_path: Path, data: Path) -> None:
    store = run(tmp_path / "e", settings_of(data), Counting(right=lambda r: r.sample == 0 or r.problem.answer == "4"))
    row = summarise(store).tasks[0]
    assert row.avg is not None and row.majority is not None
    assert row.avg.value == pytest.approx((5 / 3 + 1) / 6)
    assert row.passed[3].value == 1.0 and row.passed[1].value == pytest.approx(row.avg.value)
    assert row.majority.value == pytest.approx(1 / 6)
    assert (row.right, row.wrong, row.unknown, row.mean_tokens) == (8, 10, 0, 7)
    assert (row.never, row.always) == (0, 1)


def test_problems_from_which_rl_learns_nothing_are_counted_and_said(tmp_path: Path, data: Path) -> None:
    store = run(tmp_path / "e", settings_of(data), Counting(right=lambda r: r.problem.answer in "45" and r.sample != 1))
    row = summarise(store).tasks[0]
    expected = sum(share == 0 for share in row.shares.values())
    assert 0 < row.never == expected < 6 and row.always == 0
    assert f"sums {expected / 6:.0%} / 0%" in " ".join(notes(summarise(store)))


def test_an_unfinished_evaluation_counts_complete_problems_only_and_says_so(tmp_path: Path, data: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "e", settings_of(data), Counting(stop_after=8))
    regrade(tmp_path / "e")
    result = summarise(Store(tmp_path / "e"))
    assert len(result.tasks[0].shares) == 2 and result.tasks[0].expected == 6
    assert result.missing == 10


def test_regrading_needs_no_model_and_keeps_both_grades(tmp_path: Path, data: Path) -> None:
    store = run(tmp_path / "e", settings_of(data), Counting())
    before = (store.folder / "samples" / "sums.jsonl").read_bytes()
    own = tmp_path / "never.py"
    own.write_text("def reward(prompt, response, answer):\n    return 0.0 if '+0' in prompt else 1.0\n")
    regrade(store.folder, f"{own}:reward")
    assert (store.folder / "samples" / "sums.jsonl").read_bytes() == before
    row = summarise(store, f"{own}:reward").tasks[0]
    assert row.right == 15 and row.versions[0].startswith("sha256 ")
    assert summarise(store).tasks[0].right == 18
    with pytest.raises(UserError, match="graded by math"):
        summarise(store, "math")


def test_degrees_of_a_grader_are_a_mean_reward_everywhere_and_no_share_of_right_answers(
    tmp_path: Path, data: Path
) -> None:
    from rich.console import Console

    from thence.evaluate.export import write_exports
    from thence.pages.evaluation.page import write_page
    from thence.pages.evaluation.tables import results_table
    from thence.pages.terminal import with_notes

    own = tmp_path / "degrees.py"
    own.write_text("def reward(prompt, response, answer):\n    return 2.5 if '+0' in prompt else None\n")
    store = run(tmp_path / "e", settings_of(data, grader=f"{own}:reward"), Counting())
    result = summarise(store)
    (row,) = result.tasks
    assert (row.avg, row.passed, row.majority) == (None, {}, None)
    assert (row.right, row.wrong, row.graded, row.unknown) == (0, 0, 3, 15)
    assert row.reward is not None and (row.reward.value, row.reward.problems) == (2.5, 1)
    console = Console(width=200, record=True)
    console.print(with_notes(results_table(result)))
    table = console.export_text()
    assert "Mean reward" in table and "2.5" in table and "Right answers" not in table
    write_exports(store, result)
    found = json.loads((store.folder / "results.json").read_text())
    assert found["results"]["sums"]["mean_reward,none"] == 2.5
    assert not any("exact_match" in key for key in found["results"]["sums"])
    assert "mean reward" in write_page(store, result).read_text()
    again = run(tmp_path / "f", settings_of(data, "other", grader=f"{own}:reward"), Counting())
    with pytest.raises(UserError, match=r"no shares of right answers[\s\S]*right_from"):
        compare_evaluations(store, again)


def test_a_new_version_of_the_grader_replaces_old_grades(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = run(tmp_path / "e", settings_of(data), Counting())
    monkeypatch.setattr("thence.evaluate.run.grader_version", lambda grader, right_from: "newer")
    run(tmp_path / "e", settings_of(data), Counting())
    assert summarise(store).tasks[0].versions == ("newer",)


def test_paired_differences_of_two_models(tmp_path: Path, data: Path) -> None:
    a = run(tmp_path / "a", settings_of(data, "a"), Counting(right=lambda r: r.sample == 0))
    b = run(tmp_path / "b", settings_of(data, "b"), Counting(right=lambda r: r.sample <= int(r.problem.answer) % 3))
    row = compare_evaluations(a, b).rows[0]
    expected = [sum(s <= (2 * i) % 3 for s in range(3)) / 3 - 1 / 3 for i in range(6)]
    assert row.paired.difference == pytest.approx(sum(expected) / 6)
    assert row.paired.low < row.paired.difference < row.paired.high and row.paired.problems == 6
    assert compare_evaluations(a, b).unlike == ()


def test_several_evaluations_are_compared_with_the_first_and_corrected_together(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    rights = {"a": lambda r: False, "b": lambda r: True, "c": lambda r: r.sample == 0}
    stores = [run(tmp_path / name, settings_of(data, name), Counting(right=right)) for name, right in rights.items()]
    found = [compare_evaluations(stores[0], other) for other in stores[1:]]
    tables = comparison_tables(found)
    alone = [comparison.rows[0].paired.p_value for comparison in found]
    assert [table.rows[0].cells[-1].text for table in tables] == [p_value(p) for p in holm(alone)]
    assert holm(alone) != alone, "else nothing is shown"
    assert [table.headers[3] for table in tables] == ["B", "C"]
    assert main(["eval", "--compare", *(str(store.folder) for store in stores)]) == 0
    said = capsys.readouterr().out
    assert "B minus A" in said and "C minus A" in said and "+33.3" in said and "2 tests (Holm)" in said
    assert main(["eval", "--compare", str(stores[0].folder)]) == 2
    assert "two or more" in capsys.readouterr().err


def test_letters_go_on_after_the_alphabet() -> None:
    assert list(islice(letters(24), 4)) == ["Y", "Z", "AA", "AB"]


def test_comparing_names_what_else_differs_and_refuses_other_problems(tmp_path: Path, data: Path) -> None:
    a = run(tmp_path / "a", settings_of(data, "a"), Counting())
    b = run(tmp_path / "b", settings_of(data, "b", temperature=1.0, template="boxed"), Counting())
    assert {name for name, _, _ in compare_evaluations(a, b).unlike} == {
        "sums: temperature",
        "sums: template",
        "sums: prompts",
    }
    few = run(tmp_path / "few", settings_of(data, "c", limit=3), Counting())
    with pytest.raises(UserError, match="different problems"):
        compare_evaluations(a, few)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "half", settings_of(data, "d"), Counting(stop_after=3))
    with pytest.raises(UserError, match="not finished"):
        compare_evaluations(a, Store(tmp_path / "half"))


def test_multiple_choice_has_a_lenient_column(tmp_path: Path) -> None:
    file = tmp_path / "letters.jsonl"
    rows = [{"question": f"Which, {i}?\n\nA) this\nB) that", "answer": "A"} for i in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    class Careless(Counting):
        def generate(self, requests: Sequence[Request], task: Task) -> Iterator[tuple[Request, Generation]]:
            yield from ((request, Generation("ANSWER: A", 3, "stop")) for request in requests)

    row = summarise(run(tmp_path / "e", settings_of(file, samples=1, choices=True), Careless())).tasks[0]
    assert row.avg is not None and row.lenient is not None
    assert (row.avg.value, row.lenient.value) == (0.0, 1.0)


def test_exports_hold_the_same_numbers_in_the_harness_layout(tmp_path: Path, data: Path) -> None:
    from thence.evaluate.export import write_exports

    store = run(tmp_path / "e", settings_of(data), Counting(right=lambda r: r.sample < 2))
    result = summarise(store)
    written = write_exports(store, result)
    avg = result.tasks[0].avg
    assert avg is not None

    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    found = json.loads((store.folder / "results.json").read_text(), parse_constant=no_constants)
    top = {"results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config", "date", "git_hash"}
    assert top <= set(found)
    assert found["results"]["sums"]["exact_match,none"] == avg.value == pytest.approx(2 / 3)
    assert found["results"]["sums"]["exact_match_stderr,none"] == avg.standard_error
    assert found["n-samples"]["sums"] == {"original": 6, "effective": 6}
    assert found["configs"]["sums"]["repeats"] == 3
    lines = [json.loads(line) for path in written if path.suffix == ".jsonl" for line in path.read_text().splitlines()]
    assert len(lines) == 6 and {len(line["resps"][0]) for line in lines} == {3}
    assert lines[0]["exact_match"] == pytest.approx(2 / 3) and lines[0]["target"] == "0"
    with (store.folder / "results.csv").open() as file:
        row = next(csv.DictReader(file))
    assert float(row["avg"]) == avg.value and row["task"] == "sums" and row["seed"] == "0"


def test_the_page_needs_nothing_else_and_escapes_what_models_say(tmp_path: Path, data: Path) -> None:
    from thence.pages.evaluation.page import write_page

    class Hostile(Counting):
        def generate(self, requests: Sequence[Request], task: Task) -> Iterator[tuple[Request, Generation]]:
            yield from ((request, Generation("<script>alert(1)</script>\x1b[2J", 3, "length")) for request in requests)

    store = run(tmp_path / "e", settings_of(data), Hostile())
    text = write_page(store, summarise(store)).read_text()
    assert "<script>" not in text and "\x1b" not in text and "&lt;script&gt;" in text
    assert "default-src 'none'" in text, "scripts of the page itself alone run, by their hashes"
    text = re.sub(r'<script type="module">.*?</script>', "", text, flags=re.DOTALL)
    assert "src=" not in text and "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")
