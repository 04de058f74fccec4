"""An evaluation's numbers for other tools: the layout of lm-evaluation-harness, and CSV.

The harness's metric key is `metric,filter`. The share of right answers is `exact_match,none` here, with `repeats` in a
task's configuration for the samples a problem; pass@k and maj@k are separate metrics. What the harness has no place
for (intervals, verdicts, versions of graders) stands under the key `thence`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from thence.evaluate.store import Sample, Store
from thence.evaluate.summary import Result, TaskResult
from thence.files import finite, to_csv, to_json, write_over
from thence.stats.spread import Score

METRIC = "exact_match"
LENIENT = "exact_match_lenient"
REWARD = "mean_reward"
"""In place of the others where the grader gives degrees and states no threshold."""


def write_exports(store: Store, result: Result) -> list[Path]:
    """Write results.json, results_<date>.json (the same), samples_<task>_<date>.jsonl and results.csv.

    The date is that of the evaluation's first start, so that writing again replaces the files.
    """
    started = _started(result)
    date = started.strftime("%Y-%m-%dT%H-%M-%S.%f")
    text = to_json(harness_results(store, result), indent=2) + "\n"
    files = {f"results_{date}.json": text, "results.json": text, "results.csv": results_csv(result)}
    for row in result.tasks:
        lines = (to_json(line) + "\n" for line in harness_samples(store, row))
        files[f"samples_{row.task.name}_{date}.jsonl"] = "".join(lines)
    for name, content in files.items():
        write_over(store.folder / name, content)
    return [store.folder / name for name in files]


def harness_results(store: Store, result: Result) -> dict[str, Any]:
    """What lm-evaluation-harness writes into `results_<date>.json`, and more under `thence`."""
    settings, environment = result.settings, result.environment
    measured = [row for row in result.tasks if row.avg is not None or row.reward is not None or row.not_answered]
    groups = {f"{settings.suite}_{group.name}": group for group in result.groups}
    grouped = {
        name: _metrics(name, name, {METRIC: group.score}, group.score.problems) for name, group in groups.items()
    }
    metrics = {
        row.task.name: _metrics(row.task.name, row.task.title or row.task.name, _scores(row), len(row.shares))
        for row in measured
    }
    better = {row.task.name: dict.fromkeys(_scores(row), True) for row in measured}
    template = environment.get("chat_template")
    return {
        "results": grouped | metrics,
        "groups": grouped,
        "group_subtasks": {name: list(group.tasks) for name, group in groups.items()}
        | {row.task.name: [] for row in measured},
        "configs": {row.task.name: _config(row) for row in measured},
        "versions": dict.fromkeys([*groups, *(row.task.name for row in measured)], 1),
        "n-shot": {row.task.name: 0 for row in measured},
        "higher_is_better": {name: {METRIC: True} for name in groups} | better,
        "n-samples": {row.task.name: {"original": row.expected, "effective": len(row.shares)} for row in measured},
        "config": {
            "model": f"thence-{settings.backend}",
            "model_args": f"pretrained={settings.model}" + (f",stage={settings.stage}" if settings.stage else ""),
            "model_num_parameters": environment.get("parameters"),
            "model_dtype": environment.get("dtype"),
            "batch_size": environment.get("rows"),
            "device": environment.get("device"),
            "limit": settings.limit,
            "random_seed": result.tasks[0].task.seed,
            "gen_kwargs": None,
        },
        "git_hash": environment.get("git_commit"),
        "date": _started(result).timestamp(),
        "transformers_version": environment.get("transformers"),
        "task_hashes": {row.task.name: row.prompts for row in measured},
        "model_source": f"thence-{settings.backend}",
        "model_name": settings.model,
        "model_name_sanitized": re.sub(r"[\"<>:/|\\?*\[\]]+", "__", settings.model),
        "system_instruction": None,
        "fewshot_as_multiturn": False,
        "chat_template": template,
        "chat_template_sha": None if template is None else _sha(template),
        "thence": _own(store, result),
    }


def harness_samples(store: Store, row: TaskResult) -> Iterator[dict[str, Any]]:
    """The lines of `samples_<task>_<date>.jsonl` of lm-evaluation-harness: one a problem, with all its responses."""
    grades = store.graded(row.task.name, row.grader)
    by_problem: dict[str, list[Sample]] = {}
    for sample in sorted(store.samples(row.task.name), key=lambda s: s.sample):
        if sample.problem in row.shares:
            by_problem.setdefault(sample.problem, []).append(sample)
    arguments = _generation(row)
    for number, key in enumerate(row.shares):
        samples = by_problem[key]
        first = samples[0]
        doc = {"question": first.question, "answer": first.answer, "key": key, "source": first.source}
        found = [grades[sample.place].extracted or "" for sample in samples]
        known = [g.score for g in (grades[sample.place] for sample in samples) if g.verdict != "unknown"]
        metric = METRIC if row.reward is None else REWARD
        level = row.shares[key] if row.reward is None else math.fsum(known) / len(known) if known else None
        prompt = to_json([{"role": role, "content": content} for role, content in first.prompt])
        yield {
            "doc_id": number,
            "doc": doc | ({"options": list(first.options)} if first.options else {}),
            "target": first.answer,
            "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": arguments}},
            "resps": [[sample.text for sample in samples]],
            "filtered_resps": found if len(found) == 1 else [found],
            "filter": "none",
            "metrics": [metric],
            "doc_hash": _sha(to_json(doc)),
            "prompt_hash": _sha(prompt),
            "target_hash": _sha(first.answer or ""),
            metric: level,
            "verdicts": [grades[sample.place].verdict for sample in samples],
        }


def results_csv(result: Result) -> str:
    """A line a task. Shares are between 0 and 1."""
    lines = [
        _csv_line(result, row)
        for row in result.tasks
        if row.avg is not None or row.reward is not None or row.not_answered
    ]
    return to_csv(list(dict.fromkeys(name for line in lines for name in line)) or ["model"], lines)


def _csv_line(result: Result, row: TaskResult) -> dict[str, Any]:
    settings, task = result.settings, row.task
    line: dict[str, Any] = {
        "model": settings.model,
        "stage": settings.stage,
        "suite": settings.suite,
        "task": task.name,
        "group": task.group,
        "problems": len(row.shares),
        "samples": task.samples,
    }
    line |= _columns("avg", row.avg) | _columns("pass", row.passed.get(task.samples)) | _columns("maj", row.majority)
    line |= _columns("lenient", row.lenient) | _columns("reward", row.reward)
    for name in ("right", "wrong", "graded", "unknown", "never", "always", "truncated", "missing"):
        line[name] = getattr(row, name)
    line |= {"not_answered": len(row.not_answered), "mean_tokens": row.mean_tokens}
    for name in ("temperature", "top_p", "max_tokens", "seed"):
        line[name] = getattr(task, name)
    return line | {"grader": row.grader, "versions": "; ".join(row.versions)}


def _columns(name: str, score: Score | None) -> dict[str, Any]:
    if score is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: score.value, f"{name}_low": finite(score.low), f"{name}_high": finite(score.high)}


def _scores(row: TaskResult) -> dict[str, Score]:
    if row.reward is not None:
        return {REWARD: row.reward}
    found = {METRIC: row.avg} | {f"pass@{k}": score for k, score in row.passed.items() if k > 1}
    found |= {f"maj@{row.task.samples}": row.majority, LENIENT: row.lenient}
    return {name: score for name, score in found.items() if score is not None}


def _metrics(name: str, alias: str, scores: dict[str, Score], problems: int) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "alias": alias, "sample_len": problems}
    for name, score in scores.items():
        error = score.standard_error
        found[f"{name},none"] = score.value
        found[f"{name}_stderr,none"] = error if math.isfinite(error) else "N/A"
    return found


def _config(row: TaskResult) -> dict[str, Any]:
    task = row.task
    return {
        "task": task.name,
        "task_alias": task.title or task.name,
        "dataset_path": task.source or (task.files[0] if task.files else ""),
        "test_split": task.split,
        "output_type": "generate_until",
        "generation_kwargs": _generation(row),
        "repeats": task.samples,
        "num_fewshot": 0,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in _scores(row)],
        "metadata": {"version": 1, "grader": row.grader, "grader_versions": list(row.versions)},
    }


def _generation(row: TaskResult) -> dict[str, Any]:
    task = row.task
    return {
        "until": [],
        "do_sample": task.temperature > 0,
        "temperature": task.temperature,
        "top_p": task.top_p,
        "max_gen_toks": task.max_tokens,
    }


def _own(store: Store, result: Result) -> dict[str, Any]:
    rows = []
    for row in result.tasks:
        plain = asdict(row)
        plain["task"] = row.task.model_dump(mode="json")
        plain["passed"] = {str(k): asdict(score) for k, score in row.passed.items()}
        del plain["shares"], plain["mean_reward"]
        rows.append(plain)
    groups = [asdict(group) for group in result.groups]
    return {
        "environment": result.environment,
        "tasks": rows,
        "groups": groups,
        "missing": result.missing,
        "not_answered": result.not_answered,
        "regrade": f"thence eval --regrade {store.folder}",
    }


def _started(result: Result) -> datetime:
    text = result.environment.get("started")
    return datetime.fromisoformat(text) if isinstance(text, str) else datetime.fromtimestamp(0, UTC)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
