"""The stage that measures accuracy, or the mean reward where a reward gives degrees."""

from __future__ import annotations

import json
from typing import Any

from thence.evaluate.measure import measure, measurement_record, sample_record
from thence.files import write_atomically, write_jsonl
from thence.models.lengths import context_of
from thence.pipeline.context import Context
from thence.pipeline.prompts import check_answers, load_prompts
from thence.pipeline.rewards import stage_reward
from thence.pipeline.room import response_tokens
from thence.recipe import Eval
from thence.rollout.native import Sampling


def test_sets(stage: Eval) -> dict[str, dict[str, Any]]:
    """The named test sets of a stage, each as overrides of [data]."""
    own = {"split": "test", **stage.data}
    return {name: {**own, **table} for name, table in (stage.splits or {own["split"]: {}}).items()}


def run_eval(context: Context, stage: Eval) -> dict[str, Any]:
    """Measure the context's model on every split at every temperature.

    Each measurement is kept as soon as it is made; a run that is killed resumes with the next.
    """
    folder = context.folder.stage(context.name)
    splits = test_sets(stage)
    parts = [(split, temperature) for split in splits for temperature in stage.temperatures]
    results, limit = [], context_of(context.model.config)
    if context.leads:
        context.watcher.stage(context.name, len(parts), 0)
    with stage_reward(stage) as grader:
        for split, temperature in parts:
            kept = folder / "parts" / f"{split}-{temperature}.json"
            if not kept.exists():
                data = context.recipe.stage_data(splits[split])
                prompts = load_prompts(data, context.tokenizer)
                check_answers(prompts, stage.reward)
                row, trajectories = measure(
                    context.model,
                    context.tokenizer,
                    grader,
                    prompts,
                    split=split,
                    samples=stage.samples,
                    sampling=Sampling(
                        max_tokens=response_tokens(context.name, stage, prompts, limit),
                        temperature=temperature,
                        top_p=stage.top_p,
                        stop_ids=context.stop_ids(data),
                        rows=stage.rollout_rows,
                    ),
                    seed_parts=(context.recipe.seed, "eval", split, temperature),
                    ranks=context.ranks,
                )
                if context.leads:
                    where = {"stage": context.name, "step": 0, "split": split, "temperature": temperature}
                    records = [sample_record(t, **where) for t in trajectories]
                    write_jsonl(kept.with_suffix(".jsonl"), records)
                    write_atomically(kept, json.dumps(measurement_record(row)))
                context.ranks.wait()
            results.append(json.loads(kept.read_text(encoding="utf-8")))
            if context.leads:
                found = results[-1]
                level = found["accuracy"] if found["accuracy"] is not None else found["reward"]
                context.watcher.step({"reward": level, "response_tokens": found["mean_tokens"]})
    if context.leads:
        write_atomically(folder / "result.json", json.dumps({"stage": context.name, "rows": results}, indent=1))
        samples = [
            json.loads(line)
            for path in sorted((folder / "parts").glob("*.jsonl"))
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        write_jsonl(folder / "samples.jsonl", samples)
    return {"measurements": len(results)}
