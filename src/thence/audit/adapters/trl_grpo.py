"""Drives TRL's ``GRPOTrainer`` with fixed completions and rewards: only the sampling is replaced.

The rows of the data set are the probe's examples; ``model.generate`` answers each prompt with the example's own
response, and TRL does the rest: it tokenizes prompts, cuts completions at the end token, asks for rewards, forms
advantages, shuffles rows inside a generation batch, and computes the loss. Successive examples count as the
generations of one prompt: groups go by place in TRL, and its sampler, which repeats one prompt, is replaced by one
that puts the examples next to each other.

Options, beside any argument of ``GRPOConfig``: ``num_generations`` (default 4), ``loss_type`` (default dapo),
``scale_rewards`` (default group). The advantages that these ask for are computed here from the rewards.

Switched off unless the case asks for them: KL penalty, temperature, gradient clipping, warm-up, logging and saving.
The first update of a generation batch is on-policy, so the clipped ratio is one and all loss types are plain policy
gradients that differ in their normaliser. For ``cispo`` that takes ``epsilon_high`` above one (TRL's documentation says
5): its default, 0.2, is an upper bound of the ratio itself there and makes every update a fifth of what it should be.
Cases with several updates on a generation batch are in ``_trl_rl.py``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _trl_rl as reinforcement
from . import transformers as hf
from . import trl_sft as sft
from ._shared import advantages, policy_case, rewards

STACK = "trl"
PACKAGES = ("trl", "transformers", "accelerate", "datasets", "torch")
AXES = frozenset({"ranks", "adamw", "bfloat16", "checkpointing"})
COMPLETION_LIMIT = 40
"""``max_completion_length``: above the probe's longest response, so that nothing is cut."""
EPSILON = 1e-4
"""What TRL adds to the standard deviation (with Bessel's correction) that it divides by."""


CASES: tuple[dict, ...] = (
    policy_case("grpo, micro 2 x 4", "sequence-mean", loss_type="grpo"),
    policy_case("grpo, micro 2 x 2, 2 ranks", "sequence-mean", 2, 2, 2, loss_type="grpo"),
    policy_case("dr_grpo, micro 2 x 4", "constant-divisor", loss_type="dr_grpo"),
    policy_case("dr_grpo, micro 2 x 2, 2 ranks", "constant-divisor", 2, 2, 2, loss_type="dr_grpo"),
    policy_case("bnpo, micro 2 x 4", "micro-batch-mean", loss_type="bnpo"),
    policy_case("bnpo, micro 2 x 2, 2 ranks", "micro-batch-mean", 2, 2, 2, loss_type="bnpo"),
    policy_case("cispo, micro 2 x 4", "token-mean", loss_type="cispo", epsilon_high=5.0),
    policy_case("sapo, micro 2 x 4", "sequence-mean", loss_type="sapo"),
    policy_case("vespo, micro 2 x 4", "token-mean", loss_type="vespo"),
    policy_case("luspo, micro 2 x 4", "constant-divisor", loss_type="luspo", importance_sampling_level="sequence"),
    policy_case("grpo, sequence-level ratio", "sequence-mean", loss_type="grpo", importance_sampling_level="sequence"),
    policy_case("dapo, 4 prompts x 2", "token-mean", num_generations=2),
    policy_case("dapo, rewards scaled by the batch", "token-mean", scale_rewards="batch"),
    policy_case("dapo, rewards not scaled", "token-mean", scale_rewards="none"),
    policy_case("dapo, three steps, micro 2 x 2", "token-mean", accumulation=2) | {"epochs": 2, "steps": 3, "lr": 0.1},
    policy_case("dapo, one generation for two steps", "constant-divisor", micro=1, steps_per_generation=8),
    *reinforcement.CASES,
)


def prepare() -> None:
    """Import the stack."""
    sft.prepare()
    from trl import GRPOConfig, GRPOTrainer  # noqa: F401  # pyright: ignore


def run(case: dict, session: Any) -> None:
    """One case."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore

    options = {"num_generations": 4, "loss_type": "dapo", "scale_rewards": "group", **case["options"]}
    batch = _generation_batch(case, options)
    _check(case, options, batch, session)
    sft.require_choice(GRPOConfig, "loss_type", options["loss_type"], session)
    given = rewards(case["examples"])
    if "policy" in options:
        reinforcement.say(case, session, given, session.rows(), options["num_generations"])
    else:
        _say(given, options, batch, session)
    options = {name: value for name, value in options.items() if name not in reinforcement.STRANGERS}
    options["scale_rewards"] = _scaling(GRPOConfig, options["scale_rewards"], session)
    wanted = hf.settings(case, session) | {
        "max_completion_length": COMPLETION_LIMIT,
        "temperature": 1.0,
        "beta": 0.0,
        "num_iterations": 1,
    }
    if "policy" in case["options"]:
        wanted["num_train_epochs"] = 1  # a case's epochs are the passes over a generation
    arguments = hf.build(GRPOConfig, wanted, options, session)
    tokenizer = AutoTokenizer.from_pretrained(session.model)
    model = hf.load_model(case, session)
    rows = session.rows()
    model.generate = _answer(rows, tokenizer.pad_token_id)  # pyright: ignore
    engine = _engine(case, rows, session, GRPOTrainer)
    prompts = [row["prompt"] for row in session.rows("chat-prompt-completion")]

    class SideBySide(GRPOTrainer):
        def _get_train_sampler(self, *_: Any, **__: Any):
            per_generation = getattr(self.args, "steps_per_generation", None) or case["accumulation"]
            return _order(len(rows), batch, per_generation * getattr(self.args, "num_iterations", 1))

    trainer = SideBySide(
        model=model,
        args=arguments,
        reward_funcs=_given_reward,
        train_dataset=Dataset.from_list(
            [{"prompt": p, "given_reward": r} for p, r in zip(prompts, given, strict=True)]
        ),
        callbacks=[hf.watch_steps(session, model)],
        **{sft.tokenizer_argument(GRPOTrainer): tokenizer},
        **engine,
    )
    reinforcement.plug_in(trainer, case)
    hf.train(trainer, model, session)


def _engine(case: dict, rows: list[dict], session: Any, kind: Any) -> dict[str, Any]:
    """The argument of GRPOTrainer with the stand-in for the engine, where a case needs more than completions."""
    import inspect

    options = case["options"]
    if not any(options.get(name) for name in reinforcement.STANDING_IN):
        return {}
    if "rollout_func" not in inspect.signature(kind).parameters:
        session.skip("this version of TRL has no rollout_func")
    return {"rollout_func": reinforcement.Engine(case, rows, getattr(session, "told", lambda logps: None))}


def _generation_batch(case: dict, options: dict[str, Any]) -> int:
    """Rows that are sampled, rewarded and put into groups at once, over all ranks."""
    return case["micro_batch"] * case["ranks"] * options.get("steps_per_generation", case["accumulation"])


def _check(case: dict, options: dict[str, Any], batch: int, session: Any) -> None:
    if batch % options["num_generations"]:
        session.skip(f"{batch} rows in a generation batch do not divide into groups of {options['num_generations']}")
    if case["examples"] % batch:
        session.skip(f"TRL drops incomplete generation batches: {case['examples']} examples, {batch} rows in each")


def _say(given: Sequence[float], options: dict[str, Any], batch: int, session: Any) -> None:
    """Tell what the settings ask for."""
    size = options["num_generations"]
    session.say(
        rewards=list(given),
        groups=[i // size for i in range(len(given))],
        advantages=advantages(given, size, options["scale_rewards"], EPSILON, batch),
    )
    if options["loss_type"] == "dr_grpo":
        session.say(longest=options.get("max_completion_length", COMPLETION_LIMIT))
    if options.get("steps_per_generation") and options["loss_type"] == "dapo":
        # With several steps a generation TRL divides by the tokens of the generation batch over its steps, not by
        # those of the step: a constant per row for all steps of that generation.
        trained = sum(label != -100 for row in session.rows() for label in row["labels"])
        session.say(longest=trained / batch, note="the normaliser is the mean over the steps of a generation batch")
    if options["loss_type"] == "luspo":
        # A sequence's mean times its length: the sum over tokens, averaged over rows.
        session.say(longest=1)


def _scaling(config: Any, wanted: str, session: Any) -> str | bool:
    """The value of ``scale_rewards``, which was a switch before it became a choice."""
    field = config.__dataclass_fields__.get("scale_rewards")
    if field is None or not isinstance(field.default, bool):
        return wanted
    if wanted == "batch":
        session.skip("this version of TRL cannot scale rewards by the batch")
    return wanted == "group"


def _answer(rows: list[dict], pad: int):
    """A stand-in for ``generate``: appends to each prompt the response that the probe has for it."""
    import torch

    responses = {}
    for row in rows:
        start = next(t for t, label in enumerate(row["labels"]) if label != -100)
        responses[tuple(row["input_ids"][:start])] = row["input_ids"][start:]

    def generate(inputs: Any = None, attention_mask: Any = None, input_ids: Any = None, **_: Any):
        ids = inputs if input_ids is None else input_ids
        prompts = [tuple(row[mask.bool()].tolist()) for row, mask in zip(ids, attention_mask, strict=True)]
        answers = [responses[prompt] for prompt in prompts]
        longest = max(map(len, answers))
        filled = [[*answer, *[pad] * (longest - len(answer))] for answer in answers]
        return torch.cat([ids, torch.tensor(filled, device=ids.device)], dim=1)

    return generate


def _given_reward(completions: Sequence[Any], given_reward: Sequence[float], **_: Any) -> list[float]:
    """The reward that stands in the data set."""
    return [float(reward) for reward in given_reward]


def _order(size: int, batch: int, repeats: int):
    """A sampler: the examples of a generation batch in order, as often as it is looked at."""
    from torch.utils.data import Sampler

    class Order(Sampler):
        def __iter__(self):
            for start in range(0, size, batch):
                for _ in range(repeats):
                    yield from range(start, start + batch)

        def __len__(self) -> int:
            return size * repeats

    return Order()
