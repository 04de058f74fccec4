"""A tokenizer with a template for the tests of data."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.chatml import make_tokenizer


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerFast:
    return make_tokenizer()
