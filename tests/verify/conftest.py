"""A pool of graders that the tests of a file share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from thence.verify import GradingPool


@pytest.fixture(scope="module")
def pool() -> Iterator[GradingPool]:
    with GradingPool(workers=2, seconds=1.0) as pool:
        yield pool
