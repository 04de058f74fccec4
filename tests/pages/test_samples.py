"""How many samples a page holds, and what it says of their tokens."""

from __future__ import annotations

import base64
import gzip
import json
import random
from functools import partial
from itertools import pairwise

from thence.pages.samples import HeldSamples, ShownSample, hold, weighed_tokens


def sample(number: int, text: str, weighed: dict | None = None) -> ShownSample:
    return ShownSample("right", "p", f"{number} {text}", "a", "", "", "w", "", weighed=weighed)


def rows(held: HeldSamples) -> list[list]:
    return json.loads(gzip.decompress(base64.b64decode(held.data)))["samples"]


def noise(number: int, length: int = 300) -> str:
    return "".join(random.Random(number).choices("abcdefghijklmnopqrstuvwxyz", k=length))


def test_all_samples_are_held_where_there_is_room_and_their_links_are_line_numbers():
    held = hold([("eval", [partial(sample, i, "text") for i in range(5000)]), ("rl stage", [partial(sample, 0, "x")])])
    assert (held.held, held.total) == (5001, 5001)
    assert [row[0] for row in rows(held)][:2] == ["sample-eval-1", "sample-eval-2"]
    assert rows(held)[-1][0] == "sample-rl-stage-1"


def test_the_largest_source_is_thinned_evenly_where_there_is_no_room():
    large = [partial(sample, i, noise(i)) for i in range(1000)]
    held = hold([("large", large), ("small", [partial(sample, i, "x") for i in range(20)])], room=80_000)
    assert len(held.data) <= 80_000 and held.total == 1020
    names = [row[0] for row in rows(held)]
    assert sum(name.startswith("sample-small") for name in names) == 20
    numbers = [int(name.rpartition("-")[2]) for name in names if name.startswith("sample-large")]
    assert 100 < len(numbers) < 1000
    assert {after - before for before, after in pairwise(numbers)} == {numbers[1] - numbers[0]}


def test_what_is_left_out_is_never_made():
    made = []

    def make(number: int) -> ShownSample:
        made.append(number)
        return sample(number, "x" * 100_000)

    held = hold([("long", [partial(make, i) for i in range(3000)])])
    assert held.total == 3000 and held.held == len(rows(held)) < len(made) < 3000


def test_figures_of_tokens_go_before_whole_samples_do():
    def weighed(number: int) -> dict:
        drawn = random.Random(number)
        return {"text": ["t"] * 100, "weight": [drawn.random() for _ in range(100)]}

    held = hold([("rl", [partial(sample, i, "x", weighed(i)) for i in range(200)])], room=120_000)
    kept = [row[-1] for row in rows(held)]
    assert held.held == 200 and 20 <= sum(one is not None for one in kept) < 200


def test_figures_that_do_not_fit_the_tokens_are_left_out():
    good = {"text": ["a", "\u202eb"], "weight": [1, -0.5], "short": [1], "bad": ["x", 1], "huge": [1e999, 0.0]}
    assert weighed_tokens(good) == {"text": ["a", "[U+202E]b"], "weight": [1, -0.5]}
    for damaged in (None, 3, {}, {"text": "ab", "weight": [1, 2]}, {"text": ["a"]}, {"text": [], "weight": []}):
        assert weighed_tokens(damaged) is None
