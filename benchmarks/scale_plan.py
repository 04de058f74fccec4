"""The tables of docs/scale-plan.md: 7B on 16 GPUs, 70B on 256, and where the design strains at 1,000 and 10,000.

    python benchmarks/scale_plan.py                     # print them
    python benchmarks/scale_plan.py --write             # put them into the page

Arithmetic alone: the plans of ``thence plan``, and failures by the rate of the Llama 3 report. Nothing was measured
on a GPU. The constants below are what is assumed beside the plan.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thence.accounting.budget import plan
from thence.accounting.choices import LayoutEstimate, Planning, with_rows
from thence.accounting.estimate import PASSES, Rates, StageTime
from thence.accounting.hardware import Hardware, parse_hardware
from thence.accounting.planned import Plan
from thence.accounting.remedies import remedies
from thence.recipe import Recipe, Rl, load_recipe

PAGE = Path(__file__).resolve().parents[1] / "docs/scale-plan.md"
FAILURES, DAYS, DEVICES = 419, 54, 16_384
"""Unexpected interruptions of a job, in so many days, on so many GPUs: arXiv 2407.21783, section 3.3.4."""
WRITTEN = 1e9
"""Bytes a second that one rank writes to the file system that all ranks share: assumed."""
RESTART = 600.0
"""Seconds from a failure to the first step of the resumed run: assumed."""
EVERY = 10
"""Steps between checkpoints: the default of a recipe."""
SPREAD = 0.02
"""Standard deviation of a rank's time for the same work, as a share of it: assumed."""
SEVENTY = {"model.path": "meta-llama/Llama-3.1-70B"}
H256 = "h100x8x32"
LARGE = ("h100x8x2", "h100x8x32", "h100x8x125", "h100x8x1250")


def planned(recipe: Recipe, hardware: Hardware) -> Plan:
    """The plan of a recipe with GRPO: every response once, and one pass for the old log-probabilities."""
    stages = {name: recipe.stage(name) for name in recipe.stages}
    passes = {name: float(rl.mini_batch not in (None, rl.prompts)) for name, rl in stages.items() if isinstance(rl, Rl)}
    return plan(recipe, ranks=hardware.ranks, device_bytes=hardware.device.memory, passes=passes)


PLANNING = Planning(planned, lambda recipe, hardware: "", Rates(), 0.1)


def bill(origin: str, hardware: str, **changes: Any) -> LayoutEstimate:
    """A shipped recipe with changes on hardware, sampling as many responses in parallel as fit.

    Args:
        changes: fields with two underscores for a dot.
    """
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return with_rows(load_recipe(origin, named), parse_hardware(hardware), PLANNING, {})


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


def hours(seconds: float) -> str:
    if seconds >= 360:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:,.2g} s"


def span(time: StageTime) -> str:
    if time.least is None or time.most is None:
        return "not known"
    least, most = hours(time.least), hours(time.most)
    return least if least == most else f"{least} to {most}"


def stage_time(found: LayoutEstimate, name: str) -> StageTime:
    return next(time for time in found.times if time.name == name)


def seconds_of(time: StageTime, *names: str, beside: bool | None = None) -> float:
    """Seconds of parts of a stage."""
    return sum(p.seconds for p in time.parts if (p.name in names if names else p.beside is beside))


def paper() -> str:
    """The paper's run: SFT, then 50 or 500 steps of RL, on 16 GPUs of three kinds."""
    rows = []
    for hardware in ("gh200x16", "h200x16", "h100x16"):
        for steps in (50, 500):
            rate = {"rl__lr": 5e-6} if steps == 50 else {}
            found = bill("paper-qwen", hardware, stages=["sft", "rl"], rl__steps=steps, **rate)
            sft, rl = found.plan.stages
            assert sft.rule_flops and rl.rule_flops and rl.rollout_rows
            figures = [f"{sft.rule_flops:.3g}", f"{rl.rule_flops:.3g}", gib(found.peak), f"{rl.rollout_rows}"]
            rows.append([hardware, str(steps), *figures, *(span(time) for time in found.times)])
    heads = ["hardware", "RL steps", "SFT FLOPs, rule", "RL FLOPs, rule", "memory, at most", "`rollout_rows` that fit"]
    return table([*heads, "SFT", "RL"], rows)


def seventy() -> str:
    """70B on 256 GPUs: what a rank holds, by stage."""
    rows = []
    for name, recipe in (("SFT", "sft"), ("RL", "rl")):
        changes = {"stages": [recipe], "model__path": SEVENTY["model.path"], "sft__batch": 256, "rl__prompts": 512}
        changes |= {"rl__mini_batch": 256, "rl__rollout_rows": 1, "sft__micro_batch_tokens": 8192}
        changes |= {"rl__micro_batch_tokens": 8192}
        found = bill("paper-llama", H256, **changes)
        memory = found.plan.stages[0].memory
        assert memory is not None
        largest = sorted(memory.lines, key=lambda line: -line.bytes)[:3]
        what = "; ".join(f"{line.name} {gib(line.bytes)}" for line in largest)
        made = remedies(load_recipe("paper-llama", {key.replace("__", "."): v for key, v in changes.items()}),
                        parse_hardware(H256), PLANNING)  # fmt: skip
        answer = "fits" if found.fits else made[0].moves[0].what if made else "nothing that was tried makes it fit"
        rows.append([name, gib(memory.peak), what, answer, span(found.times[0]) if found.fits else "–"])
    return table(["stage", "memory, at most", "the three largest", "plan", "time"], rows)


def communication() -> str:
    """A step of SFT at 70B: computing beside messages, with a batch that stays, and one that grows with the ranks."""
    rows = []
    for kind in ("stays", "grows"):
        for hardware in LARGE[1:]:
            ranks = parse_hardware(hardware).ranks
            batch = 1024 if kind == "stays" else 4 * ranks
            common = {"stages": ["sft"], "model__path": SEVENTY["model.path"], "sft__batch": batch, "sft__steps": 10}
            cells = []
            for parallel, replicas in (("fsdp2", 1), ("hsdp", ranks // 64)):
                if ranks % 64:
                    replicas = ranks // 40  # 1,000 ranks: groups of 5 nodes; 10,000: the same
                more = {"parallel": parallel, "sharding__replicas": replicas if parallel == "hsdp" else 1}
                found = bill("paper-llama", hardware, **common, sft__micro_batch_tokens=8192, **more)
                time = found.times[0]
                computing, beside = seconds_of(time, PASSES) / 10, seconds_of(time, beside=True) / 10
                cells += [f"{computing:,.2g} s", f"{beside:,.2g} s", "yes" if found.fits else "no"]
            rows.append([f"{ranks:,}", f"{batch:,}, {kind}", *cells[:3], *cells[4:]])
    heads = ["ranks", "rows a step", "computing", "messages, `fsdp2`", "fits", "messages, `hsdp`", "fits"]
    return table(heads, rows)


def rollouts() -> str:
    """The share of sampling in a step of RL at 7B, as ranks grow and the batch does not."""
    rows = []
    for hardware, prompts in zip(LARGE, (128, 256, 1000, 10_000), strict=True):
        ranks = parse_hardware(hardware).ranks
        batch = {"rl__steps": 1, "rl__prompts": prompts, "rl__mini_batch": prompts}
        time = bill("paper-qwen", hardware.replace("h100", "h200"), stages=["rl"], **batch).times[0]
        assert time.least is not None and time.most is not None
        share = f"{seconds_of(time, 'sampling') / time.most:.0%}"
        each = f"{prompts * 8 / ranks:,.0f}"
        rows.append([f"{ranks:,}", f"{prompts:,} x 8", each, hours(time.least), hours(time.most), share])
    heads = ["ranks", "responses a step", "a rank", "step, all of mean length", "step, one of the longest", "sampling"]
    return table(heads, rows)


def failures() -> str:
    """Checkpoints of 70B against failures: what is lost to both."""
    each = FAILURES / (DAYS * 24 * 3600 * DEVICES)  # a second and a device
    counts = planned(load_recipe("paper-llama", SEVENTY), parse_hardware(H256)).counts
    assert counts is not None
    rows = []
    for hardware in LARGE:
        ranks = parse_hardware(hardware).ranks
        between, write = 1 / (each * ranks), 12 * counts.total / ranks / WRITTEN
        best = math.sqrt(2 * write * between)
        lost = write / best + (best / 2 + RESTART) / between
        beside = (best / 2 + RESTART) / between
        rows.append([f"{ranks:,}", hours(between), f"{write:,.2g} s", hours(best), f"{lost:.2%}", f"{beside:.2%}"])
    heads = ["ranks", "between failures", "writing", "best interval", "lost", "lost with `checkpoint_async`"]
    return table(heads, rows)


def stragglers() -> str:
    """How much longer the slowest of many ranks takes, for the same work and for rows of different lengths."""
    rows = []
    for ranks in (16, 256, 1000, 10_000):
        slowest = SPREAD * math.sqrt(2 * math.log(ranks))
        cells = [f"{ranks:,}", f"{slowest:.1%}"]
        for each in (1, 4, 16):
            cells.append(f"{0.5 / math.sqrt(each) * math.sqrt(2 * math.log(ranks)):.0%}")
        rows.append(cells)
    heads = ["ranks", "same work", "1 row a rank", "4 rows a rank", "16 rows a rank"]
    return table(heads, rows)


TABLES = {
    "paper": paper,
    "seventy": seventy,
    "communication": communication,
    "rollouts": rollouts,
    "stragglers": stragglers,
    "failures": failures,
}


def filled(text: str) -> str:
    """The page with every table as it is now, between its two marks."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda found, make=make: f"{found[1]}{make()}\n{found[2]}", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/scale-plan.md")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    for name, make in TABLES.items():
        print(f"{name}\n\n{make()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
