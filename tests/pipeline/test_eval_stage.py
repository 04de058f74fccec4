"""The evaluation stage of a run: what it samples, on how many ranks, and what it makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from thence.data.trajectory import Prompt
from thence.data.worlds.vocabulary import VOCABULARY, build_tokenizer
from thence.evaluate.run import evaluate
from thence.evaluate.store import Settings, Store
from thence.evaluate.suites import Task
from thence.evaluate.summary import task_result
from thence.pipeline.eval_stage import EvalPart, RanksBackend, problem_keys, result_row
from thence.pipeline.sample_lines import evaluation_line
from thence.recipe import Eval
from thence.rollout.native import Sampling
from thence.rollout.responses import respond, response_seed
from thence.train.parallel import SingleProcess
from thence.verify.reward import Grader
from thence.verify.verdict import Grade, right, unknown, wrong


class ByFirstToken(Grader):
    """Right where the response begins with a digit, unknown where it begins with a letter, else wrong."""

    def grade_many(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        answers: Sequence[str | None],
        columns: Sequence[str] | None = None,
    ) -> list[Grade]:
        return [self._grade(response) for _, response, _ in zip(prompts, responses, answers, strict=True)]

    def _grade(self, response: str) -> Grade:
        if response[:1].isdigit():
            return right(response)
        return unknown("a letter") if response[:1].isalpha() else wrong(response)


class OneOfTwo(SingleProcess):
    """One rank of two; what the other one gives is known, in order."""

    world = 2

    def __init__(self, rank: int, other: Iterator[Any]):
        self.rank, self.other, self.given = rank, other, []

    def gather(self, value: Any) -> list[Any]:
        self.given.append(value)
        return [value, next(self.other)] if self.rank == 0 else [next(self.other), value]


@pytest.fixture(scope="module")
def model(tiny_model: Any) -> Any:
    return tiny_model(torch.float32, "llama", 0).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


PROMPTS = [Prompt(i, (0, 3 + i, 4 + i % 5), answer="1", text=f"problem {i}") for i in range(12)]
SAMPLING = Sampling(max_tokens=6, stop_ids=(0, 5, 9))
MODEL_KNOWS = 40  # the tiny model's vocabulary is larger than the tokenizer's; the rest decodes to nothing
assert len(VOCABULARY) < MODEL_KNOWS


def part_of(prompts: Sequence[Prompt], samples: int = 3) -> EvalPart:
    task = Task(name="test-1.0", files=("f",), samples=samples, temperature=1.0, max_tokens=6, grader="exact")
    return EvalPart(
        "test",
        1.0,
        task,
        dict(zip(problem_keys("test-1.0", prompts), prompts, strict=True)),
        SAMPLING,
        (0,),
        cast(Any, None),
    )


Measured = Callable[..., tuple[Store, EvalPart]]


@pytest.fixture
def measured(model: Any, tokenizer: Any, tmp_path: Path) -> Measured:
    def act(prompts: Sequence[Prompt] = PROMPTS, samples: int = 3, ranks: Any = None) -> tuple[Store, EvalPart]:
        part = part_of(prompts, samples)
        context: Any = SimpleNamespace(model=model, tokenizer=tokenizer, ranks=ranks or SingleProcess())
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        settings = Settings(model="base", suite="eval", tasks={part.task.name: part.task})
        store = evaluate(
            settings,
            {part.task.name: part.problems(tokenizer)},
            folder,
            lambda: RanksBackend(context, {part.task.name: part}, Eval()),
            seed_of=lambda task, problem, number: response_seed(part.seed_parts, part.prompts[problem.key], number),
            checker=ByFirstToken(),
        )
        return store, part

    return act


def row_of(store: Store, part: EvalPart) -> dict[str, Any]:
    return result_row(part, task_result(store, part.task, part.task.grader, list(part.prompts)))


def test_the_row_counts_what_the_responses_are(measured: Measured) -> None:
    store, part = measured()
    row, samples = row_of(store, part), store.samples("test-1.0")
    verdicts = [grade.verdict for grade in store.grades("test-1.0")]
    counts = {name: verdicts.count(name) for name in ("right", "wrong", "unknown")}
    assert {name: row[name] for name in counts} == counts and min(counts.values()) > 0
    assert row["accuracy"] == pytest.approx(row["right"] / 36)  # unknown is not right
    assert [sample.place for sample in samples] == [(key, i) for key in part.prompts for i in range(3)]
    assert row["mean_tokens"] == pytest.approx(sum(sample.tokens or 0 for sample in samples) / 36)
    assert row["truncated"] == sum(sample.finish == "length" for sample in samples)
    assert 0 < row["truncated"] < 36
    assert (row["problems"], row["samples"], row["split"], row["temperature"]) == (12, 3, "test", 1.0)


def test_the_store_says_what_was_asked_and_with_which_random_numbers(
    measured: Measured, model: Any, tokenizer: Any
) -> None:
    store, part = measured()
    sample = store.samples("test-1.0")[4]
    prompt = part.prompts[sample.problem]
    assert (prompt.index, sample.sample, sample.plain) == (1, 1, True)
    assert sample.prompt == (("user", tokenizer.decode(list(prompt.token_ids))),)
    again = respond(model, tokenizer, None, [prompt], 2, SAMPLING, part.seed_parts)[1]
    assert sample.seed == response_seed(part.seed_parts, prompt, 1) and sample.tokens == len(again.response_ids)
    line = evaluation_line(prompt, sample, store.grades("test-1.0")[4], stage="eval", split="test")
    assert (line["stage"], line["prompt"], line["tokens"], line["answer"]) == ("eval", "problem 1", sample.tokens, "1")


def test_a_problems_responses_depend_neither_on_other_problems_nor_on_more_samples(measured: Measured) -> None:
    whole, some, first = (measured(*given)[0].samples("test-1.0") for given in ((), (PROMPTS[4:6],), (PROMPTS, 1)))
    assert [s.text for s in some] == [s.text for s in whole[12:18]]
    assert [s.text for s in first] == [s.text for s in whole[::3]]
    assert len({s.text for s in whole}) > 18


def test_a_prompt_that_is_drawn_twice_is_sampled_anew_and_the_others_stay_as_they_were(
    model: Any, tokenizer: Any
) -> None:
    once = respond(model, tokenizer, None, PROMPTS, 3, SAMPLING, (0, "eval"))
    twice = respond(model, tokenizer, None, [*PROMPTS, PROMPTS[4]], 3, SAMPLING, (0, "eval"))
    assert [t.response_ids for t in twice[:36]] == [t.response_ids for t in once]
    assert [t.response_ids for t in twice[36:]] != [t.response_ids for t in once[12:15]]


def test_two_ranks_share_the_problems_and_agree_with_one(measured: Measured, model: Any, tokenizer: Any) -> None:
    store, part = measured()
    backend = RanksBackend(_context(model, tokenizer, SingleProcess()), {"test-1.0": part}, Eval())
    whole = list(backend.sampled(part).values())
    halves = [[g for i in range(rank, 12, 2) for g in whole[3 * i : 3 * i + 3]] for rank in range(2)]
    leading = OneOfTwo(0, iter([None, halves[1]]))
    shared, _ = measured(ranks=leading)
    assert shared.samples("test-1.0") == store.samples("test-1.0")
    assert leading.given == ["test-1.0", halves[0]]
    following = OneOfTwo(1, iter(["test-1.0", halves[0], None]))
    RanksBackend(_context(model, tokenizer, following), {"test-1.0": part}, Eval()).follow()
    assert following.given == [None, halves[1], None]


def _context(model: Any, tokenizer: Any, ranks: Any) -> Any:
    return SimpleNamespace(model=model, tokenizer=tokenizer, ranks=ranks)


def test_two_prompts_with_one_text_are_two_problems() -> None:
    twice = [Prompt(0, (1,), text="a"), Prompt(1, (1,), text="b"), Prompt(2, (1,), text="a")]
    keys = problem_keys("t", twice)
    assert len(set(keys)) == 3 and keys[:2] == problem_keys("t", twice[:2])
