"""OpenRLHF's ``PolicyLoss``: clip, dual clip, GSPO, and the correction for the sampling engine.

Driven is ``openrlhf.models.loss`` alone, with the totals of the whole step that OpenRLHF's actor trainer hands to it.
The loop around it, the advantages (group mean, standard deviation plus 1e-9) included, is the adapter's own: the
trainer needs Ray, DeepSpeed and vLLM, and is not audited here.

Options: any argument of ``PolicyLoss``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from ._policy_loop import GROUP, drive, loop_case

STACK = "openrlhf"
PACKAGES = ("openrlhf", "transformers", "torch")
AXES = frozenset()

_EPS = {"eps": 1e-9}
_MASK = {"correction": "mask", "correction_floor": 0.8, "correction_cap": 1.2}
_BAND = {"sampler": True, "is_correction_threshold": [0.8, 1.2]}

CASES = (
    loop_case("ppo", "token-mean", _EPS) | {"quick": True},
    loop_case("ppo, clip-higher", "token-mean", _EPS | {"clip_high": 0.28}, clip_eps_high=0.28),
    loop_case("ppo, dual clip 1.3", "token-mean", _EPS | {"dual_clip": 1.3}, dual_clip=1.3),
    loop_case("ppo, mean of sequence means", "sequence-mean", _EPS, token_level_loss=False),
    loop_case("ppo, temperature 0.7", "token-mean", _EPS | {"temperature": 0.7}),
    loop_case("ppo, correction by token, masked", "token-mean", _EPS | _MASK, is_correction_level="token",
              is_correction_mode="mask", **_BAND),
    loop_case("ppo, correction by token, clipped", "token-mean", _EPS | _MASK | {"correction": "truncate"},
              is_correction_level="token", is_correction_mode="clip", **_BAND),
    loop_case("gspo", "sequence-mean", _EPS | {"ratio": "sequence", "clip_low": 0.1, "clip_high": 0.1},
              policy_loss_type="gspo", clip_eps_low=0.1, clip_eps_high=0.1),
)  # fmt: skip


def prepare() -> None:
    """Import the stack."""
    _loss()


def run(case: dict, session: Any) -> None:
    """One case."""
    import inspect

    import torch

    kind = _loss().PolicyLoss
    options = {name: value for name, value in case["options"].items() if name not in ("policy", "sampler")}
    missing = [name for name in options if name not in inspect.signature(kind).parameters]
    if missing:
        session.skip(f"this version has no {missing[0]} in PolicyLoss")
    policy_loss = kind(**options)
    known = inspect.signature(policy_loss.forward).parameters
    if "batch_num_tokens" not in known:
        session.skip("this version's PolicyLoss takes no totals of the step")

    def advantages_of(rewards: Any, mask: Any) -> Any:
        groups = rewards.view(-1, GROUP)
        found = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + _EPS["eps"])
        return found.flatten()[:, None] * mask

    def loss_of(tensors: dict, totals: dict) -> Any:
        sampler = {"rollout_log_probs": tensors["sampler"]} if case["options"].get("sampler") else {}
        return policy_loss(
            tensors["log_prob"], tensors["old"], tensors["advantages"], action_mask=tensors["mask"], dp_size=1,
            batch_num_tokens=torch.tensor(totals["tokens"]), global_batch_size=torch.tensor(totals["rows"]), **sampler,
        )[0]  # fmt: skip

    drive(case, session, case["options"].get("policy", _EPS), advantages_of, loss_of)


def _loss() -> Any:
    """OpenRLHF's module of losses, without what its package imports beside it (DeepSpeed, flash-attn)."""
    import importlib
    import importlib.util
    import sys
    import types
    from pathlib import Path

    root = importlib.util.find_spec("openrlhf")
    if root is None or not root.submodule_search_locations:
        raise ImportError("openrlhf is not installed")
    name = "openrlhf.models"
    if name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = [str(Path(root.submodule_search_locations[0]) / "models")]
        sys.modules[name] = package
    missing = "deepspeed" not in sys.modules and importlib.util.find_spec("deepspeed") is None
    if missing:
        sys.modules["deepspeed"] = types.ModuleType("deepspeed")  # named by a neighbour of masked_mean, and not called
    try:
        return importlib.import_module(f"{name}.loss")
    finally:
        if missing:
            del sys.modules["deepspeed"]  # others ask whether it is installed
