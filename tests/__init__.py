"""The tests, in folders named like those of src/thence; `repository` holds those of the pages, tools and benchmarks."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The folder of the checkout."""
