"""Types of numbers and texts that a user gives, each with its bounds: one place for recipes, flags, suites and methods.

A bound is wide enough for every sensible use, and narrow enough that a slip (1e300, a forgotten value, a wrong unit) is
refused. A true or false never counts as a number, nor does a text, nor a fraction where a whole number is meant.
"""

from __future__ import annotations

import unicodedata
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BeforeValidator, Field

from thence.names import RULE, bad_name
from thence.settings.annotations import Says


def _is_sampled(value: float) -> float:
    if 0 < value < 0.001:
        raise ValueError("a temperature is 0 (greedy) or at least 0.001")
    return value


def _is_name(value: str) -> str:
    if wrong := bad_name(value):
        raise ValueError(wrong)
    return value


def _is_place(value: str) -> str:
    if not value.strip():
        raise ValueError("the text is empty")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise ValueError("it holds a control character")
    if len(value.encode("utf-8")) > 4096:
        raise ValueError("it is longer than any path")
    return value


def _is_no_address(value: str) -> str:
    if "://" in value:
        raise ValueError("an address on the net is not read: download it, and give the path or the hub name")
    return value


def _is_whole_text(value: str) -> str:
    if any(unicodedata.category(character) == "Cs" for character in value):
        raise ValueError("it holds half a character (a lone surrogate)")
    return value


def _plainly_written(value: Any) -> Any:
    """A number where a text is meant, as its text: a column's value 3, an environment variable 4."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


# Whole numbers.
Count = Annotated[int, Ge(1), Le(10**9)]
Natural = Annotated[int, Ge(0), Le(10**9)]
BatchesAhead = Annotated[int, Ge(0), Le(2)]
Rows = Annotated[int, Ge(1), Le(10**6)]
"""What lies side by side or makes one batch: prompts, rollouts, samples, demonstrations."""
Steps = Annotated[int, Ge(1), Le(10**7)]
Tokens = Annotated[int, Ge(1), Le(10**7)]
"""Of one row, response or micro-batch."""
TokenBudget = Annotated[int, Ge(1), Le(10**15)]
"""Of a whole stage."""
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
Processes = Annotated[int, Ge(1), Le(65_536)]
"""Ranks, threads, jobs, requests under way, micro-batches of one rank."""

# Numbers.
Cores = Annotated[float, Ge(0.01), Le(65_536)]
"""CPU cores that a process is given; a fraction shares one."""
Gpus = Annotated[float, Ge(0), Le(1024)]
Rate = Annotated[float, Gt(0), Le(1e6)]
"""A learning rate. Rates that harm are told by the training itself; a number beyond these is no rate."""
Share = Annotated[float, Ge(0), Le(1)]
SomeShare = Annotated[float, Gt(0), Le(1)]
PartShare = Annotated[float, Ge(0), Lt(1)]
"""A share that is never the whole: AdamW's betas, a level, a smoothing."""
Coefficient = Annotated[float, Ge(0), Le(1e6)]
SomeCoefficient = Annotated[float, Gt(0), Le(1e6)]
Signed = Annotated[float, Ge(-1e6), Le(1e6)]
Epsilon = Annotated[float, Ge(1e-30), Le(1)]
"""Added to a divisor in float32."""
Ceiling = Annotated[float, Field(gt=1, allow_inf_nan=True), Says("a number above 1, or inf: off")]
"""A largest ratio; the one kind of number that may be infinite."""
Surplus = Annotated[float, Ge(1), Le(100)]
"""How many times what is needed is asked for."""
Norm = Annotated[float, Ge(0), Le(1e12)]
Epochs = Annotated[float, Ge(1e-6), Le(1e6)]
Flops = Annotated[float, Gt(0), Le(1e28)]
Seconds = Annotated[float, Ge(0.001), Le(604_800)]
"""A time limit, at most a week."""
_SAMPLED = Says("0 (greedy) or a number from 0.001 to 100")
Temperature = Annotated[float, Ge(0), Le(100), AfterValidator(_is_sampled), _SAMPLED]
"""0 is greedy."""
SomeTemperature = Annotated[float, Ge(0.001), Le(100)]
Gigabytes = Annotated[float, Ge(0), Le(100_000)]

# Texts.
Text = Annotated[str, AfterValidator(_is_whole_text)]
"""Any text that can be written to a file."""
Written = Annotated[str, BeforeValidator(_plainly_written), AfterValidator(_is_whole_text)]
"""A text that may be given as a number."""
Name = Annotated[str, AfterValidator(_is_name), Says(f"a name; {RULE}")]
"""What becomes a file or folder: see :mod:`thence.names`."""
Place = Annotated[str, AfterValidator(_is_place), Says("a path or a name, in quotes")]
"""A path, a function of a file, or a name elsewhere: never empty, without control characters."""
_SOURCE = Says("a path or a hub name, in quotes")
Source = Annotated[str, AfterValidator(_is_place), AfterValidator(_is_no_address), _SOURCE]
"""A path or a hub name."""
