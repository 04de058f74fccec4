"""The stage that measures accuracy, or the mean reward where a reward gives degrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thence.evaluate.measure import measure, measurement_record, sample_record
from thence.files import read_json, to_json, write_atomically, write_over
from thence.jsonl import read_lines, set_aside, write_jsonl
from thence.models.lengths import context_of
from thence.pipeline.context import Context
from thence.pipeline.folder import wrong_with_line
from thence.pipeline.prompts import check_answers
from thence.pipeline.rewards import stage_reward
from thence.pipeline.room import response_tokens
from thence.pipeline.test_sets import test_sets
from thence.recipe import Eval
from thence.rollout.native import Sampling


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
                prompts = context.load_prompts(splits[split])
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
                    write_atomically(kept, to_json(measurement_record(row)))
                context.ranks.wait()
            results.append(_kept(kept))
            if context.leads:
                found = results[-1]
                context.watcher.step({"reward": _level(found), "response_tokens": found["mean_tokens"]})
    if context.leads:
        write_over(folder / "result.json", to_json({"stage": context.name, "rows": results}, indent=1))
        samples = []
        for path in sorted((folder / "parts").glob("*.jsonl")):
            found = read_lines(path, wrong_with_line)
            set_aside(path, found.bad)
            samples += found.values
        write_jsonl(folder / "samples.jsonl", samples)
    return {"measurements": len(results)}


def _kept(part: Path) -> dict[str, Any]:
    """A measurement that was kept. Raises DamagedFile."""
    remedy = "put a whole copy of it back; or rename it, and the same command measures this part again"

    def shape(row: dict[str, Any]) -> None:
        sum((_level(row), row["mean_tokens"], row["samples"]))

    return read_json(part, remedy=remedy, shape=shape)


def _level(row: dict[str, Any]) -> float:
    """The accuracy of a measurement, or its mean reward where the reward gives degrees."""
    return row["accuracy"] if row["accuracy"] is not None else row["reward"]
