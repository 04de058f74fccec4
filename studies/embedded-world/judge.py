"""Hold the study's predictions, written down before its runs, against its results.

    python studies/embedded-world/judge.py [FOLDER]

reads FOLDER/results.json (default: runs/embedded-world; without it the results kept beside this file) and writes,
beside this file, results.json, the report (report.html, runs.csv, summary.csv), verdicts.json, verdicts.md, scores.md
and score-against-flops.png.

    python studies/embedded-world/judge.py --seeds 0,1,2,3

prints the verdicts of these seeds alone, from the results kept here, and writes nothing.

    python studies/embedded-world/judge.py --kept FOLDER

puts the results kept here into FOLDER, once they were read, where it has none of its own.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from thence.compare.result import RESULTS, Comparison, Run, read_results, results_json
from thence.compare.sections import ScoreAgainstFlops
from thence.compare.statistics import Difference, Statistics, statistics
from thence.errors import UserError
from thence.files import to_json, write_atomically
from thence.pages.comparison.figures import section_figures
from thence.pages.comparison.page import write_page
from thence.pages.figure import LIGHT, still

HERE = Path(__file__).parent
DIGITS = 5  # of the curves that are kept
IN_FIGURE = ("base", "sft", "both-8", "sft-then-rl", "sft-then-rl-short", "broken-then-rl", "rl", "luffy", "relift")
IN_FIGURE += ("srft", "prefix-rft", "hpt")


def main() -> None:
    """Read, judge, write."""
    if sys.argv[1:2] == ["--seeds"]:
        print_verdicts_of({int(seed) for seed in sys.argv[2].split(",")})
        return
    if sys.argv[1:2] == ["--kept"]:
        hand_over(Path(sys.argv[2]))
        return
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/embedded-world")
    comparison = read_results(folder if (folder / RESULTS).exists() else HERE)
    refuse_loss(comparison, folder)
    predictions = tomllib.loads((HERE / "predictions.toml").read_text(encoding="utf-8"))
    found = statistics(comparison)
    verdicts = judge(found, predictions)
    write_atomically(HERE / RESULTS, results_json(rounded(comparison)))
    write_page(HERE)
    (HERE / "report.json").unlink()  # what it holds is in results.json and summary.csv
    write_atomically(HERE / "verdicts.json", to_json(verdicts, indent=1) + "\n")
    write_atomically(HERE / "verdicts.md", as_markdown(verdicts, comparison))
    write_atomically(HERE / "scores.md", scores(found))
    draw(found, HERE / "score-against-flops.png")
    print(as_markdown(verdicts, comparison))


def draw(found: Statistics, path: Path) -> None:
    """The picture of the README: score against FLOPs, a panel a base."""
    import vl_convert

    section = ScoreAgainstFlops(kind="score-against-flops", arms=list(IN_FIGURE))
    panels = [
        {**still(chart.spec, LIGHT), "title": figure.title, "width": 620, "height": chart.height - 60}
        for figure in section_figures(section, found)
        for chart in figure.charts
    ]
    if not panels:
        print("no figure yet: no finished run to draw", file=sys.stderr)
        return
    spec = {"vconcat": panels, "background": LIGHT.paper, "config": panels[0].pop("config")}
    spec["vconcat"] = [{key: value for key, value in panel.items() if key != "config"} for panel in panels]
    path.write_bytes(vl_convert.vegalite_to_png(spec, scale=2))


def hand_over(folder: Path) -> None:
    """Copy the kept results into a folder without any. Raises UserError where they cannot be read."""
    if (HERE / RESULTS).exists() and not (folder / RESULTS).exists():
        read_results(HERE)
        write_atomically(folder / RESULTS, (HERE / RESULTS).read_text(encoding="utf-8"))


def refuse_loss(comparison: Comparison, folder: Path) -> None:
    """Raise UserError where the results kept here cannot be read, or have runs that the new ones lack."""
    if not (HERE / RESULTS).exists():
        return
    kept, new = ({(r.arm, r.base, r.seed) for r in c.runs} for c in (read_results(HERE), comparison))
    if lost := sorted(kept - new):
        raise UserError(
            f"{len(lost)} runs that are kept here are not in the results of {folder}, the first {lost[0]}",
            remedy="finish the comparison with `make study`, or rename the kept file",
            file=HERE / RESULTS,
        )


def print_verdicts_of(seeds: set[int]) -> None:
    """What the kept results would say if these seeds were all."""
    kept = read_results(HERE)
    runs = tuple(run for run in kept.runs if run.seed in seeds)
    some = replace(kept, runs=runs, seeds=tuple(sorted(seeds)))
    predictions = tomllib.loads((HERE / "predictions.toml").read_text(encoding="utf-8"))
    print(as_markdown(judge(statistics(some), predictions), some))


def judge(found: Statistics, predictions: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One verdict a prediction and base; p-values are corrected over the predictions of a base."""
    comparison = found.comparison
    column = comparison.columns[0]
    verdicts = []
    for base in comparison.bases:
        made = {name: p for name, p in predictions.items() if base in p["bases"]}
        ordered = {name: (p["better"], p["worse"]) for name, p in made.items() if "better" in p}
        differences = dict(zip(ordered, found.pairs(base, column, list(ordered.values())), strict=True))
        for name, prediction in made.items():
            if "equal" in prediction:
                verdict, numbers = equal(comparison, base, *prediction["equal"]), {}
            else:
                difference = differences[name]
                verdict = called(difference)
                agreeing = seeds_with_sign(comparison, base, *ordered[name])
                numbers = {} if difference is None else {**asdict(difference), "agreeing": agreeing}
            verdicts.append(
                {
                    "prediction": name,
                    "base": base,
                    "says": prediction["says"],
                    "source": prediction["source"],
                    "verdict": verdict,
                    **numbers,
                }
            )
    return verdicts


def called(difference: Difference | None) -> str:
    """The rule of predictions.toml."""
    if difference is None or difference.seeds < 2:
        return "not measured"
    if not difference.significant:
        return "undecided"
    return "held" if difference.mean > 0 else "failed"


def seeds_with_sign(comparison: Comparison, base: str, better: str, worse: str) -> int:
    """On how many seeds the first arm scores higher, in the headline column. No test; for the reader."""
    column = comparison.columns[0]
    of = [{r.seed: m.accuracy for r in comparison.runs_of(a, base) if (m := r.on(column))} for a in (better, worse)]
    return sum(of[0][seed] > of[1][seed] for seed in of[0].keys() & of[1].keys())


def equal(comparison: Comparison, base: str, one: str, other: str) -> str:
    """Whether two arms answered every problem alike with every seed that both have."""
    runs = {run.seed: run for run in comparison.runs_of(one, base)}
    pairs = [(runs[run.seed], run) for run in comparison.runs_of(other, base) if run.seed in runs]
    if not pairs:
        return "not measured"
    return "held" if all(answers(a) == answers(b) for a, b in pairs) else "failed"


def answers(run: Run) -> list[tuple[int, ...]]:
    """Right samples of every problem on every test set."""
    return [measured.right for measured in run.measured]


def rounded(comparison: Comparison) -> Comparison:
    """The same with curves of a few digits, and none of the tries', to be kept."""

    def short(values: Sequence[float | None]) -> tuple[float | None, ...]:
        return tuple(None if v is None else float(f"{v:.{DIGITS}g}") for v in values)

    runs = tuple(replace(r, curve={key: short(values) for key, values in r.curve.items()}) for r in comparison.runs)
    tuning = tuple(replace(r, curve={}) for r in comparison.tuning_runs)
    return replace(comparison, runs=runs, tuning_runs=tuning)


def as_markdown(verdicts: Sequence[Mapping[str, Any]], comparison: Comparison) -> str:
    """A table a base."""
    column = comparison.columns[0]
    parts = [
        "# Predictions and verdicts",
        f"Made by judge.py from {len(comparison.runs)} runs, seeds {list(comparison.seeds)}; "
        f"{comparison.pending} runs are still to come. Differences are in points of accuracy on {column.split} at "
        f"temperature {column.temperature:g}, paired by seed and problem, with 95% intervals; p is corrected (Holm) "
        "over the predictions of a base.",
    ]
    for base in comparison.bases:
        own = [v for v in verdicts if v["base"] == base]
        counts = {word: sum(v["verdict"] == word for v in own) for word in dict.fromkeys(v["verdict"] for v in own)}
        parts.append(f"## {base}: " + ", ".join(f"{n} {word}" for word, n in counts.items()))
        rows = ["| prediction | source | difference | p | sign as predicted | verdict |", "|---|---|---|---|---|---|"]
        for v in own:
            numbers = ("–", "–", "–")
            if "mean" in v:
                interval = f"{100 * v['mean']:+.1f} ({100 * v['low']:+.1f} to {100 * v['high']:+.1f})"
                numbers = (interval, f"{v['corrected']:.2g}", f"{v['agreeing']} of {v['seeds']} seeds")
            rows.append(f"| {v['says']} | {v['source']} | {' | '.join(numbers)} | **{v['verdict']}** |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def scores(found: Statistics) -> str:
    """Every arm on both bases: accuracy in every column, what tuning chose, cost, as Markdown."""
    comparison = found.comparison
    names = [f"{column.split}, T = {column.temperature:g}" for column in comparison.columns]
    parts = [
        "# Scores",
        f"Made by judge.py from {len(comparison.runs)} runs. Accuracy in %, mean over seeds with 95% interval over "
        "problems and seeds; by seed: the first column, seed by seed; training FLOPs from the base on, by the rule "
        "and as executed; mean length of a response, in tokens, in "
        f"{names[0]}.",
    ]
    for base in comparison.bases:
        rows = [
            f"| arm | {' | '.join(names)} | by seed | tuned | rule FLOPs | executed | tokens |",
            "|---" * (len(names) + 6) + "|",
        ]
        for arm in comparison.arms:
            runs = comparison.runs_of(arm.name, base)
            if not runs:
                continue
            estimates = [found.estimates[arm.name, base, column] for column in comparison.columns]
            cells = [f"{100 * e.mean:.1f} ({100 * e.low:.1f} to {100 * e.high:.1f})" for e in estimates]
            measured = [m for r in runs if (m := r.on(comparison.columns[0]))]
            executed = [r.spent.executed_flops for r in runs if r.spent.executed_flops is not None]
            costs = [sum(r.spent.rule_flops for r in runs) / len(runs), sum(executed) / max(len(executed), 1)]
            cells += [
                " ".join(f"{100 * m.accuracy:.0f}" for m in measured),
                ", ".join(f"{key} {value:g}" for key, value in runs[0].settings.items()) or "–",
                *(f"{cost:.2e}" for cost in costs),
                f"{sum(m.mean_tokens for m in measured) / len(measured):.0f}",
            ]
            rows.append(f"| {arm.title} | {' | '.join(cells)} |")
        parts += [f"## {base}", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"judge.py: {error}")
