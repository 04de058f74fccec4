"""Measuring a model on a test set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from thence.data.trajectory import Prompt
from thence.data.worlds.vocabulary import VOCABULARY, build_tokenizer
from thence.evaluate.measure import measure, measurement_record, sample_record
from thence.rollout.native import Sampling
from thence.rollout.responses import respond
from thence.train.parallel import SingleProcess
from thence.verify.reward import Grader
from thence.verify.verdict import Grade, right, unknown, wrong


class ByFirstToken(Grader):
    """Right where the response begins with a digit, unknown where it begins with a letter, else wrong."""

    def grade_many(
        self, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[Grade]:
        return [self._grade(response) for _, response, _ in zip(prompts, responses, answers, strict=True)]

    def _grade(self, response: str) -> Grade:
        if response[:1].isdigit():
            return right(response)
        return unknown("a letter") if response[:1].isalpha() else wrong(response)


class OneOfTwo(SingleProcess):
    """One rank of two, whose partner's part is known."""

    world = 2

    def __init__(self, rank: int, other: Any):
        self.rank, self.other = rank, other

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other] if self.rank == 0 else [self.other, value]


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


def measured(model: Any, tokenizer: Any, prompts: Sequence[Prompt], samples: int = 3, ranks: Any = None) -> Any:
    return measure(
        model,
        tokenizer,
        ByFirstToken(),
        prompts,
        split="test",
        samples=samples,
        sampling=SAMPLING,
        seed_parts=(0, "eval"),
        ranks=ranks or SingleProcess(),
    )


def test_the_row_counts_what_the_responses_are(model: Any, tokenizer: Any) -> None:
    row, trajectories = measured(model, tokenizer, PROMPTS)
    verdicts = [t.verdict for t in trajectories]
    assert (row.right, row.wrong, row.unknown) == tuple(verdicts.count(v) for v in ("right", "wrong", "unknown"))
    assert min(row.right, row.wrong, row.unknown) > 0
    assert row.accuracy == pytest.approx(row.right / 36)  # unknown is not right
    assert [t.prompt.index for t in trajectories] == [i for i in range(12) for _ in range(3)]
    assert row.mean_tokens == pytest.approx(sum(len(t.response_ids) for t in trajectories) / 36)
    assert row.truncated == sum(t.response_ids[-1] not in SAMPLING.stop_ids for t in trajectories)
    assert 0 < row.truncated < 36
    assert (row.problems, row.samples, row.split, row.temperature) == (12, 3, "test", 1.0)


def test_a_problems_responses_depend_neither_on_other_problems_nor_on_more_samples(model: Any, tokenizer: Any) -> None:
    _, whole = measured(model, tokenizer, PROMPTS)
    _, some = measured(model, tokenizer, PROMPTS[4:6])
    assert [t.response_ids for t in some] == [t.response_ids for t in whole[12:18]]
    _, first = measured(model, tokenizer, PROMPTS, samples=1)
    assert [t.response_ids for t in first] == [t.response_ids for t in whole[::3]]
    assert len({t.response_ids for t in whole}) > 24


def test_a_prompt_that_is_drawn_twice_is_sampled_anew_and_the_others_stay_as_they_were(
    model: Any, tokenizer: Any
) -> None:
    once = respond(model, tokenizer, None, PROMPTS, 3, SAMPLING, (0, "eval"))
    twice = respond(model, tokenizer, None, [*PROMPTS, PROMPTS[4]], 3, SAMPLING, (0, "eval"))
    assert [t.response_ids for t in twice[:36]] == [t.response_ids for t in once]
    assert [t.response_ids for t in twice[36:]] != [t.response_ids for t in once[12:15]]


def test_two_ranks_share_the_problems_and_agree_with_one(model: Any, tokenizer: Any) -> None:
    row, trajectories = measured(model, tokenizer, PROMPTS)
    parts = [respond(model, tokenizer, ByFirstToken(), PROMPTS[rank::2], 3, SAMPLING, (0, "eval")) for rank in range(2)]
    for rank in range(2):
        found, shared = measured(model, tokenizer, PROMPTS, ranks=OneOfTwo(rank, parts[1 - rank]))
        assert found == row
        assert [t.response_ids for t in shared] == [t.response_ids for t in trajectories]


def test_records_are_plain_values(model: Any, tokenizer: Any) -> None:
    row, trajectories = measured(model, tokenizer, PROMPTS)
    assert json.loads(json.dumps(measurement_record(row))) == measurement_record(row)
    record = sample_record(trajectories[0], stage="eval", split="test")
    assert json.loads(json.dumps(record)) == record
    assert (record["stage"], record["prompt"], record["tokens"]) == (
        "eval",
        "problem 0",
        len(trajectories[0].response_ids),
    )
