"""The stage that measures accuracy, or the mean reward where a reward gives degrees: an evaluation inside a run."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thence.data.template import ChatFormat
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import DamagedFile
from thence.evaluate.backends import Generation, Request
from thence.evaluate.native_backend import model_facts
from thence.evaluate.playing import said, scored
from thence.evaluate.problems import Problem
from thence.evaluate.progress import EvaluationProgress
from thence.evaluate.run import evaluate
from thence.evaluate.store import Settings, Store
from thence.evaluate.suites import Task
from thence.evaluate.summary import TaskResult, task_result
from thence.evaluate.versions import grader_version
from thence.files import finite, to_json, write_over
from thence.jsonl import write_jsonl
from thence.models.lengths import context_of
from thence.names import as_name
from thence.pipeline.context import StageContext
from thence.pipeline.folder import environment
from thence.pipeline.owned import EVALUATION
from thence.pipeline.prompts import check_answers
from thence.pipeline.rewards import reward_names, stage_reward
from thence.pipeline.room import response_tokens
from thence.pipeline.run_files import subject_of
from thence.pipeline.sample_lines import evaluation_line
from thence.pipeline.test_sets import test_sets
from thence.recipe import Eval
from thence.redaction import redacted
from thence.rollout.native import Sampling
from thence.rollout.responses import respond, response_seed
from thence.train.parallel import together


@dataclass(frozen=True)
class EvalPart:
    """A test set at a temperature.

    Args:
        split, temperature: which.
        task: the same in the words of an evaluation.
        prompts: of the test set, by the key of their problem, in order.
        sampling: how responses are sampled.
        seed_parts: what the random numbers follow from.
        chat: the chat template of the prompts.
    """

    split: str
    temperature: float
    task: Task
    prompts: Mapping[str, Prompt]
    sampling: Sampling
    seed_parts: tuple[object, ...]
    chat: ChatFormat

    def problems(self, tokenizer: Any) -> list[Problem]:
        """The prompts as problems: their tokens as the plain text that the model is given."""
        return [
            Problem(
                *(self.task.name, key, (("user", tokenizer.decode(list(prompt.token_ids))),)),
                *(prompt.text, prompt.answer),
                plain=True,
                columns=prompt.columns,
            )
            for key, prompt in self.prompts.items()
        ]


def run_eval(context: StageContext, stage: Eval) -> dict[str, Any]:
    """Measure the context's model on every split at every temperature, into the store in the stage's folder.

    Each measurement is kept as soon as it is made; a run that is killed resumes with the next.
    """
    parts = {part.task.name: part for part in eval_parts(context, stage)}
    backend = RanksBackend(context, parts, stage)
    if context.leads:
        with _remedy(context.folder.stage(context.name) / EVALUATION):
            _evaluate(context, stage, parts, backend)
        backend.dismiss()
    else:
        backend.follow()
    return {"measurements": len(parts)}


def _evaluate(context: StageContext, stage: Eval, parts: Mapping[str, EvalPart], backend: RanksBackend) -> None:
    """What the first rank does: the evaluation, and the files that are made of it."""

    def seed_of(task: Task, problem: Problem, number: int) -> int:
        part = parts[task.name]
        return response_seed(part.seed_parts, part.prompts[problem.key], number)

    folder = context.folder.stage(context.name)
    store = Store(folder / EVALUATION)
    progress = _Progress(context, store, parts)
    with stage_reward(stage) if stage.environment is None else nullcontext() as checker:
        evaluate(
            _settings(context, parts),
            {name: part.problems(context.tokenizer) for name, part in parts.items()},
            store.folder,
            lambda: backend,
            environment=lambda: environment(str(context.device), context.ranks.world),
            progress=progress,
            seed_of=seed_of,
            checker=checker,
        )
    write_over(folder / "result.json", to_json({"stage": context.name, "rows": progress.rows}, indent=1))
    write_jsonl(folder / "samples.jsonl", _lines(context.name, store, parts))


@contextmanager
def _remedy(folder: Path) -> Iterator[None]:
    """Says of a damaged file of the store what helps in a run."""
    try:
        yield
    except DamagedFile as error:
        remedy = f"put a whole copy of it back; or rename {folder}, and the same command measures this stage again"
        raise DamagedFile(error.problem, remedy=remedy, file=error.file, line=error.line) from None


def eval_parts(context: StageContext, stage: Eval) -> Iterator[EvalPart]:
    """The measurements of a stage, in order.

    Raises:
        DataError, RecipeError: prompts that cannot be graded, or do not fit into the model's context.
    """
    limit = context_of(context.model.config)
    for split, table in test_sets(stage).items():
        data = context.recipe.stage_data(table)
        prompts = context.load_prompts(table)
        check_answers(prompts, reward_names(stage))
        for temperature in stage.temperatures:
            sampling = Sampling(
                max_tokens=response_tokens(context.name, stage, prompts, limit),
                temperature=temperature,
                top_p=stage.top_p,
                stop_ids=context.stop_ids(data),
                rows=stage.rollout_rows,
            )
            title = f"{split}-{temperature}"
            task = Task(
                name=_task_name(title),
                title=title,
                files=tuple(map(redacted, data.source)),
                split=data.split,
                samples=stage.samples,
                temperature=temperature,
                top_p=stage.top_p,
                max_tokens=sampling.max_tokens,
                grader=next(iter(reward_names(stage))),
                grader_seconds=stage.reward_seconds,
                right_from=stage.reward_right_from,
                environment=stage.environment,
                seed=context.recipe.seed,
            )
            keyed = dict(zip(problem_keys(task.name, prompts), prompts, strict=True))
            seed_parts = (context.recipe.seed, "eval", split, temperature)
            yield EvalPart(split, temperature, task, keyed, sampling, seed_parts, context.chat(data))


class RanksBackend:
    """Samples with the model of a run, on all its ranks: the first one asks, the others :meth:`follow`.

    A part is sampled as a whole, also where some of its samples are kept, so that a run that was killed ends with the
    same bits as one that was not.
    """

    name = "native"

    def __init__(self, context: StageContext, parts: Mapping[str, EvalPart], stage: Eval):
        self.context, self.parts, self.stage = context, parts, stage
        self.version = "" if stage.environment is None else grader_version(stage.environment.path)

    def generate(self, requests: Sequence[Request], task: Task) -> Iterator[tuple[Request, Generation]]:
        """See :class:`thence.evaluate.backends.Backend`."""
        self.context.ranks.gather(task.name)
        found = self.sampled(self.parts[task.name])
        for request in requests:
            yield request, found[request.problem.key, request.sample]

    def follow(self) -> None:
        """Sample this rank's share of every part that the first rank asks for, until it dismisses the others."""
        while (name := self.context.ranks.gather(None)[0]) is not None:
            self.sampled(self.parts[name])

    def dismiss(self) -> None:
        """Let the other ranks go on."""
        self.context.ranks.gather(None)

    def facts(self) -> dict[str, Any]:
        """See :class:`thence.evaluate.backends.Backend`."""
        return {"backend": self.name, **model_facts(self.context.model)}

    def close(self) -> None:
        """Nothing is held."""

    def sampled(self, part: EvalPart) -> dict[tuple[str, int], Generation]:
        """All samples of a part by problem and number, on every rank."""
        ranks, keys, n = self.context.ranks, list(part.prompts), part.task.samples
        mine = list(part.prompts.values())[ranks.rank :: ranks.world]
        model, tokenizer = self.context.model, self.context.tokenizer

        def share() -> list[Generation]:
            with nullcontext() if self.stage.environment is None else stage_reward(self.stage, part.chat) as player:
                own = respond(model, tokenizer, player, mine, n, part.sampling, part.seed_parts)
            return [self._generation(part, trajectory) for trajectory in own]

        shares = ranks.gather(share() if self.stage.environment is None else together(ranks, share))
        return {
            (key, number): share[i * n + number]
            for rank, share in enumerate(shares)
            for i, key in enumerate(keys[rank :: ranks.world])
            for number in range(n)
        }

    def _generation(self, part: EvalPart, trajectory: Trajectory) -> Generation:
        given = (self.context.tokenizer, trajectory, part.sampling.stop_ids)
        return said(*given) if self.stage.environment is None else scored(*given, self.version)


class _Progress(EvaluationProgress):
    """Makes the row of every part that is complete, and tells the run's watcher."""

    def __init__(self, context: StageContext, store: Store, parts: Mapping[str, EvalPart]):
        self.context, self.store, self.parts = context, store, parts
        self.rows: list[dict[str, Any]] = []
        context.watcher.stage(context.name, len(parts), 0)

    def graded(self, task: str) -> None:
        part = self.parts[task]
        row = result_row(part, task_result(self.store, part.task, part.task.grader, list(part.prompts)))
        self.rows.append(row)
        level = row["reward"] if row["accuracy"] is None else row["accuracy"]
        self.context.watcher.step({"reward": level, "response_tokens": row["mean_tokens"]})


def result_row(part: EvalPart, found: TaskResult) -> dict[str, Any]:
    """A row of ``result.json``. Shares are between 0 and 1; ends are those of 95% intervals.

    ``accuracy``, avg@samples, is None where a score is a degree without a threshold. ``reward`` is the mean score of
    the responses that have one; its interval is None for a single problem, which tells nothing of others.
    """
    avg, level = found.avg, found.mean_reward
    return {
        "split": part.split,
        "temperature": part.temperature,
        "problems": len(part.prompts),
        "samples": part.task.samples,
        "accuracy": None if avg is None else avg.value,
        "low": None if avg is None else avg.low,
        "high": None if avg is None else avg.high,
        "right": found.right,
        "wrong": found.wrong,
        "unknown": found.unknown,
        "mean_tokens": found.mean_tokens,
        "truncated": found.truncated,
        "graded": found.graded,
        "reward": None if level is None else level.value,
        "reward_low": None if level is None else finite(level.low),
        "reward_high": None if level is None else finite(level.high),
    }


def _settings(context: StageContext, parts: Mapping[str, EvalPart]) -> Settings:
    """What is evaluated. No place is named: a run may be moved before it is resumed."""
    tasks = {name: part.task for name, part in parts.items()}
    model = subject_of(context.name, context.recipe.stages)
    return Settings(model=model, suite=context.name, tasks=tasks)


def _lines(stage: str, store: Store, parts: Mapping[str, EvalPart]) -> Iterator[dict[str, Any]]:
    """The lines of ``samples.jsonl``, in the order of the parts' names and of the prompts."""
    for name, part in sorted(parts.items()):
        samples = {sample.place: sample for sample in store.samples(name)}
        grades = store.graded(name, part.task.grader)
        where = {"stage": stage, "step": 0, "split": part.split, "temperature": part.temperature}
        for key, prompt in part.prompts.items():
            for place in ((key, number) for number in range(part.task.samples)):
                yield evaluation_line(prompt, samples[place], grades[place], **where)


def problem_keys(task: str, prompts: Sequence[Prompt]) -> list[str]:
    """The keys of the prompts' problems; the second of two with one text is a problem of its own."""
    times: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        again = f"\n{times[prompt.text]}" if times[prompt.text] else ""
        times[prompt.text] += 1
        digest = hashlib.sha256(f"{task}\n{prompt.text}{again}".encode("utf-8", "surrogatepass"))
        found.append(digest.hexdigest()[:16])
    return found


def _task_name(title: str) -> str:
    """A part's name as one of a task: letters, digits and `._-` only; another text has its digest in it."""
    plain = as_name(title)
    return plain if plain == title else f"{plain[:80]}-{hashlib.sha256(title.encode()).hexdigest()[:8]}"
