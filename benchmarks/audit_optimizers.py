"""Audit single steps of random small models under several optimizers: clean ones, and a twin of each with a bug.

    python benchmarks/audit_optimizers.py [--probes 500] [--twins 50] [--families llama ...] [--optimizers sgd ...]
        [--write]

A probe is a random model of a family (12 to 32 wide, 1 or 2 layers), random rows and a random cut. Its clean step is
judged as ``check`` sees it, with the gradients that the optimizer is given. The first probes of every cell have a twin
with one mistake, and are judged as ``command`` sees them too, by the update alone. ``--write`` keeps the counts in
benchmarks/results/audit-optimizers.json after every cell of the table; probes counted there are not run again, so the
table grows in pieces. Exit code 1: a false alarm, or a bug acquitted.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import thence  # noqa: E402
from tests.audit.homemade import HomeMade  # noqa: E402  # pyright: ignore[reportMissingImports]
from thence.audit import random_rows  # noqa: E402
from thence.audit.judge.case import Judge  # noqa: E402
from thence.audit.judge.evidence import Evidence  # noqa: E402
from thence.audit.result import Case, CaseResult  # noqa: E402
from thence.audit.run.watch import OptimizerWatch  # noqa: E402
from thence.audit.solve.sequences import KnownExample  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "audit-optimizers.json"
FAMILIES = ("llama", "qwen3", "gpt2", "gemma2", "olmo2", "gpt_neox")
OPTIMIZERS = ("sgd", "adamw", "adamw-linear", "adafactor", "muon")
WAYS = ("check", "command")
MISTAKES: tuple[dict[str, Any], ...] = (
    {"extra": "prompt"}, {"extra": "padding"}, {"missing": "first"}, {"missing": "end"}, {"missing": "late"},
    {"weight": "micro-batch"}, {"weight": "rows"}, {"weight": "probability"}, {"order": "labels"}, {"times": 0.0},
    {"times": 0.5}, {"times": 2.0}, {"every": True}, {"lost": "first"}, {"lost": "last"}, {"dropped": "norm"},
    {"dropped": "ln_"}, {"layout": "left", "masked": False}, {"scale": -1.0},
)  # fmt: skip
VISIBLE = 0.05
"""A mistake that changes the gradient by a smaller share of its norm in this cut is drawn again."""
State = dict[str, Tensor]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--probes", type=int, default=500, help="of every family and optimizer")
    parser.add_argument("--twins", type=int, default=50, help="probes with a bug, and without the optimizer in sight")
    parser.add_argument("--families", nargs="*", default=FAMILIES)
    parser.add_argument("--optimizers", nargs="*", default=OPTIMIZERS)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = kept() if arguments.write else {}
    for family in arguments.families:
        for optimizer in arguments.optimizers:
            cell = table.setdefault(f"{family}, {optimizer}", {"probes": 0, "clean": {}, "bug": {}, "wrong": []})
            begun = time.perf_counter()
            for number in range(cell["probes"], arguments.probes):
                add(cell, number, Probe(family, optimizer, number), number < arguments.twins)
            said = {part: {way: cell[part].get(way, {}) for way in WAYS} for part in ("clean", "bug")}
            print(f"{family:10}{optimizer:14}{cell['probes']:>5}  {json.dumps(said)}", flush=True)
            cell["seconds"] = round(cell.get("seconds", 0.0) + time.perf_counter() - begun, 1)
            if arguments.write:
                keep(table, arguments.twins)
    return int(any(cell["wrong"] for cell in table.values()))


class Probe:
    """A random model, rows and cut of one family and optimizer, and the judge of its steps."""

    def __init__(self, family: str, optimizer: str, number: int):
        self.draw = random.Random(f"{family} {optimizer} {number}")
        self.vocabulary = self.draw.randint(24, 48)
        self.model = make_model(family, self.vocabulary, self.draw)
        lengths = self.draw.sample(range(2, 15), self.draw.randint(3, 5))
        self.rows = random_rows(self.vocabulary, self.draw.randrange(10**6), lengths)
        micro_batch = self.draw.randint(1, 3)
        self.case = Case(
            "probe", micro_batch, -(-len(lengths) // micro_batch), examples=len(lengths), optimizer="unknown"
        )
        known = [KnownExample((), (), tuple(row["input_ids"]), tuple(row["labels"])) for row in self.rows]
        texts = [str(i) for i in range(self.vocabulary)]
        self.judge = Judge(copy.deepcopy(self.model), known, texts, -1, None)
        self.clean = HomeMade(optimizer, layout=self.draw.choice(["right", "left"]))
        if family == "gpt_neox" or family == "gpt2":
            self.clean = HomeMade(optimizer)  # positions that begin behind the padding are not theirs to know

    def drawn_bug(self) -> tuple[HomeMade, dict[str, Any]]:
        """A step with a mistake that shows in this cut."""
        right = self.gradient(self.clean)
        while True:
            mistake = self.draw.choice(MISTAKES)
            step = HomeMade(self.clean.optimizer, **mistake)
            other = self.gradient(step)
            size = sum(float(g.square().sum()) for g in right.values()) ** 0.5
            rest = sum(float((g - other.get(n, torch.zeros_like(g))).square().sum()) for n, g in right.items()) ** 0.5
            if rest > VISIBLE * size:
                return step, mistake

    def gradient(self, step: HomeMade) -> State:
        """What the optimizer is given first."""
        _, _, watch, after = self.taken(step)
        seen = watch.seen(after)
        return {} if seen is None else dict(seen.gradients)

    def taken(self, step: HomeMade) -> tuple[nn.Module, State, OptimizerWatch, State]:
        """The model, its parameters before and after, and what was seen of the optimizers."""
        model = copy.deepcopy(self.model)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        watch = OptimizerWatch(model, before)
        with watch:
            step(model, [dict(row) for row in self.rows], self.case.micro_batch, self.case.accumulation)  # pyright: ignore
        return model, before, watch, {name: p.detach().clone() for name, p in model.named_parameters()}

    def results(self, step: HomeMade, ways: Sequence[str]) -> dict[str, CaseResult]:
        """The step as each way into the audit sees it."""
        _, before, watch, after = self.taken(step)
        pieces = self.judge.plan(self.case)
        return {
            way: self.judge.case(
                self.case,
                Evidence(
                    [before, after], pieces=pieces, scale_known=False,
                    seen=watch.seen(after) if way == "check" else None,
                ),
            )
            for way in ways
        }  # fmt: skip


def make_model(family: str, vocabulary: int, draw: random.Random) -> Any:
    """A random causal language model in eval mode, without dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    heads = draw.choice([2, 4])
    hidden = heads * draw.choice([6, 8])
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": draw.randint(1, 2),
        "num_attention_heads": heads, "initializer_range": 0.2, "max_position_embeddings": 64,
        "tie_word_embeddings": draw.random() < 0.5, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    if family == "gpt2":
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    elif family == "gpt_neox":
        sizes |= {"intermediate_size": 2 * hidden, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    else:
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 2 * hidden, "head_dim": hidden // heads}
    torch.manual_seed(draw.randrange(10**6))
    config = AutoConfig.for_model(family, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def add(cell: dict[str, Any], number: int, probe: Probe, twin: bool) -> None:
    """Count what was said of a probe's clean step and, with ``twin``, of a bug and by the update alone."""
    bug, mistake = probe.drawn_bug() if twin else (probe.clean, {})
    for part, step in [("clean", probe.clean), ("bug", bug)][: 1 + twin]:
        for way, result in probe.results(step, WAYS[: 1 + twin]).items():
            faults = sorted(finding.id for finding in result.faults)
            outcome = "finding" if faults else "no finding" if result.status == "judged" else "not judged"
            counts = collections.Counter(cell[part].get(way, {}))
            counts[outcome] += 1
            cell[part][way] = dict(sorted(counts.items()))
            if outcome == ("finding" if part == "clean" else "no finding"):
                line = {"probe": number, "way": way, "mistake": mistake if part == "bug" else {}, "faults": faults}
                cell["wrong"].append(line)
    cell["probes"] = number + 1


def kept() -> dict[str, Any]:
    """The table so far."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))["table"] if RESULTS.exists() else {}


def keep(table: dict[str, Any], twins: int) -> None:
    """Write the table, with the totals of what was run."""
    total: dict[str, dict[str, int]] = {}
    for part, way in ((part, way) for part in ("clean", "bug") for way in WAYS):
        counts: collections.Counter[str] = collections.Counter()
        for cell in table.values():
            counts.update(cell[part].get(way, {}))
        total[f"{part}, {way}"] = dict(sorted(counts.items()))
    head = {
        "command": f"python benchmarks/audit_optimizers.py --twins {twins} --write",
        "thence": thence.__version__,
        "torch": torch.__version__,
        "probes": sum(cell["probes"] for cell in table.values()),
        "total": total,
    }
    RESULTS.write_text(json.dumps({**head, "table": table}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
