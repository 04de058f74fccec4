"""How often a model gets each problem of the embedded world right: a histogram over problems.

    python benchmarks/pass_rates.py runs/seeds/quickstart-seed0/stages/sft/model --out docs/evidence/pass-rates-sft

Samples every test problem 32 times at temperature 1; writes OUT.json and OUT.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen
import torch

from thence.data.chat import end_token_ids
from thence.pipeline.prompts import load_prompts
from thence.recipe import Data, Model
from thence.rollout.native import Sampling
from thence.rollout.responses import respond
from thence.train.model import load_model
from thence.verify.reward import load_reward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    loaded = load_model(Model(path=args.model), torch.device("cpu"))
    prompts = load_prompts(Data(split="test", limit=args.problems), loaded.tokenizer)
    sampling = Sampling(max_tokens=160, stop_ids=end_token_ids(loaded.tokenizer, model=loaded.model))
    with load_reward("exact") as grader:
        found = respond(loaded.model, loaded.tokenizer, grader, prompts, args.samples, sampling, ("pass rates",))
    rates = [
        sum(t.verdict == "right" for t in found[i : i + args.samples]) / args.samples
        for i in range(0, len(found), args.samples)
    ]
    counts = [sum(low <= rate < low + 0.1 or (rate == 1 and low == 0.9) for rate in rates) for low in tenths()]
    record = {
        "command": "python " + " ".join(sys.argv),
        "problems": args.problems,
        "samples": args.samples,
        "temperature": 1.0,
        "mean": sum(rates) / len(rates),
        "share_between_0.2_and_0.8": sum(0.2 <= rate <= 0.8 for rate in rates) / len(rates),
        "problems_by_tenth": counts,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    figure, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
    axis.bar([low + 0.05 for low in tenths()], counts, width=0.09)
    axis.set_xlabel(f"pass rate of a problem ({args.samples} samples, temperature 1)")
    axis.set_ylabel("problems")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.out.with_suffix(".png"), dpi=110)
    print(json.dumps(record))


def tenths() -> list[float]:
    return [i / 10 for i in range(10)]


if __name__ == "__main__":
    main()
