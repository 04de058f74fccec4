"""All kinds of bad inputs, by name."""

from __future__ import annotations

from .flags import bad_flags
from .folders import bad_comparison, bad_evaluation, bad_run
from .harness import Maker
from .readers import bad_jsonl, bad_parquet
from .recipes import bad_field, bad_text

KINDS: dict[str, Maker] = {
    "recipe-field": bad_field,
    "recipe-text": bad_text,
    "flags": bad_flags,
    "jsonl": bad_jsonl,
    "parquet": bad_parquet,
    "run-folder": bad_run,
    "evaluation-folder": bad_evaluation,
    "comparison-folder": bad_comparison,
}
