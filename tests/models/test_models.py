"""One or more families for every way that a model can differ: thence is right on it, or refuses it.

All architectures: ``benchmarks/model_matrix.py``.
"""

from __future__ import annotations

import sys

import pytest
import torch

from tests import ROOT
from tests.models import tiny_models

sys.path.insert(0, str(ROOT / "benchmarks"))
from model_cells import Cell, restated, rows, run_cells

from thence.objective import Batch, Logp, Term

TRAINED = ("open", "step", "checkpoint", "published")
EVERYTHING = (*TRAINED, "packed", "sampled")
# What must work, and not merely be refused.
PROMISED = {
    "llama": EVERYTHING,
    "mistral": EVERYTHING,
    "qwen2": EVERYTHING,
    "qwen3": EVERYTHING,
    "gemma2": EVERYTHING,
    "gemma3_text": EVERYTHING,
    "phi3": EVERYTHING,
    "gpt2": EVERYTHING,
    "gpt_neox": EVERYTHING,
    "gptj": EVERYTHING,
    "stablelm": EVERYTHING,
    "bloom": (*TRAINED, "sampled"),
    "mixtral": EVERYTHING,
    "qwen3_moe": EVERYTHING,
    "deepseek_v3": EVERYTHING,
    "gpt_oss": EVERYTHING,
    "cohere2": EVERYTHING,
    "olmo3": EVERYTHING,
    "mamba": (*TRAINED, "sampled"),
    "lfm2": (*TRAINED, "sampled"),
    "qwen3_next": (*TRAINED, "sampled"),
    "granitemoehybrid": (*TRAINED, "sampled"),
}


def cells_of(kind: str) -> dict[str, Cell]:
    return dict(run_cells(kind))


@pytest.mark.matrix(6)
@pytest.mark.parametrize("kind", tiny_models.SAMPLE)
def test_a_family_is_right_or_refused(kind):
    cells = cells_of(kind)
    bad = {name: f"{c.verdict}: {c.detail}" for name, c in cells.items() if c.verdict in ("wrong", "traceback")}
    assert not bad
    assert all(cell.detail for cell in cells.values() if cell.verdict == "refused")
    missing = {name: cells[name].detail for name in PROMISED.get(kind, ()) if cells[name].verdict != "works"}
    assert not missing


@pytest.mark.parametrize("kind", ["bert, reads both ways", "xlnet"])
def test_a_model_that_sees_the_future_is_refused_at_opening(kind):
    assert cells_of(kind)["open"].verdict == "refused"


@pytest.mark.parametrize("kind", ["mistral", "gpt_oss", "gemma3_text"])
def test_tiny_models_feel_their_windows_and_sinks(kind):
    """The matrix can fail: a token outside every window counts for nothing, and a sink changes the loss."""
    model = tiny_models.tiny_model(kind).double()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    batch = Batch((Term("logp", Logp()),), tuple(rows()))
    loss = restated(model, batch)[0]
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.constant_(parameter, -100.0)
    model.config.sliding_window = 10_000
    for module in model.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = 10_000
    assert abs(restated(model, batch)[0] - loss) > 0.01


def test_every_architecture_is_made_or_has_a_reason():
    """Nothing is dropped without a word when transformers gains an architecture or renames a field."""
    reasons = set(tiny_models.NOT_MADE)
    assert reasons <= set(tiny_models.architectures())
    failed = {}
    for kind in [*tiny_models.architectures(), *tiny_models.variants()]:
        if kind not in reasons:
            try:
                tiny_models.tiny_config(kind)
            except Exception as error:
                failed[kind] = repr(error)[:200]
    assert not failed
