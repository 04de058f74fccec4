"""Drives thence itself: its readers, chat templates, methods and ``Trainer``; ranks are real processes under gloo.

Rows go in the order of the data; a batch never reaches across two epochs, and rank r of D holds every D-th row from
row r on, as in the stages of a recipe. thence fills micro-batches by a token budget, longest rows first; the budget is
the smallest one that needs no more micro-batches than the case has. SGD takes the place of AdamW where the case asks
for it; warm-up, weight decay and clipping are off.

Options: ``method`` and its own options; ``parallel`` cuts the weights over ranks: ``fsdp2``, or ``hsdp`` with two
replicas; ``lora`` is the rank of adapters on all linear layers, which are then what is trained and judged. Methods of
reinforcement learning get fixed rewards, the probe's responses as rollouts, and successive examples as groups, so that
nothing is sampled and no advantage is zero.

Cases that resume or save run a whole recipe, which is interrupted and run again, or whose published model is read
(adapters merged); the evaluation is the held-out loss of a stage.

Limits: weights are float32 (arithmetic may be bfloat16), and there is no label smoothing. ``sharding.offload`` has no
case: thence leaves it out where the device is a CPU, and this audit runs on CPUs.
"""

from __future__ import annotations

from typing import Any

from . import _thence_rl as reinforcement
from . import _thence_runs
from ._shared import RESUMED, SAVED, advantages, policy_case, rewards

STACK = "thence"
PACKAGES = ("thence", "transformers", "torch")
AXES = frozenset({"ranks", "incomplete", "epochs", "adamw", "autocast", "packing", "checkpointing"}) | {
    "resume",
    "saved",
    "evaluation",
}
GROUP = 4
LONGEST = 48
"""Constant length of Dr. GRPO's normaliser, tokens."""
STD_EPS = 1e-6
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""What a recipe's adapters are put on in the llama that is the usual probe."""


_DR_GRPO = {"method": "dr_grpo", "constant_tokens": LONGEST}
_PAPER = {"method": "grpo", "aggregation": "sequence-mean", "std": True}

_SEQUENCES = {"aggregation": "sequence-mean"}
_STEPS = {"epochs": 2, "steps": 3, "lr": 0.1}
_BOTH = {"precision": "autocast", "checkpointing": True}
_CUT, _REPLICAS, _LORA = {"parallel": "fsdp2"}, {"parallel": "hsdp"}, {"lora": 16}
CLIP = 0.5
"""Below the norm of every step's gradient."""
_EDGE = {"epochs": 2, "steps": 3, "lr": 0.1, "packing": True, "examples": 10}
CASES: tuple[dict, ...] = (
    policy_case("sft by sequence mean, micro 2 x 4", "sequence-mean", aggregation="sequence-mean") | {"quick": True},
    policy_case("sft by sequence mean, 2 ranks", "sequence-mean", 2, 2, 2, aggregation="sequence-mean"),
    policy_case("grpo, micro 2 x 4", "token-mean", method="grpo") | {"quick": True},
    policy_case("grpo, micro 2 x 2, 2 ranks", "token-mean", 2, 2, 2, method="grpo"),
    policy_case("grpo by sequence mean, micro 2 x 4", "sequence-mean", **_PAPER),
    policy_case("grpo by sequence mean, 2 ranks", "sequence-mean", 2, 2, 2, **_PAPER),
    policy_case("dr_grpo, micro 2 x 4", "constant-divisor", **_DR_GRPO),
    policy_case("dr_grpo, 2 ranks", "constant-divisor", 2, 2, 2, **_DR_GRPO),
    policy_case("dapo, micro 2 x 4", "token-mean", method="dapo"),
    policy_case("dapo, 2 ranks", "token-mean", 2, 2, 2, method="dapo"),
    policy_case("dapo, packing, micro 1 x 1", "token-mean", 1, 1, method="dapo") | {"packing": True},
    policy_case("grpo, three steps, micro 2 x 2", "token-mean", 2, 2, method="grpo")
    | {"epochs": 2, "steps": 3, "lr": 0.1},
    policy_case("4 ranks", "token-mean", 2, 1, 4),
    policy_case("checkpointing, 2 ranks", "token-mean", 2, 2, 2) | {"checkpointing": True},
    policy_case("bfloat16, 2 ranks", "token-mean", 2, 2, 2) | {"precision": "autocast"},
    policy_case("clipped, 2 ranks", "token-mean", 2, 2, 2) | {"clip": CLIP},
    *(
        policy_case(f"weights cut, {name}", asked, *cut, **options) | settings
        for name, asked, cut, options, settings in (
            ("1 rank", "token-mean", (2, 4, 1), _CUT, {}),
            ("2 ranks", "token-mean", (2, 2, 2), _CUT, {}),
            ("4 ranks", "token-mean", (2, 1, 4), _CUT, {}),
            ("2 replicas of 2 ranks", "sequence-mean", (2, 1, 4), _REPLICAS | _SEQUENCES, {}),
            ("grpo, 2 ranks", "token-mean", (2, 2, 2), _CUT | {"method": "grpo"}, {}),
            ("packing, 2 ranks", "token-mean", (2, 2, 2), _CUT, _EDGE),
            ("checkpointing, 2 ranks", "token-mean", (2, 2, 2), _CUT, {"checkpointing": True}),
            ("bfloat16, 2 ranks", "token-mean", (2, 2, 2), _CUT, {"precision": "autocast"}),
            ("AdamW, 2 ranks", "token-mean", (2, 2, 2), _CUT, {"optimizer": "adamw"}),
            ("clipped, 2 ranks", "token-mean", (2, 2, 2), _CUT, {"clip": CLIP}),
            ("bf16 and checkpointing, 4 ranks", "token-mean", (2, 1, 4), _REPLICAS, _BOTH),
        )
    ),
    *(
        policy_case(f"LoRA, {name}", asked, *cut, **_LORA | options) | settings
        for name, asked, cut, options, settings in (
            ("micro 2 x 4", "token-mean", (2, 4, 1), {}, {"quick": True}),
            ("three steps, micro 2 x 2", "token-mean", (2, 2, 1), {}, _STEPS),
            ("2 ranks", "token-mean", (2, 2, 2), {}, _STEPS),
            ("weights cut, 1 rank", "token-mean", (2, 4, 1), _CUT, {}),
            ("weights cut, 2 ranks", "token-mean", (2, 2, 2), _CUT, _STEPS),
            ("weights cut, 4 ranks", "token-mean", (2, 1, 4), _CUT, _STEPS),
            ("weights cut, 2 replicas of 2 ranks", "sequence-mean", (2, 1, 4), _REPLICAS | _SEQUENCES, _STEPS),
            ("weights cut, grpo, 2 ranks", "token-mean", (2, 2, 2), _CUT | {"method": "grpo"}, {}),
            ("weights cut, checkpointing, 2 ranks", "token-mean", (2, 2, 2), _CUT, {"checkpointing": True}),
            ("weights cut, bfloat16, 2 ranks", "token-mean", (2, 2, 2), _CUT, {"precision": "autocast"}),
            ("weights cut, clipped, 2 ranks", "token-mean", (2, 2, 2), _CUT, {"clip": CLIP}),
        )
    ),
    policy_case("epoch edge, packing, 2 ranks", "token-mean", 2, 2, 2) | _EDGE,
    policy_case("resume in the second epoch", "token-mean", 2, 2) | RESUMED | {"save_after": 4},
    policy_case("resume, 2 ranks", "token-mean", 2, 1, 2) | RESUMED,
    policy_case("LoRA, resume", "token-mean", 2, 2, **_LORA) | RESUMED,
    policy_case("LoRA, what is saved merged", "token-mean", 2, 2, **_LORA) | SAVED,
    policy_case("what is saved, 2 ranks", "token-mean", 2, 1, 2) | SAVED,
    *reinforcement.CASES,
)


def prepare() -> None:
    """Import the stack."""
    import thence.train.trainer  # noqa: F401


def run(case: dict, session: Any) -> None:
    """One case."""
    from thence.train.parallel import start_ranks

    if case["label_smoothing"] or case["precision"] == "bfloat16":
        session.skip("thence has no label smoothing and keeps its weights in float32")
    if case["beyond"] in ("resume", "saved"):
        _run_recipe(case, session)
        return
    ranks, device = start_ranks()
    loaded = _load(session, device)
    if "policy" in case["options"]:
        reinforcement.run(case, session, loaded, _make_trainer)
        return
    method, trajectories = _trajectories(case, session, loaded.tokenizer)
    _adapt(case, session, loaded.model)
    policy, ranks = _laid_out(case, loaded.model, ranks, device)
    trainer = _make_trainer(case, policy, trajectories, ranks)
    session.watch(loaded.model.base_model)
    session.parameters(_thence_runs.whole(policy))
    for batch in _batches(case, method, trajectories):
        trainer.step(_share(batch, ranks))
        if session.stepped(_thence_runs.whole(policy)):
            break
    if case["beyond"] == "evaluation":
        _evaluate(session, trainer, trajectories)


def _run_recipe(case: dict, session: Any) -> None:
    """A whole recipe, for what is beyond the trainer: checkpoints, their order of the data, the published model."""
    rank = case["options"].get("lora")
    if rank:
        session.say(lora={"rank": rank, "alpha": 2 * rank, "targets": ALL_LINEAR})
    _thence_runs.run(case, session, {"rank": rank} if rank else None)


def _evaluate(session: Any, trainer: Any, trajectories: list[Any]) -> None:
    """The loss on held-out examples, as a stage reports it."""
    from dataclasses import replace

    from thence.pipeline.sft_stage import held_out_loss

    session.evaluation()
    prompts = [replace(t.prompt, demonstration_ids=t.response_ids) for t in trajectories]
    session.evaluated(held_out_loss(trainer, prompts, "response"))


def _adapt(case: dict, session: Any, model: Any) -> None:
    """Put adapters into the model where the case has them, and say which."""
    if "lora" not in case["options"]:
        return
    from thence.errors import UserError
    from thence.recipe import Lora
    from thence.train.lora import add_adapters, places_of

    settings = Lora(rank=case["options"]["lora"])
    try:
        add_adapters(model, settings, 0)
    except UserError as error:
        session.skip(str(error))
    session.say(lora={"rank": settings.rank, "alpha": settings.strength, "targets": sorted(places_of(model).adapted)})


def _laid_out(case: dict, model: Any, ranks: Any, device: Any) -> tuple[Any, Any]:
    """The policy as the case cuts it over ranks, and the ranks to train it with."""
    from thence.train.parallel import DataParallel, ShardLayout, shard
    from thence.train.policy import Policy

    policy, parallel = Policy(model), case["options"].get("parallel")
    if parallel is None:
        return policy, ranks
    policy.check(case["packing"])
    ranks = ranks if isinstance(ranks, DataParallel) else DataParallel.alone(device)
    return policy, shard(policy, ranks, ShardLayout(2 if parallel == "hsdp" else 1, _compute_dtype(case)))


def _compute_dtype(case: dict) -> Any:
    import torch

    return torch.bfloat16 if case["precision"] == "autocast" else torch.float32


def _load(session: Any, device: Any) -> Any:
    from thence.recipe import Model
    from thence.train.model import load_model

    return load_model(Model(path=session.model, compute_dtype="float32"), device)


def _trajectories(case: dict, session: Any, tokenizer: Any) -> tuple[Any, list[Any]]:
    """The method, and every example of the case as a trajectory."""
    from thence.data.chat import render_all
    from thence.data.readers import read_examples
    from thence.data.trajectory import Prompt, Trajectory
    from thence.methods.registry import methods

    options = {name: value for name, value in case["options"].items() if name not in ("parallel", "lora")}
    method = methods()[options.pop("method", "sft")](options)
    examples, _ = read_examples(session.data("messages"))
    rows = render_all(examples, tokenizer).rows
    supervised = method.stage == "sft"
    given = rewards(len(rows))
    found = []
    for i, row in enumerate(rows):
        prompt = Prompt(i if supervised else i // GROUP, tuple(row.prompt_ids))
        origin = "demonstration" if supervised else "rollout"
        score = None if supervised else given[i]
        found.append(Trajectory(prompt, tuple(row.response_ids or ()), origin=origin, score=score))
    if not supervised:
        session.say(
            rewards=given,
            groups=[i // GROUP for i in range(len(rows))],
            advantages=advantages(given, GROUP, "group" if method.options.std else "none", STD_EPS),
            longest=method.options.constant_tokens,
        )
    return method, found


def _batches(case: dict, method: Any, trajectories: list[Any]):
    """The whole batch of every optimizer step, over all ranks."""
    from dataclasses import replace

    from thence.methods.base import make_batch

    size = case["micro_batch"] * case["accumulation"] * case["ranks"]
    # a packing case names no window: all rows are one
    size = len(trajectories) if case["packing"] and size == 1 else size
    batch = make_batch(method, trajectories)
    for _ in range(case["epochs"]):
        for start in range(0, len(batch.rows), size):
            yield replace(batch, rows=batch.rows[start : start + size])


def _share(batch: Any, ranks: Any) -> Any:
    from dataclasses import replace

    return replace(batch, rows=batch.rows[ranks.rank :: ranks.world])


def _make_trainer(case: dict, model: Any, trajectories: list[Any], ranks: Any, reference: Any = None) -> Any:
    import torch

    from thence.train.step import StepSettings
    from thence.train.trainer import Trainer

    class SgdTrainer(Trainer):
        """thence's trainer with plain SGD."""

        def optimizer(self, name: str) -> Any:
            if name not in self._optimizers:
                self._optimizers[name] = torch.optim.SGD(self.policy.trained(), lr=0.0)  # pyright: ignore
            return self._optimizers[name]

    settings = StepSettings(
        micro_batch_tokens=_budget(case, trajectories),
        packing=case["packing"],
        clip_norm=case["clip"],
        compute_dtype=_compute_dtype(case),
    )
    kind = SgdTrainer if case["optimizer"] == "sgd" else Trainer
    return kind(
        model,
        case["lr"],
        settings,
        betas=(0.0, 0.999),
        eps=case["eps"],
        weight_decay=0.0,
        activation_checkpointing=case["checkpointing"],
        ranks=ranks,
        reference=reference,
    )


def _budget(case: dict, trajectories: list[Any]) -> int:
    """The smallest token budget that cuts the first rank's first share into no more micro-batches than planned."""
    from thence.train.micro_batches import plan

    lengths = [len(t.prompt.token_ids) + len(t.response_ids) for t in trajectories]
    if case["packing"]:
        return sum(lengths) // 2
    first = lengths[: case["micro_batch"] * case["accumulation"] * case["ranks"]][:: case["ranks"]]
    budget = max(first)
    while len(plan(first, budget, False)) > case["accumulation"]:
        budget += 1
    return budget
