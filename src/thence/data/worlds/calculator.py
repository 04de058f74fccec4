"""A calculator for the embedded world, as an environment: a turn that ends at a product is a call.

    policy       47a+8=55b-3=52c*6
    environment  =12
    policy       #12

The policy ends its turn behind a product, the calculator writes its value modulo 100, and the policy goes on. A turn
that ends in an answer (`#12`) is the last: right gives 1, wrong 0. Any other turn is no call and no answer: 0. Only
products are worked out, so sums, their order and the answer stay with the policy.
"""

from __future__ import annotations

import re
from typing import Any

_ANSWER = re.compile(r"#(\d\d)\Z")
_CALL = re.compile(r"(?:(\d\d))?[a-d]\*([2-9])\Z")


class Calculator:
    """Works out the product that a turn ends with; rewards the right answer."""

    def reset(self, row: dict[str, Any]) -> None:
        """Begin with a row: it has the prompt and the right answer."""
        self.answer = row["answer"]
        self.value: int | None = None  # of the last call

    def step(self, text: str) -> tuple[str | None, float | None, bool]:
        """Answer a turn: an observation, a reward (None: not yet), and whether this was the last turn."""
        if answer := _ANSWER.search(text):
            return None, float(answer[1] == self.answer), True
        call = _CALL.search(text)
        value = self.value if call is None or call[1] is None else int(call[1])
        if call is None or value is None:
            return None, 0.0, True
        self.value = value * int(call[2]) % 100
        return f"={self.value:02d}", None, False
