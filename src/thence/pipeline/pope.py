"""The hard problems of a recipe's RL stage and the shortest prefixes that help: see :mod:`thence.data.guidance`.

Every decided problem is a line of a file beside the result. A run that was interrupted resumes from it, if nothing that
decides has changed: model, rows, reward, sampling and the settings below.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from thence.data.chat import chat_format, end_token_ids
from thence.data.example import Example
from thence.data.guidance import FRACTIONS, KIND, PREFIX, PROBLEM, guided, prefix_tokens, row_of, shortest
from thence.data.problems import RowProblem
from thence.data.response import response_text
from thence.data.trajectory import Prompt
from thence.errors import DataError, RecipeError, UserError
from thence.files import to_json
from thence.jsonl import append_jsonl, read_lines, write_jsonl
from thence.models.lengths import context_of
from thence.pipeline.ground import model_ground, rows_digest
from thence.pipeline.prompts import check_answers, read_only, rendered_examples, to_prompts
from thence.pipeline.rewards import reward_names, stage_reward
from thence.pipeline.room import response_tokens
from thence.recipe import Recipe, Rl
from thence.rollout.native import Sampling
from thence.rollout.responses import respond
from thence.train.model import load_model
from thence.verify.grader import Grader

log = logging.getLogger(__name__)
Decision = dict[str, Any]
"""A decided problem: problem (its place), right, samples, and of a hard one: shares, successes, share, tokens."""


@dataclass(frozen=True)
class Guidance:
    """How prefixes are looked for.

    Args:
        samples: of each problem, and of each guided problem. Published: 128.
        fractions: shares of the solution that are tried, ascending, each above 0 and below 1.
        form: a text with {problem} and {prefix}; None: the usual one.

    Raises:
        UserError: fractions that do not ascend, or a form that lacks a part.
    """

    samples: int = 128
    fractions: tuple[float, ...] = FRACTIONS
    form: str | None = None

    def __post_init__(self) -> None:
        fits = all(0 < share < 1 for share in self.fractions)
        if not (self.fractions and fits and list(self.fractions) == sorted(set(self.fractions))):
            given = ", ".join(f"{share:g}" for share in self.fractions) or "(none)"
            raise UserError(
                f"the shares {given} do not ascend from above 0 to below 1",
                remedy="give shares of a solution such as 0.05,0.1,0.15,0.2,0.25",
                field="--shares",
            )
        if self.form is not None and any(self.form.count(part) != 1 for part in (PROBLEM, PREFIX)):
            raise UserError(
                "the form has not each of {problem} and {prefix} once",
                remedy="give a text such as '{problem}\\n\\nA solution begins: {prefix}\\n\\nContinue it.'",
                field="--form",
            )


class Search:
    """The search for prefixes, problem by problem.

    Args:
        recipe: its first RL stage says which rows, reward and sampling; its model is the one that succeeds or fails.
        how: see :class:`Guidance`.

    Raises:
        RecipeError: the recipe has no RL stage.
        DataError: no row has a demonstration, or there is nothing to compare answers with.
    """

    def __init__(self, recipe: Recipe, how: Guidance):
        self.recipe, self.how, self.stage_name = recipe, how, rl_stage_name(recipe)
        stage = recipe.stage(self.stage_name)
        assert isinstance(stage, Rl)
        self.stage = stage
        self.data = recipe.stage_data(stage.data)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load_model(recipe.model, device, recipe.seed)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        pairs = rendered_examples(self.data, read_only(self.data), self.tokenizer)
        self.pairs = [(example, prompt) for example, prompt in pairs if prompt.demonstration_ids]
        if not self.pairs:
            raise DataError(
                f"none of {len(pairs):,} rows has a demonstration, and a prefix is the beginning of one",
                remedy="give rows with a demonstration (completion, or a worked answer)",
                field=f"{self.stage_name}.data",
            )
        if len(self.pairs) < len(pairs):
            log.warning(
                "%d of %d rows have no demonstration and are left out", len(pairs) - len(self.pairs), len(pairs)
            )
        prompts = [prompt for _, prompt in self.pairs]
        check_answers(prompts, reward_names(stage))
        if stage.environment is not None:
            raise RecipeError(
                "a prefix is the beginning of one turn, and an environment plays rollouts of several",
                remedy="search with a recipe whose stage has a reward and no environment",
                field=f"{self.stage_name}.environment",
            )
        chat = chat_format(self.tokenizer, self.data.template, self.data.template_variables)
        self.context = context_of(self.model.config)
        self.sampling = Sampling(
            max_tokens=response_tokens(self.stage_name, stage, prompts, self.context),
            temperature=stage.temperature,
            top_p=stage.top_p,
            top_k=stage.top_k,
            stop_ids=end_token_ids(self.tokenizer, chat, self.model),
            rows=stage.rollout_rows,
        )

    def settings(self) -> dict[str, Any]:
        """What decides, as plain values: two searches with the same settings decide alike."""
        model = sorted(str(state["digest"]) for state in model_ground(self.recipe.model).values())
        return {
            "model": [self.recipe.model.model_dump(mode="json"), hashlib.sha256("".join(model).encode()).hexdigest()],
            "rows": rows_digest(prompt for _, prompt in self.pairs),
            "reward": [reward_names(self.stage), self.stage.reward_right_from],
            "sampling": asdict(self.sampling),
            "seed": self.recipe.seed,
            **asdict(self.how),
        }

    def decide(self, grader: Grader, skip: frozenset[int] = frozenset()) -> Iterator[list[Decision]]:
        """Decide every problem, some at a time.

        Args:
            skip: places of problems that are decided already.
        """
        left = [at for at in range(len(self.pairs)) if at not in skip]
        size = max(1, self.sampling.rows // self.how.samples)
        for start in range(0, len(left), size):
            chosen = left[start : start + size]
            right = self._right(grader, [self.pairs[at][1] for at in chosen], "plain")
            found = {
                at: {"problem": at, "right": count, "samples": self.how.samples}
                for at, count in zip(chosen, right, strict=True)
            }
            self._guide(grader, [at for at, count in zip(chosen, right, strict=True) if count == 0], found)
            yield list(found.values())

    def _guide(self, grader: Grader, hard: list[int], found: dict[int, Decision]) -> None:
        """Try the shares on hard problems, shortest first, each problem until one helps."""
        for at in hard:
            found[at] |= {"shares": [], "successes": [], "share": None}
        for share in self.how.fractions:
            ready = {at: prompt for at in hard if (prompt := self._prompt(at, share)) is not None}
            right = self._right(grader, list(ready.values()), share)
            for at, count in zip(ready, right, strict=True):
                decision = found[at]
                decision["shares"].append(share)
                decision["successes"].append(count)
                decision["share"] = shortest(decision["shares"], decision["successes"])
                if count:
                    decision["tokens"] = len(self._prefix(at, share))
            hard = [at for at in hard if found[at]["share"] is None]

    def example(self, at: int, share: float | None) -> Example:
        """A problem as it is read (share None: without its demonstration), or with the beginning of its solution."""
        example, prompt = self.pairs[at]
        if share is None:
            return replace(example, demonstration=None, reasoning="", tool_calls=())
        text = response_text(self.tokenizer, self._prefix(at, share), self.sampling.stop_ids, prompt.opening)
        try:
            return guided(example, text, self.how.form)
        except RowProblem as problem:
            raise problem.error(example.source) from None

    def _prefix(self, at: int, share: float) -> tuple[int, ...]:
        """The tokens of the solution that a share of it is."""
        ids = self.pairs[at][1].demonstration_ids or ()
        solution = ids[:-1] if ids and ids[-1] in self.sampling.stop_ids else ids
        return solution[: prefix_tokens(share, len(solution))]

    def _prompt(self, at: int, share: float) -> Prompt | None:
        """The guided problem, rendered; None where it leaves the model no room, or the solution has but one token."""
        if not self._prefix(at, share):
            return None
        data = self.data.model_copy(update={"max_prompt_tokens": None, "skip_bad": False})
        (prompt,) = to_prompts(data, [self.example(at, share)], self.tokenizer)
        limit = self.context if self.data.max_prompt_tokens is None else self.data.max_prompt_tokens
        beyond = self.context is not None and len(prompt.token_ids) + self.sampling.max_tokens > self.context
        if beyond or (self.data.max_prompt_tokens is not None and limit is not None and len(prompt.token_ids) > limit):
            return None
        return replace(prompt, index=at)

    def _right(self, grader: Grader, prompts: Sequence[Prompt], what: object) -> list[int]:
        """How many of the samples of each prompt are right.

        Raises:
            UserError: the reward gives degrees, and nobody says from which one a response is right.
        """
        seed_parts, n = (self.recipe.seed, self.stage_name, "pope", what), self.how.samples
        found = respond(self.model, self.tokenizer, grader, prompts, n, self.sampling, seed_parts) if prompts else []
        if any(trajectory.verdict == "graded" for trajectory in found):
            raise UserError(
                "the reward gives degrees, and a problem is hard where no response is right",
                remedy=f"say from which score on one is: --{self.stage_name}.reward-right-from",
                field=f"{self.stage_name}.reward_right_from",
            )
        verdicts = [trajectory.verdict == "right" for trajectory in found]
        return [sum(verdicts[i * n : i * n + n]) for i in range(len(prompts))]


def rl_stage_name(recipe: Recipe) -> str:
    """The recipe's first RL stage. Raises RecipeError where it has none."""
    found = next((name for name in recipe.stages if isinstance(recipe.stage(name), Rl)), None)
    if found is None:
        raise RecipeError(
            "no stage of the recipe is of kind rl, and the rows are for one",
            remedy='add one: stages = ["rl"]',
            field="stages",
        )
    return found


def find_guidance(
    search: Search, out: Path, told: Callable[[Sequence[Decision], int], None] = lambda decisions, total: None
) -> list[Decision]:
    """Decide every problem, and write the rows of those that are hard and can be helped.

    Args:
        out: the JSONL file to write: each hard problem as a guided and as a plain row.
        told: is told of all decisions so far, and how many there will be.

    Returns:
        The decisions, in the order of the problems.

    Raises:
        UserError: the file exists, or what was decided before was decided with other settings.
    """
    if out.exists():
        raise UserError("the file exists", remedy="give another file, or remove it", file=out)
    record, settings = record_of(out), search.settings()
    decided = _resumed(record, settings)
    if not record.is_file():
        append_jsonl(record, [{"settings": settings}])
    with stage_reward(search.stage) as grader:
        told(decided, len(search.pairs))
        for decisions in search.decide(grader, frozenset(d["problem"] for d in decided)):
            append_jsonl(record, decisions)
            decided = [*decided, *decisions]
            told(decided, len(search.pairs))
    decided = sorted(decided, key=lambda decision: decision["problem"])
    write_jsonl(out, (row for decision in decided for row in _rows(search, decision)))
    return decided


def record_of(out: Path) -> Path:
    """Where the decisions about every problem are kept."""
    return out.with_name(out.name + ".problems.jsonl")


def _resumed(record: Path, settings: dict[str, Any]) -> list[Decision]:
    """What a record has decided. Raises UserError as it is of other settings."""
    lines = read_lines(record)
    if lines.torn:  # of a killed process; the problem is decided again
        write_jsonl(record, lines.values)
    if not lines.values:
        return []
    head, *decided = lines.values
    if to_json(head.get("settings")) != to_json(settings):
        raise UserError(
            "these problems were decided with another model, other rows or other settings",
            remedy="give another file to write, or remove this one",
            file=record,
        )
    return decided


def _rows(search: Search, decision: Decision) -> Iterator[dict[str, Any]]:
    """The two rows of a hard problem that a prefix helps with; none of any other."""
    share = decision.get("share")
    if share is not None:
        about = {"problem": decision["problem"], "prefix_tokens": decision["tokens"], "prefix_share": share}
        yield row_of(search.example(decision["problem"], share), {KIND: "guided", **about})
        yield row_of(search.example(decision["problem"], None), {KIND: "plain", **about})


def told_of(decided: Sequence[Decision]) -> str:
    """The decisions in words: how many problems are hard, and how many of these a prefix helps with."""
    hard = [decision for decision in decided if not decision["right"]]
    helped = [decision for decision in hard if decision["share"] is not None]
    return f"{len(decided):,} problems, {len(hard):,} hard, {len(helped):,} of these with a prefix that helps"
