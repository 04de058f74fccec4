"""verl's functions of reinforcement learning: advantages, policy losses, KL and their aggregation.

Driven are ``verl.trainer.ppo.core_algos`` and its ``ActorConfig``, with the totals of the whole step that verl's
workers hand to them. The loop around them is the adapter's own: verl's actor worker and trainer need Ray and a sampling
engine, and are not audited here.

Options: ``loss_mode`` (vanilla, gspo, cispo, dppo_tv, dppo_kl), any argument of ``ActorConfig``, ``std``
(``norm_adv_by_std_in_grpo``).
verl bounds k3's exponent to 20 and k3 to 10, beyond which a token has no gradient; the probe stays within.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from ._policy_loop import GROUP, drive, loop_case

STACK = "verl"
PACKAGES = ("verl", "transformers", "tensordict", "torch")
AXES = frozenset()

_GRPO = {"dual_clip": 3.0}
_TRUST = {"clip_low": 2e-3, "clip_high": 3e-3, "dual_clip": 1.2}
_BOUNDS = {"clip_ratio_low": 2e-3, "clip_ratio_high": 3e-3, "clip_ratio_c": 1.2}
_IS = {"correction": "truncate", "correction_cap": 1.2}

CASES = (
    loop_case("vanilla", "token-mean", _GRPO) | {"quick": True},
    loop_case("vanilla, clip-higher", "token-mean", _GRPO | {"clip_high": 0.28}, clip_ratio_high=0.28),
    loop_case("vanilla, dual clip 1.3", "token-mean", {"dual_clip": 1.3}, clip_ratio_c=1.3),
    loop_case("vanilla, seq-mean-token-mean", "sequence-mean", _GRPO, loss_agg_mode="seq-mean-token-mean"),
    loop_case("vanilla, seq-mean-token-sum-norm", "constant-divisor", _GRPO | {"scale": "none", "longest": 48}, lr=1.0,
              loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=48, std=False),
    loop_case("vanilla, KL low_var_kl", "token-mean", _GRPO | {"kl": 0.5}, lr=0.05, use_kl_loss=True, kl_loss_coef=0.5),
    loop_case("vanilla, KL k2", "token-mean", _GRPO | {"kl": 0.5, "estimator": "k2"}, lr=0.05, use_kl_loss=True,
              kl_loss_coef=0.5, kl_loss_type="k2"),
    loop_case("vanilla, temperature 0.7", "token-mean", _GRPO | {"temperature": 0.7}),
    loop_case("vanilla, rollout_is_weights", "token-mean", _GRPO | _IS, sampler=True),
    loop_case("gspo", "sequence-mean", {"ratio": "sequence", "clip_low": 0.1, "clip_high": 0.1}, loss_mode="gspo",
              loss_agg_mode="seq-mean-token-mean", clip_ratio_low=0.1, clip_ratio_high=0.1),
    loop_case("cispo", "token-mean", {"surrogate": "weight"}, loss_mode="cispo"),
    loop_case("dppo_tv", "token-mean", _TRUST | {"surrogate": "tv"}, loss_mode="dppo_tv", **_BOUNDS),
    loop_case("dppo_kl", "token-mean", _TRUST | {"surrogate": "binary-kl"}, loss_mode="dppo_kl", **_BOUNDS),
)  # fmt: skip

STRANGERS = ("policy", "sampler", "std", "loss_mode")


def prepare() -> None:
    """Import the stack."""
    import verl.trainer.ppo.core_algos
    import verl.workers.config  # noqa: F401


def run(case: dict, session: Any) -> None:
    """One case."""
    import inspect

    import numpy as np
    from verl.trainer.ppo.core_algos import agg_loss, compute_grpo_outcome_advantage, get_policy_loss_fn, kl_penalty
    from verl.workers.config import ActorConfig

    options = case["options"]
    wanted = {name: value for name, value in options.items() if name not in STRANGERS}
    missing = [name for name in wanted if name not in inspect.signature(ActorConfig).parameters]
    if missing:
        session.skip(f"this version has no {missing[0]} in ActorConfig")
    config = ActorConfig(strategy="fsdp", rollout_n=GROUP, ppo_micro_batch_size_per_gpu=case["micro_batch"], **wanted)
    policy_loss = get_policy_loss_fn(options.get("loss_mode", "vanilla"))

    def advantages_of(rewards: Any, mask: Any) -> Any:
        scores = (mask.cumsum(1) == mask.sum(1, keepdim=True)) * mask * rewards[:, None]
        index = np.array([i // GROUP for i in range(len(rewards))])
        return compute_grpo_outcome_advantage(scores, mask, index, norm_adv_by_std_in_grpo=options.get("std", True))[0]

    def loss_of(tensors: dict, totals: dict) -> Any:
        whole = {
            "dp_size": 1, "batch_num_tokens": totals["tokens"], "global_batch_size": totals["rows"],
            "loss_scale_factor": config.loss_scale_factor,
        }  # fmt: skip
        config.global_batch_info.update(whole)
        weights = None
        if options.get("sampler"):
            # As verl's rollout correction: truncated at a threshold, by token.
            weights = (tensors["old"] - tensors["sampler"]).exp().clamp(max=_IS["correction_cap"])
        loss, _ = policy_loss(
            old_log_prob=tensors["old"], log_prob=tensors["log_prob"], advantages=tensors["advantages"],
            response_mask=tensors["mask"], loss_agg_mode=config.loss_agg_mode, config=config,
            rollout_is_weights=weights,
        )  # fmt: skip
        if config.use_kl_loss:
            kl = kl_penalty(tensors["log_prob"], tensors["reference"], config.kl_loss_type)
            own = agg_loss(kl, tensors["mask"], config.loss_agg_mode, **config.global_batch_info)
            loss = loss + config.kl_loss_coef * own
        return loss

    drive(case, session, options.get("policy", _GRPO), advantages_of, loss_of)
