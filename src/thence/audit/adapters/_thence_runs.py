"""thence's own runs for the audit: a recipe that is interrupted and resumed, and the model that a stage publishes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any


class _Interrupted(Exception):
    """Ends a run in the middle of a stage, as a signal would."""


def run(case: dict, session: Any, lora: dict[str, Any] | None = None) -> None:
    """One case that resumes or saves.

    Args:
        lora: settings of adapters on all linear layers; None: none.
    """
    if case["beyond"] == "saved":
        tables = _recipe(case, session, "run", lora)
        with _watched(session):
            _run(tables)
        session.saved(_published(tables, session, lora))
        return
    with _watched(session, stop_after=case["steps"]), contextlib.suppress(_Interrupted):
        _run(_recipe(case, session, "straight", lora))
    session.unwatch()
    tables = _recipe(case, session, "resumed", lora)
    with _watched(None, stop_after=case["save_after"]), contextlib.suppress(_Interrupted):
        _run(tables)
    session.restart()
    with _watched(session, stop_after=case["steps"]), contextlib.suppress(_Interrupted):
        _run(tables)


def _recipe(case: dict, session: Any, name: str, lora: dict[str, Any] | None) -> dict[str, Any]:
    rows = case["micro_batch"] * case["accumulation"] * case["ranks"]
    model = {"path": session.model, "compute_dtype": "float32"} | ({"lora": lora} if lora else {})
    steps = {"steps": case["steps"]} if case["beyond"] == "saved" else {"epochs": case["epochs"]}
    return {
        "folder": str(Path(session.scratch).with_name("scratch-0") / name),
        "stages": ["sft"],
        "model": model,
        "data": {"source": [session.data("messages")]},
        "sft": steps
        | {
            "batch": rows,
            "lr": 0.01,
            "schedule": case["schedule"],
            "warmup": 0.0,
            "floor": 0.0,
            "betas": list(case["betas"]),
            "eps": 0.01,
            "weight_decay": 0.0,
            "clip_norm": 0.0,
            "micro_batch_tokens": 64,
            "checkpoint_every": case["save_after"] or 1,
        },
    }


def _run(tables: dict[str, Any]) -> None:
    from thence.pipeline.run import run as run_recipe

    run_recipe(tables)


def _published(tables: dict[str, Any], session: Any, lora: dict[str, Any] | None) -> Path:
    """The folder of the published model; adapters are merged into it first, by ``thence merge``."""
    stage = Path(tables["folder"]) / "stages" / "sft"
    if lora is None:
        return stage / "model"
    from thence.train.merge import merge

    return merge(stage / "adapter", Path(session.scratch) / "merged")


@contextlib.contextmanager
def _watched(session: Any, stop_after: int | None = None):
    """Keep the parameters around every step of thence's trainer, and end the run after so many steps of its schedule.

    Args:
        session: None: nothing is kept.
    """
    from thence.train.trainer import Trainer

    plain, begun = Trainer.step, []

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if session is not None and not begun:
            begun.append(True)
            session.watch(self.model.base_model)
            session.parameters(whole(self.policy))
        if self.steps_taken == stop_after:
            raise _Interrupted
        report = plain(self, *args, **kwargs)
        if session is not None:
            session.stepped(whole(self.policy))
        return report

    Trainer.step = step
    try:
        yield
    finally:
        Trainer.step = plain


def whole(policy: Any) -> Any:
    """Names and whole tensors as the model has them: adapters by themselves, since they are what is trained."""
    from torch.distributed.tensor import DTensor

    for name, parameter in policy.model.named_parameters():
        value = parameter.detach()
        yield name, value.full_tensor() if isinstance(value, DTensor) else value
