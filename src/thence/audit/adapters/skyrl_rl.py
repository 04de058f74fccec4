"""SkyRL's functions of reinforcement learning: advantages, reductions, policy losses and KL.

Driven is ``skyrl.backends.skyrl_train.utils.ppo_utils``: the advantage estimators of its registry, the reductions,
which scale the advantages of a mini-batch so that losses can be summed, the policy losses of its registry with their
correction for the sampling engine, and the estimators of KL. The loop around them is the adapter's own, the mean of KL
over sequences and micro-batches included: SkyRL's workers and trainer need Ray, a sampling engine and CUDA, and are
not audited here.

Options: ``policy_loss_type`` and any argument of ``AlgorithmConfig``; a dict for a nested one.
Limits: ``clip_cov``, ``kl_cov``, ``sapo``, ``dppo`` and ``rollout_is`` have no case, since the audit has no objective
that says what they should do; nor have an entropy bonus, a critic, KL in the reward, and KL beside a reduction other
than ``sequence_mean``. SkyRL bounds k3 to 10, beyond which a token has no gradient; the learning rates stay within.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from ._policy_loop import GROUP, drive, loop_case

STACK = "skyrl"
PACKAGES = ("skyrl", "transformers", "torch")
AXES = frozenset()

_PLAIN: dict[str, Any] = {}
_DUAL = {"dual_clip": 1.3}
_IS = {"correction": "truncate", "correction_cap": 1.2}
_TIS = {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.2}
_MASKED = {"correction": "mask", "correction_floor": 0.8, "correction_cap": 1.2}
_BAND = _TIS | {"token_mask_is_threshold_low": 0.8, "token_mask_is_threshold_high": 1.2}

CASES = (
    loop_case("regular", "token-mean", _PLAIN) | {"quick": True},
    loop_case("regular, clip-higher", "token-mean", {"clip_high": 0.28}, eps_clip_high=0.28),
    loop_case("dual_clip 1.3", "token-mean", _DUAL, policy_loss_type="dual_clip", clip_ratio_c=1.3),
    loop_case("regular, sequence_mean", "sequence-mean", _PLAIN, loss_reduction="sequence_mean"),
    loop_case("regular, seq_mean_token_sum_norm", "constant-divisor", {"scale": "none", "longest": 48}, lr=1.0,
              loss_reduction="seq_mean_token_sum_norm", max_seq_len=48, grpo_norm_by_std=False),
    loop_case("regular, token_mean_legacy", "token-mean", _PLAIN, loss_reduction="token_mean_legacy") | {"extra": True},
    loop_case("regular, KL k3, sequence_mean", "sequence-mean", {"kl": 0.5}, lr=0.02,
              use_kl_loss=True, kl_loss_coef=0.5, loss_reduction="sequence_mean"),
    loop_case("regular, KL k2, sequence_mean", "sequence-mean", {"kl": 0.5, "estimator": "k2"}, lr=0.02,
              use_kl_loss=True, kl_loss_coef=0.5, kl_estimator_type="k2", loss_reduction="sequence_mean"),
    loop_case("regular, temperature 0.7", "token-mean", {"temperature": 0.7}),
    loop_case("regular, tis_ratio_type token", "token-mean", _IS, sampler=True, off_policy_correction=_TIS),
    loop_case("regular, token mask and tis_ratio_type token", "token-mean", _MASKED, lr=0.02, sampler=True,
              off_policy_correction=_BAND),
    loop_case("gspo", "sequence-mean", {"ratio": "sequence", "clip_low": 0.1, "clip_high": 0.1}, lr=0.02,
              policy_loss_type="gspo", loss_reduction="sequence_mean", eps_clip_low=0.1, eps_clip_high=0.1),
    loop_case("cispo", "token-mean", {"surrogate": "weight", "clip_low": 1.0, "clip_high": 5.0},
              policy_loss_type="cispo", cispo={"cispo_eps_clip_low": 1.0, "cispo_eps_clip_high": 5.0}),
)  # fmt: skip

STRANGERS = ("policy", "sampler")


def prepare() -> None:
    """Import the stack."""
    _functions()


def run(case: dict, session: Any) -> None:
    """One case."""
    import numpy as np

    functions = _functions()
    config = _config(case, session)
    policy_loss = functions.PolicyLossRegistry.get(config.policy_loss_type)
    window, micro = case["micro_batch"] * case["accumulation"], case["micro_batch"]

    def advantages_of(rewards: Any, mask: Any) -> Any:
        import torch

        scores = (mask.cumsum(1) == mask.sum(1, keepdim=True)) * mask * rewards[:, None]
        found = functions.compute_advantages_and_returns(
            token_level_rewards=scores, response_mask=mask, index=np.array([i // GROUP for i in range(len(rewards))]),
            adv_estimator=config.advantage_estimator, config=config, grpo_norm_by_std=config.grpo_norm_by_std,
        )[0]  # fmt: skip
        # As the trainer does before its workers see a mini-batch: the reduction goes into the advantages.
        return torch.cat(
            [
                functions.apply_loss_reduction_to_advantages_minibatch(
                    advantages=found[start : start + window], loss_mask=mask[start : start + window],
                    loss_reduction=config.loss_reduction, micro_batch_size=micro, max_seq_len=config.max_seq_len,
                )
                for start in range(0, len(rewards), window)
            ]
        )  # fmt: skip

    def loss_of(tensors: dict, totals: dict) -> Any:
        sampler = tensors["sampler"] if case["options"].get("sampler") else None
        loss, _ = policy_loss(
            tensors["log_prob"], tensors["old"], tensors["advantages"], config=config, loss_mask=tensors["mask"],
            rollout_logprobs=sampler,
        )  # fmt: skip
        if config.use_kl_loss:
            kl = functions.compute_approx_kl(
                tensors["log_prob"], tensors["reference"], tensors["mask"], config.kl_estimator_type
            )
            mean = functions.masked_mean(kl, tensors["mask"], dim=-1).mean()
            loss = loss + config.kl_loss_coef * mean / totals["micro_batches"]
        return loss

    drive(case, session, case["options"].get("policy", _PLAIN), advantages_of, loss_of)


def _config(case: dict, session: Any) -> Any:
    """SkyRL's AlgorithmConfig with the options of the case."""
    import dataclasses

    from skyrl.train.config import AlgorithmConfig  # pyright: ignore

    options = {"use_kl_loss": False} | {n: value for n, value in case["options"].items() if n not in STRANGERS}
    config = AlgorithmConfig()
    known = {field.name for field in dataclasses.fields(config)}
    missing = [name for name in options if name not in known]
    if missing:
        session.skip(f"this version has no {missing[0]} in AlgorithmConfig")
    for name, value in options.items():
        nested = dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        setattr(config, name, nested)
    return config


def _functions() -> Any:
    """SkyRL's module of losses. The package beside it, which serves models, cannot be imported by Python 3.11 (a
    ``typing.TypedDict`` in a pydantic model), so its ``__init__`` is passed over."""
    import importlib
    import importlib.util
    import sys
    import types
    from pathlib import Path

    root = importlib.util.find_spec("skyrl")
    if root is None or not root.submodule_search_locations:
        raise ImportError("skyrl is not installed")
    folder = Path(next(iter(root.submodule_search_locations)))
    for name in ("backends", "backends.skyrl_train", "backends.skyrl_train.utils"):
        whole = f"skyrl.{name}"
        if whole not in sys.modules:
            package = types.ModuleType(whole)
            package.__path__ = [str(folder.joinpath(*name.split(".")))]
            sys.modules[whole] = package
    return importlib.import_module("skyrl.backends.skyrl_train.utils.ppo_utils")
