"""Cases of ``trl_grpo.py`` with several optimizer steps on a generation: ratio, clip, KL, temperature, corrections.

``policy`` says what each case asks, by hand from TRL's documentation. ``sampler`` and ``environment`` name what the
stand-in for the sampling engine hands over beside the completions, through TRL's ``rollout_func``. For the correction
of the sampler's log-probabilities ``use_vllm`` is set on the finished trainer, with an engine that has no weights to
take over: TRL's own code computes the correction, and vLLM is not needed.

A KL is asked as GRPO's paper has it (arXiv 2402.03300 eq. 4): k3 with its own gradient. TRL 1.16 multiplies it by the
differentiated ratio unless ``use_bias_correction_kl`` is off; a case with that asked for stands beside.

``truncated``: two responses come without their end token, as if cut at the length limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from ._shared import policy_case

SAMPLER, ENVIRONMENT, TRUNCATED = "sampler", "environment", "truncated"
"""Options of a case that are the stand-in's: log-probabilities off by a wave; two tokens of every other response that
the policy did not write; two responses without an end."""
STANDING_IN = (SAMPLER, ENVIRONMENT, TRUNCATED)
STRANGERS = ("policy", *STANDING_IN)
NOISE = 0.4
"""Size of the sampler's deviation, nats."""
EPSILON = 1e-4
"""What TRL adds to the standard deviation."""

_GROUP = {"scale": "group", "eps": EPSILON}
_SMOOTH = {"clip_low": None, "clip_high": None}
_IS = {
    SAMPLER: True, "vllm_importance_sampling_correction": True, "vllm_importance_sampling_clip_max": 1.2,
}  # fmt: skip


def _case(name: str, asked: str, policy: dict, iterations: int = 2, lr: float = 0.3, **options: Any) -> dict:
    made = policy_case(
        f"RL: {name}", asked, 2, 2, 1, policy=_GROUP | policy | {"normaliser": asked}, num_iterations=iterations,
        steps_per_generation=4, **options,
    )  # fmt: skip
    return made | {"epochs": iterations, "steps": 2 * iterations, "lr": lr}


CASES: tuple[dict, ...] = (
    _case("grpo", "sequence-mean", {}, loss_type="grpo") | {"quick": True},
    _case("grpo, epsilon_high", "sequence-mean", {"clip_low": 0.1, "clip_high": 0.28}, loss_type="grpo", epsilon=0.1,
          epsilon_high=0.28),
    _case("grpo, KL", "sequence-mean", {"kl": 0.5}, loss_type="grpo", beta=0.5),
    _case("grpo, KL without the ratio", "sequence-mean", {"kl": 0.5}, loss_type="grpo", beta=0.5,
          use_bias_correction_kl=False),
    _case("grpo, KL with the ratio", "sequence-mean", {"kl": 0.5, "kl_ratio": True}, loss_type="grpo", beta=0.5,
          use_bias_correction_kl=True),
    _case("grpo, delta", "sequence-mean", {"dual_clip": 1.25}, loss_type="grpo", delta=1.25),
    _case("grpo, temperature 0.7", "sequence-mean", {"temperature": 0.7}, loss_type="grpo", temperature=0.7),
    _case("grpo, sequence-level ratio", "sequence-mean", {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.05},
          loss_type="grpo", importance_sampling_level="sequence", epsilon=0.05),
    _case("dapo", "constant-divisor", {"clip_high": 0.28}, loss_type="dapo", epsilon_high=0.28),
    _case("dapo, KL without the ratio", "constant-divisor", {"kl": 0.5}, loss_type="dapo", beta=0.5,
          use_bias_correction_kl=False),
    _case("dr_grpo", "constant-divisor", {"scale": "none", "longest": 40}, lr=1.0, loss_type="dr_grpo",
          scale_rewards="none"),
    _case("bnpo", "micro-batch-mean", {}, loss_type="bnpo"),
    _case("cispo", "constant-divisor", {"surrogate": "weight", "clip_low": None, "clip_high": 0.1}, loss_type="cispo",
          epsilon_high=1.1),
    _case("luspo", "constant-divisor", {"ratio": "sequence", "longest": 1}, lr=0.03, loss_type="luspo",
          importance_sampling_level="sequence"),
    _case("importance, token_truncate", "sequence-mean", {"correction": "truncate", "correction_cap": 1.2},
          loss_type="grpo", vllm_importance_sampling_mode="token_truncate", **_IS),
    _case("importance, token_mask", "sequence-mean", {"correction": "mask", "correction_cap": 1.2}, loss_type="grpo",
          vllm_importance_sampling_mode="token_mask", **_IS),
    _case("importance, sequence_truncate", "sequence-mean",
          {"correction": "truncate", "correction_level": "sequence", "correction_cap": 1.2}, loss_type="grpo",
          vllm_importance_sampling_mode="sequence_truncate", **_IS),
    _case("importance, sequence_mask", "sequence-mean",
          {"correction": "mask", "correction_level": "sequence", "correction_cap": 1.2}, loss_type="grpo",
          vllm_importance_sampling_mode="sequence_mask", **_IS),
    _case("sapo", "sequence-mean", _SMOOTH | {"surrogate": "sigmoid"}, loss_type="sapo"),
    _case("sapo, temperatures", "sequence-mean",
          _SMOOTH | {"surrogate": "sigmoid", "soft_above": 2.0, "soft_below": 4.0}, loss_type="sapo",
          sapo_temperature_pos=2.0, sapo_temperature_neg=4.0),
    _case("vespo", "constant-divisor", _SMOOTH | {"surrogate": "gamma"}, lr=0.01, loss_type="vespo"),
    _case("vespo, importance", "constant-divisor",
          _SMOOTH | {"surrogate": "gamma", "correction": "truncate", "correction_cap": 1.2}, lr=0.01, loss_type="vespo",
          vllm_importance_sampling_mode="token_truncate", **_IS),
    _case("truncated, trained", "sequence-mean", {}, loss_type="grpo", truncated=True),
    *(
        _case(f"truncated, masked, {loss}", asked, {"truncated": "mask", **more}, loss_type=loss, truncated=True,
              mask_truncated_completions=True)
        for loss, asked, more in (
            ("grpo", "sequence-mean", {}), ("dapo", "constant-divisor", {}), ("bnpo", "micro-batch-mean", {}),
            ("dr_grpo", "constant-divisor", {"longest": 40}),
        )
    ),
    _case("environment", "sequence-mean", {}, loss_type="grpo", environment=True),
    _case("environment, dapo", "constant-divisor", {}, loss_type="dapo", environment=True),
)  # fmt: skip


def cut_of(case: dict, size: int) -> list[bool]:
    """Which responses are cut."""
    return [bool(case["options"].get(TRUNCATED)) and i in (1, 6) for i in range(size)]


def environment_of(case: dict, rows: Sequence[dict]) -> list[list[int]]:
    """Places in each response that the policy did not write."""
    wanted = case["options"].get(ENVIRONMENT)
    sizes = [sum(label != -100 for label in row["labels"]) for row in rows]
    return [[1, 2] if wanted and i % 2 and size > 4 else [] for i, size in enumerate(sizes)]


class Engine:
    """Stands where the sampling engine is: ``rollout_func`` of GRPOTrainer, with the probe's own responses.

    Args:
        rows: of the probe.
        say: told the log-probabilities of the responses, one list an example, when they are first sampled.
    """

    def __init__(self, case: dict, rows: list[dict], say: Any):
        self.case, self.rows, self.say = case, rows, say
        self.environment = environment_of(case, rows)
        self.cut = cut_of(case, len(rows))
        self.starts = [next(t for t, label in enumerate(row["labels"]) if label != -100) for row in rows]

    def __call__(self, prompts: list, trainer: Any) -> dict[str, Any]:
        """Completions of these prompts, with the log-probabilities of an engine that is not quite the policy."""
        tokenizer = trainer.processing_class
        found = {
            tuple(row["input_ids"][:start]): i
            for i, (row, start) in enumerate(zip(self.rows, self.starts, strict=True))
        }
        ids = [
            tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=True, return_dict=False)
            for p in prompts
        ]
        examples = [found[tuple(prompt)] for prompt in ids]
        logps = [self._logps(trainer, i) for i in examples]
        self.say(dict(zip(examples, logps, strict=True)))
        answers = [self._ids(i)[self.starts[i] :] for i in examples]
        result = {"prompt_ids": ids, "completion_ids": answers, "logprobs": logps}
        if self.case["options"].get(ENVIRONMENT):
            masks = [
                [int(t not in self.environment[i]) for t in range(len(a))]
                for i, a in zip(examples, answers, strict=True)
            ]
            result["env_mask"] = masks
        return result

    def _ids(self, example: int) -> list[int]:
        ids = self.rows[example]["input_ids"]
        last = max(t for t, label in enumerate(self.rows[example]["labels"]) if label != -100)
        return ids[:last] if self.cut[example] else ids

    def _logps(self, trainer: Any, example: int) -> list[float]:
        import torch

        row, start = torch.tensor(self._ids(example)), self.starts[example]
        with torch.no_grad():
            logits = trainer.accelerator.unwrap_model(trainer.model)(input_ids=row[None]).logits[0, start - 1 : -1]
        logps = (logits / trainer.args.temperature).log_softmax(-1).gather(1, row[start:, None])[:, 0].tolist()
        wave = NOISE if self.case["options"].get(SAMPLER) else 0.0
        return [logp + wave * math.sin(1.7 * t + example) for t, logp in enumerate(logps)]


def plug_in(trainer: Any, case: dict) -> None:
    """Let the trainer correct for the engine, as it does for vLLM alone."""
    if case["options"].get(SAMPLER):
        trainer.use_vllm = True
        trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
        trainer._last_loaded_step = -1


def say(case: dict, session: Any, given: Sequence[float], rows: Sequence[dict], size: int) -> None:
    """Tell what a case asks, and the facts of its rollouts."""
    options, environment = case["options"], environment_of(case, rows)
    policy = dict(options["policy"])
    if policy["normaliser"] == "constant-divisor" and "longest" not in policy:
        # dapo and cispo divide by the tokens of the generation batch, over its optimizer steps.
        policy["longest"] = _trained(case, rows, environment) / len(rows)
    cut = cut_of(case, len(rows))
    rollouts = [
        {"reward": reward, "group": i // size, "environment": environment[i], "truncated": cut[i]}
        for i, reward in enumerate(given)
    ]
    per_generation = options["steps_per_generation"] * options["num_iterations"] // case["accumulation"]
    versions = [step // per_generation * per_generation for step in range(case["steps"])]
    session.say(policy=policy, rollouts=rollouts, versions=versions)
    if options.get(SAMPLER):

        def told(logps: dict[int, list[float]]) -> None:
            for example, own in logps.items():
                rollouts[example]["sampler"] = own
            session.say(rollouts=rollouts)

        session.told = told


def _trained(case: dict, rows: Sequence[dict], environment: Sequence[Sequence[int]]) -> int:
    """Tokens of all responses that are to be trained."""
    masked = case["options"]["policy"].get("truncated") == "mask"
    sizes = [sum(label != -100 for label in row["labels"]) for row in rows]
    cut = cut_of(case, len(rows))
    kept = [(0 if masked else size - 1) if c else size for size, c in zip(sizes, cut, strict=True)]
    return sum(kept) - sum(map(len, environment))
