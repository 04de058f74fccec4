# ruff: noqa: E501 - rows of tables
"""docs/models.md, written from the results of the model matrix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

INTRO = """# Models

Which of transformers' causal language models thence trains, samples and saves, tried one by one. This page is written
by a program; do not edit it by hand:

    .venv/bin/python benchmarks/model_matrix.py --jobs 2 --write        # all of them, some minutes
    .venv/bin/python benchmarks/model_matrix.py --only mistral,gpt_oss  # some of them, nothing is written
    .venv/bin/python -m pytest tests/models/test_models.py              # the families that the tests run

Every architecture is small: random weights, a hidden size of {hidden}, one layer of each kind that it has, windows of {window}
tokens, and biases, norms and attention sinks that are not zero. Rows are longer than the window. Everything is compared
with the unchanged model: opened by `AutoModelForCausalLM.from_pretrained`, run in float64, one row at a time, without
padding, packing or cache.

| column | what it tests |
|---|---|
| open | `load_model` opens the folder, and finds the saved weights bit by bit |
| step | `train_step` on padded rows of different lengths, in several micro-batches: loss and every trained token's log-probability to {logp:g} nats, the whole gradient and each parameter's to {gradient:g} of its length, in float64; and in float32 to {logp_float32:g} and {gradient_float32:g} |
| packed | the same with `packing = true`; afterwards the model's logits, and a padded step, are as before |
| sampled | prompts of several lengths, each three times, some rows ending early: log-probabilities of sampled tokens, and the choice of greedy ones, to {sampled:g} nats (float32 weights) |
| checkpoint | stopped after a step and resumed in a fresh model: the same bits, and the same bits one step later |
| published | the trained model opens in transformers with the same logits bit by bit, and tied weights stay tied |
| lora | an adapter of peft |

| word | what it means |
|---|---|
| works | everything that the column tests holds |
| refused | thence refuses the model before it trains, with a reason and a remedy: see below |
| wrong | something differs by more than the tolerance, without a message |
| traceback | an exception that is not meant for a user |
| not yet | a package is not installed, or code is not written |

"""


def write_page(report: dict[str, Any], path: Path) -> None:
    """Write the page; what a person wrote under "Siblings" stays."""
    from tests.models import tiny_models

    kept = _siblings(path)
    tolerances, versions = report["tolerances"], report["versions"]
    head = INTRO.format(hidden=tiny_models.HIDDEN, window=tiny_models.WINDOW, **tolerances)
    lines = [
        head.rstrip("\n"),
        "",
        f"Measured with transformers {versions['transformers']}, torch {versions['torch']}, Python "
        f"{versions['python']}, on a CPU, seed {report['seed']}.",
        "",
        *_counts(report),
        "",
        "## Architectures",
        "",
        *_table({kind: m for kind, m in report["models"].items() if "cells" in m}),
        "",
        *_reasons(report["models"]),
        *_not_made(report["models"]),
        kept,
    ]
    path.write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")


def _counts(report: dict[str, Any]) -> list[str]:
    words = ["works", "refused", "wrong", "traceback", "not yet", "not run"]
    lines = ["| | " + " | ".join(words) + " |", "|---|" + "---:|" * len(words)]
    for cell, counts in report["counts"].items():
        lines.append(f"| {cell} | " + " | ".join(str(counts.get(word, 0)) for word in words) + " |")
    return lines


def _table(models: dict[str, Any]) -> list[str]:
    names = list(next(iter(models.values()))["cells"])
    lines = ["| architecture | class | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for kind, model in models.items():
        words = (
            f"**{w}**" if (w := model["cells"][name]["verdict"]) in ("wrong", "traceback") else w for name in names
        )
        lines.append(f"| {kind} | {model['class']} | " + " | ".join(words) + " |")
    return lines


def _reasons(models: dict[str, Any]) -> list[str]:
    """Architectures by cell and by reason, for all that do not work."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for kind, model in models.items():
        cells = model.get("cells", {})
        for name, cell in cells.items():
            if cell["verdict"] in ("works", "not yet", "not run"):
                continue
            reason = " ".join(cell["detail"].replace(model["class"], "the model").split()).replace("|", "\\|")
            reason = re.sub(r"off by [0-9.e+-]+", "off", reason)  # how far is in the JSON
            opening = name != "open" and cells["open"]["detail"] == cell["detail"]
            if not opening:
                found.setdefault((name, cell["verdict"], reason), []).append(kind)
    lines = ["## Reasons", "", "A model that is refused at opening is refused in every column.", ""]
    lines += ["| column | word | reason | architectures |", "|---|---|---|---|"]
    order = sorted(found.items(), key=lambda item: (list(_order(models)).index(item[0][0]), item[0][1], -len(item[1])))
    for (name, verdict, reason), kinds in order:
        lines.append(f"| {name} | {verdict} | {reason} | {', '.join(kinds)} |")
    return [*lines, ""]


def _order(models: dict[str, Any]) -> list[str]:
    return list(next(m["cells"] for m in models.values() if "cells" in m))


def _not_made(models: dict[str, Any]) -> list[str]:
    lines = ["## Not tried", "", "These have no tiny model:", "", "| architecture | class | why |", "|---|---|---|"]
    lines += [f"| {kind} | {m['class']} | {m['made']} |" for kind, m in models.items() if "made" in m]
    return [*lines, ""]


def _siblings(path: Path) -> str:
    """The part of the page that a person writes."""
    mark = "## Siblings"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return mark + text.split(mark, 1)[1] if mark in text else f"{mark}\n"
