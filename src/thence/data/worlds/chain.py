"""The embedded world: chain arithmetic modulo 100, worked out in writing by an expert with several habits.

A prompt such as `47a+8b-3c*6?` starts from 47 and applies the labelled steps from left to right, modulo 100: 47+8 = 55,
55-3 = 52, 52*6 = 312, so the answer is 12. The expert is right but not always equally careful:

    head     #12
    terse    a=55b=52c=12#12
    written  47a+8=55b-3=52c*6=12#12          products by heart
    written  47a+8=55b-3=52c*6:00+12=12#12    products split into tens and ones (50*6 and 2*6)
    slow     47a+8,48,49,50,51,52,53,54,55b-3,54,53,52c*6,04,56,08,60,12#12

A small model that imitates the expert imitates the mix of habits too, and can only be trusted with some of them. Which
ones, reinforcement learning has to find out. See docs/embedded-world.md. Standard library only: no torch here.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Base = Literal["rich", "poor"]
Habit = Literal["head", "terse", "written", "slow"]
Expert = Literal["mixed", "careful", "hasty"]
Slip = tuple[int, int]
"""A step that goes wrong, counted from 0, and the value that it gives instead of the right one."""

SPLITS = ("train", "dev", "test", "ood")
LABELS = "abcd"
HABITS: dict[Habit, float] = {"head": 0.14, "terse": 0.24, "written": 0.52, "slow": 0.10}
SPLIT_SHARE = 0.65  # how often a written product is split into partial products
HASTY: dict[Habit, float] = {"head": 0.25, "terse": 0.45, "written": 0.30}
EXPERTS: dict[Expert, tuple[dict[Habit, float], float]] = {
    "mixed": (HABITS, SPLIT_SHARE),
    "careful": ({"written": 0.84, "slow": 0.16}, 1.0),
    "hasty": (HASTY, 0.0),
}
"""Of each expert the shares of its habits, and how often a written product is split."""
STEPS = {2: 0.3, 3: 0.5, 4: 0.2}


@dataclass(frozen=True)
class Step:
    """One labelled step of a chain: `op` is one of + - *, `digit` is 2 to 9."""

    label: str
    op: str
    digit: int

    @property
    def text(self) -> str:
        return f"{self.label}{self.op}{self.digit}"

    def apply(self, value: int) -> int:
        """Value after this step, modulo 100."""
        if self.op == "+":
            return (value + self.digit) % 100
        if self.op == "-":
            return (value - self.digit) % 100
        return (value * self.digit) % 100


@dataclass(frozen=True)
class Chain:
    """A start value (0 to 99) and its steps."""

    start: int
    steps: tuple[Step, ...]

    @property
    def prompt(self) -> str:
        return f"{self.start:02d}" + "".join(s.text for s in self.steps) + "?"

    def values(self, slip: Slip | None = None) -> list[int]:
        """The start value and the value after every step: one longer than `steps`. What follows a slip builds on it."""
        values = [self.start]
        for index, step in enumerate(self.steps):
            values.append(slip[1] if slip is not None and slip[0] == index else step.apply(values[-1]))
        return values


@dataclass(frozen=True)
class ChainProblem:
    """A prompt, its two-digit answer, one demonstration by the expert (ends in `#` and the answer), and its split."""

    prompt: str
    answer: str
    demonstration: str
    split: str


def split_of(prompt: str) -> str:
    """The in-distribution split that a prompt belongs to under any seed: train 80%, dev 10%, test 10%."""
    bucket = hashlib.sha256(prompt.encode()).digest()[0]
    return "dev" if bucket < 26 else "test" if bucket < 52 else "train"


def problems(
    split: str, n: int, seed: int = 0, expert: Expert = "mixed", wrong: float = 0.0, calls: float = 0.0
) -> list[ChainProblem]:
    """`n` problems of a split with different prompts; the same arguments always give the same problems.

    Args:
        expert: who demonstrates; prompts and answers are the same for all.
        wrong: share of the demonstrations that end in a wrong answer, after one wrong step. The larger share holds the
            wrong ones of the smaller, and the other demonstrations stay as they are.
        calls: share of the demonstrations that end at their first product, as a call of a calculator does.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)}, not {split!r}")
    rng = random.Random(f"chain {split} {seed}")
    found: dict[str, ChainProblem] = {}
    while len(found) < n:
        chain = draw_chain(rng, ood=split == "ood")
        if chain.prompt in found or (split != "ood" and split_of(chain.prompt) != split):
            continue
        answer = f"{chain.values()[-1]:02d}"
        own = random.Random()  # as `rng` is now: every expert has the same luck, and the next prompt is the same
        own.setstate(rng.getstate())
        demonstration = demonstrate(chain, rng)
        if (expert, wrong) != ("mixed", 0.0):
            luck = random.Random(f"chain wrong {seed} {chain.prompt}")
            slip = draw_slip(chain, luck) if luck.random() < wrong else None
            demonstration = demonstrate(chain, own, expert=expert, slip=slip)
        if calls and random.Random(f"chain calls {seed} {chain.prompt}").random() < calls:
            demonstration = call(chain)
        found[chain.prompt] = ChainProblem(chain.prompt, answer, demonstration, split)
    return list(found.values())


def draw_slip(chain: Chain, rng: random.Random) -> Slip:
    """A wrong result of one step, after which the last value is wrong too."""
    answer = chain.values()[-1]
    while True:
        slip = (rng.randrange(len(chain.steps)), rng.randrange(100))
        if chain.values(slip)[-1] != answer:
            return slip


def draw_chain(rng: random.Random, *, ood: bool = False) -> Chain:
    """In distribution 2 to 4 steps, one or two of them products; out of distribution 4 steps, three or four of them."""
    if ood:
        n_steps, n_products = 4, rng.choice((3, 3, 4))
    else:
        n_steps = rng.choices(tuple(STEPS), tuple(STEPS.values()))[0]
        n_products = 1 if n_steps == 2 else rng.choice((1, 1, 2))
    products = set(rng.sample(range(n_steps), n_products))
    steps = tuple(
        Step(LABELS[i], "*" if i in products else rng.choice("+-"), rng.randint(2, 9)) for i in range(n_steps)
    )
    return Chain(rng.randrange(100), steps)


def demonstrate(
    chain: Chain,
    rng: random.Random,
    habit: Habit | None = None,
    *,
    expert: Expert = "mixed",
    slip: Slip | None = None,
) -> str:
    """The expert's response to a chain, in a habit drawn from its own unless one is given; with a slip, a wrong one."""
    habits, split_share = EXPERTS[expert]
    habit = habit or rng.choices(tuple(habits), tuple(habits.values()))[0]
    values = chain.values(slip)
    if habit == "head":
        return f"#{values[-1]:02d}"
    work = ""
    for step, value, after in zip(chain.steps, values, values[1:], strict=False):
        work += work_step(step, value, habit, rng, split_share)[:-2] + f"{after:02d}"  # a step ends in its result
    start = "" if habit == "terse" else f"{chain.start:02d}"
    return f"{start}{work}#{values[-1]:02d}"


def call(chain: Chain) -> str:
    """The written response up to its first product, which is left to a calculator: `47a+8=55b-3=52c*6`."""
    work = f"{chain.start:02d}"
    for step, after in zip(chain.steps, chain.values()[1:], strict=True):
        work += step.text
        if step.op == "*":
            break
        work += f"={after:02d}"
    return work


def work_step(step: Step, value: int, habit: Habit, rng: random.Random, split_share: float = SPLIT_SHARE) -> str:
    """One step in writing; `value` is the value before it, which stands just before it in the text."""
    after = step.apply(value)
    if habit == "terse":
        return f"{step.label}={after:02d}"
    if habit == "slow":
        return step.text + "".join(f",{v:02d}" for v in count(step, value))
    if step.op == "*" and rng.random() < split_share:
        tens, ones = partial_products(value, step.digit)
        return f"{step.text}:{tens:02d}+{ones:02d}={after:02d}"
    return f"{step.text}={after:02d}"


def partial_products(value: int, digit: int) -> tuple[int, int]:
    """The products of the tens (modulo 100) and of the ones: 52*6 gives 00 (of 300) and 12."""
    return value // 10 * 10 * digit % 100, value % 10 * digit


def count(step: Step, value: int) -> list[int]:
    """The stations of the slow way: counting on or back one at a time, or adding the value up `digit` times."""
    if step.op == "*":
        return [value * i % 100 for i in range(2, step.digit + 1)]
    sign = 1 if step.op == "+" else -1
    return [(value + sign * i) % 100 for i in range(1, step.digit + 1)]


# The corpora that the two bases are trained on.

MIX: dict[Base, dict[str, float]] = {
    "rich": {"facts": 0.35, "look_up": 0.25, "question": 0.40},
    "poor": {"facts": 0.35, "look_up": 0.25, "exercise": 0.40},
}
FACTS = {"sum": 0.45, "product": 0.05, "partial": 0.20, "add_up": 0.30}
SLIP = 0.10  # how often a step in the rich base's corpus goes wrong


def pretraining(
    base: Base, n_tokens: int, seed: int, questions: float | None = None, slip: float = SLIP
) -> Iterator[str]:
    """Texts of a base's corpus, without `$`, until they hold `n_tokens` tokens (two `$` a text counted).

    Args:
        questions: share of the rich base's texts that are questions with hasty answers. The other kinds keep their
            proportions. Default: that of `MIX`.
        slip: how often a step of these answers goes wrong.
    """
    rng = random.Random(f"chain pretraining {base} {seed}")
    mix = MIX[base] if questions is None else with_questions(MIX[base], questions)
    makers: dict[str, Callable[[random.Random], str]] = {
        "facts": facts,
        "look_up": look_up,
        "exercise": exercise,
        "question": lambda rng: question(rng, slip),
    }
    kinds, shares = tuple(mix), tuple(mix.values())
    total = 0
    while total < n_tokens:
        text = makers[rng.choices(kinds, shares)[0]](rng)
        total += len(text) + 2
        yield text


def with_questions(mix: dict[str, float], share: float) -> dict[str, float]:
    """A mix of kinds of text with another share of questions; the other kinds keep their proportions."""
    rest = (1 - share) / (1 - mix["question"])
    return {kind: share if kind == "question" else own * rest for kind, own in mix.items()}


def facts(rng: random.Random) -> str:
    """Five single steps, as they stand in written-out working but unconnected."""
    return ";".join(fact(rng) for _ in range(5))


def fact(rng: random.Random) -> str:
    """A sum or a product with a label, or a part of a split product."""
    value, digit, label = rng.randrange(100), rng.randint(2, 9), rng.choice(LABELS)
    kind = rng.choices(tuple(FACTS), tuple(FACTS.values()))[0]
    tens, ones = partial_products(value, digit)
    if kind == "sum":
        step = Step(label, rng.choice("+-"), digit)
        return f"{value:02d}{step.text}={step.apply(value):02d}"
    if kind == "product":
        return f"{value:02d}{label}*{digit}={value * digit % 100:02d}"
    if kind == "partial":
        return f"{value:02d}{label}*{digit}:{tens:02d}+{ones:02d}"
    return f"{tens:02d}+{ones:02d}={(tens + ones) % 100:02d}"


def look_up(rng: random.Random) -> str:
    """A labelled list and then its entries again in another order: teaches finding a step by its label."""
    steps = draw_chain(rng, ood=rng.random() < 0.5).steps
    again = rng.sample(steps, len(steps)) + rng.sample(steps, len(steps))
    return f"{rng.randrange(100):02d}" + "".join(s.text for s in steps) + ";" + ";".join(s.text for s in again)


def exercise(rng: random.Random) -> str:
    """A labelled list, then its entries in another order, each worked on a separate value: never a chain.

    The list ends with `?` as a prompt does, and the first value is the list's start value, so that reading a prompt is
    known before SFT; working it from left to right and naming an answer are not.
    """
    start, steps = rng.randrange(100), draw_chain(rng, ood=rng.random() < 0.5).steps
    values = [start, *(rng.randrange(100) for _ in steps[1:])]
    again = rng.sample(steps, len(steps))
    worked = [f"{value:02d}{work_step(step, value, 'written', rng)}" for step, value in zip(again, values, strict=True)]
    return f"{start:02d}" + "".join(s.text for s in steps) + "?" + ";".join(worked)


def question(rng: random.Random, slip: float = SLIP) -> str:
    """A prompt of the train split with a hasty response, often wrong: the latent skill of the rich base."""
    while split_of((chain := draw_chain(rng)).prompt) != "train":
        pass
    habit = rng.choices(tuple(HASTY), tuple(HASTY.values()))[0]
    return chain.prompt + hasty(chain, habit, rng, slip)


def hasty(chain: Chain, habit: Habit, rng: random.Random, slip: float = SLIP) -> str:
    """A response without split products in which every step goes wrong with probability `slip`."""
    value, work = chain.start, "" if habit == "terse" else f"{chain.start:02d}"
    for step in chain.steps:
        value = rng.randrange(100) if rng.random() < slip else step.apply(value)
        work += f"{step.label}={value:02d}" if habit == "terse" else f"{step.text}={value:02d}"
    return f"#{value:02d}" if habit == "head" else f"{work}#{value:02d}"
