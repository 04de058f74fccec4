"""thence's own stages of reinforcement learning, several optimizer steps on a rollout batch; driven by ``thence.py``.

The code under audit is the update of an RL stage: old and reference log-probabilities, importance weights, the
method's weights, the steps. Only sampling is replaced: the probe's responses count as rollouts, with fixed rewards, in
groups of four. Every epoch is a rollout batch, dealt to ``minis`` steps.

Options of a case: ``method`` and its own options; ``minis``; ``temperature``; ``importance_bound``, with which the
sampler's log-probabilities are those of the policy with a fixed noise; ``shown``: which responses are demonstrations
(``in-group``: the last of every group; ``apart``: the second half, each of its own prompt; ``all``: those of an SFT
stage whose weights depend on the policy or on a reference model); ``begun``: which responses an expert began, by their
first third (``all``; ``in-group``; ``rounds``: the second and third of every group, in one round of sampling; the last,
in the next round, is a demonstration); ``replayed``: the last of every group was sampled by an earlier policy, the
present one with a fixed noise; ``turns``: responses are rollouts of several turns, in which an environment said every
third token. ``policy`` says what is asked, by hand and from the papers' formulas: it is not read
from the method. With ``sides`` the first half is a rollout batch and the second half the demonstrations of the SFT step
that goes with it, before it (``first``) or after it (``last``), as an RL stage does.

Not covered is how a batch is composed: the coin of ``sasr``, the pool of ``exgrpo``, the search of ``bread``, the
lengths of prefixes, the rounds of ``trapo``, the gates of ``hpt`` and ``superrl``. Here the batch is given.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from ._shared import policy_case
from ._thence_sides import take_turns, train_demonstrations
from ._thence_turns import in_turns

GROUP = 4
LAST_ROUND = 2
LONGEST = 48
NOISE = 0.4
"""Size of the sampler's deviation, nats."""
STRANGERS = ("policy", "minis", "temperature", "importance_bound", "shown", "begun", "replayed", "turns", "sides")
"""Options that are not the method's."""


def _case(
    name: str, asked: str, policy: dict, epochs: int = 1, minis: int = 2, lr: float = 0.3, **options: Any
) -> dict:
    accumulation = 4 // minis
    name = f"RL: {name}, {epochs} x {minis} steps"
    made = policy_case(name, asked, 2, accumulation, 1, policy=policy | {"normaliser": asked}, minis=minis, **options)
    return made | {"epochs": epochs, "steps": epochs * minis, "lr": lr}


_GRPO = {"scale": "none", "clip_high": 0.28}
_ORIGINAL = {"scale": "group", "clip_high": 0.2}
_LUFFY = {
    "scale": "none", "clip_low": None, "clip_high": None, "demonstration": "shape", "demonstration_advantage": True,
    "entropy": 0.001,
}  # fmt: skip
_SFT = {"scale": "none", "clip_low": None, "clip_high": None, "compared": "own", "entropy": 0.001}

_CLIPPED = {"clip_low": 0.2, "clip_high": 0.2}
_OWN = _ORIGINAL | {"compared": "own"}
_UNCERTAIN = {"demonstration": "uncertain"}
_SRFT = {
    "scale": "none", "ratio": "none", "own": "correctness", "demonstration": "shape", "demonstration_advantage": True,
    "demonstration_likelihood": 0.5, "confidence": "sequence", "entropy": 0.001,
}  # fmt: skip
_UNCLIPPED = {"clip_low": None, "clip_high": None}
_PREFIX = {
    "scale": "none", "dual_clip": 3.0, "prefix": "kept", "prefix_keep": 0.2, "entropy": 0.001, "entropy_on": "own-mean",
}  # fmt: skip
_UFT = {
    "scale": "group", "prefix": "likelihood", "prefix_weight": 0.5, "kl": 0.5, "entropy": 0.001, "entropy_on": "own",
}  # fmt: skip
_TRAPO = _GRPO | _UNCLIPPED | {"prefix": "bounded", "entropy": 0.001}
_FIRST, _LAST = ({"shown": "apart", "sides": sides} for sides in ("first", "last"))
_TRUST = {"clip_low": 0.002, "clip_high": 0.003, "dual_clip": 1.2}
_DEMONSTRATIONS, _SHOWN = {"scale": "none"}, {"shown": "all"}
_TAUGHT = {
    "scale": "none", "own": "teacher", "surrogate": "weight", "clip_low": None, "clip_high": 1.0,
}  # fmt: skip
_GSPO = {"scale": "group", "ratio": "sequence-token"}

CASES: tuple[dict, ...] = tuple(
    _case(name, asked, policy, **{"epochs": 2, **options}) | ({"quick": True} if name in ("grpo", "luffy") else {})
    for name, asked, policy, options in (
        ("grpo", "token-mean", _GRPO, {"method": "grpo"}),
        ("grpo, KL k3", "sequence-mean", _ORIGINAL | {"kl": 0.5},
         {"method": "grpo", "std": True, "aggregation": "sequence-mean", "clip_high": 0.2, "kl": 0.5}),
        ("grpo, KL k2", "token-mean", _GRPO | {"kl": 0.5, "estimator": "k2"},
         {"method": "grpo", "kl": 0.5, "kl_estimator": "k2"}),
        ("grpo, temperature 0.7", "token-mean", _GRPO | {"temperature": 0.7}, {"method": "grpo", "temperature": 0.7}),
        ("grpo, importance weights", "token-mean", _GRPO | {"correction": "truncate", "correction_cap": 1.3},
         {"method": "grpo", "importance_bound": 1.3, "epochs": 1}),
        ("grpo, several turns", "token-mean", _GRPO, {"method": "grpo", "turns": True}),
        ("gspo, several turns", "sequence-mean", _GSPO | {"clip_low": 0.1, "clip_high": 0.1},
         {"method": "gspo", "clip_low": 0.1, "clip_high": 0.1, "turns": True}),
        ("grpo, entropy bonus", "token-mean", _GRPO | {"entropy": 0.05}, {"method": "grpo", "entropy": 0.05}),
        ("dr_grpo", "constant-divisor", _GRPO | {"clip_high": 0.2, "longest": LONGEST},
         {"method": "dr_grpo", "constant_tokens": LONGEST, "lr": 1.0}),
        ("dapo, dual clip", "token-mean", {"scale": "group", "clip_high": 0.28, "dual_clip": 1.3},
         {"method": "dapo", "dual_clip": 1.3}),
        ("gspo", "sequence-mean", _GSPO | {"clip_low": 3e-4, "clip_high": 4e-4}, {"method": "gspo"}),
        ("gspo, wide clip", "sequence-mean", _GSPO | {"clip_low": 0.1, "clip_high": 0.1},
         {"method": "gspo", "clip_low": 0.1, "clip_high": 0.1}),
        ("cispo", "token-mean", _ORIGINAL | {"surrogate": "weight", "clip_low": 0.8, "clip_high": 0.1},
         {"method": "cispo", "floor": 0.2, "cap": 1.1}),
        ("dppo, total variation", "token-mean", {"scale": "none", "surrogate": "tv", **_TRUST},
         {"method": "dppo", "low": 0.002, "high": 0.003, "ratio_bound": 1.2}),
        ("dppo, binary KL, sequence mean, pull", "sequence-mean",
         {"scale": "none", "surrogate": "binary-kl", "clip_low": 1e-4, "clip_high": 2e-4, "pull": 0.5},
         {"method": "dppo", "divergence": "kl", "low": 1e-4, "high": 2e-4, "kappa": 0.5,
          "aggregation": "sequence-mean"}),
        ("ipo", "token-mean",
         {"scale": "none", "surrogate": "band", "clip_low": 0.003, "clip_high": 0.003, "pull": 0.5},
         {"method": "ipo", "bound": 0.003, "kappa": 0.5}),
        ("on_policy", "token-mean", _SFT | _CLIPPED, {"method": "on_policy"}),
        ("luffy", "token-mean", _LUFFY, {"method": "luffy", "shown": "in-group"}),
        ("luffy, clipped, over std", "token-mean", _LUFFY | _CLIPPED | {"scale": "group"},
         {"method": "luffy", "shown": "in-group", "clip": True, "std": True}),
        ("mixed_policy", "token-mean", _LUFFY | {"demonstration": "probability"},
         {"method": "mixed_policy", "shown": "in-group"}),
        ("rl_sft_loss", "token-mean", _SFT | {"demonstration_weight": 0.5},
         {"method": "rl_sft_loss", "shown": "in-group", "coefficient": 0.5}),
        ("hpt", "token-mean", _SFT | {"demonstration_weight": 0.3},
         {"method": "hpt", "shown": "apart", "coefficient": 0.3, "minis": 1}),
        ("superrl", "token-mean", _OWN, {"method": "superrl", "shown": "apart", "minis": 1}),
        ("chord_mu", "token-mean", _OWN | {"own_weight": 0.1, "demonstration_weight": 0.9},
         {"method": "chord_mu", "shown": "apart", "entropy": 0.0, "minis": 1}),
        ("chord_phi", "token-mean", _OWN | {"own_weight": 0.9, "demonstration_weight": 0.1} | _UNCERTAIN,
         {"method": "chord_phi", "shown": "apart", "entropy": 0.0, "minis": 1}),
        ("red, its first step", "token-mean", _OWN | {"demonstration_weight": 0.1, "entropy": 0.001},
         {"method": "red", "shown": "in-group", "minis": 1, "epochs": 1}),
        ("relift, its RL steps", "token-mean", _SFT, {"method": "relift"}),
        ("relift, RL and SFT steps", "token-mean", _SFT,
         {"method": "relift", "sft_batch": 4, "sft_clip_norm": 0.0, **_LAST}),
        ("sasr, its GRPO steps", "token-mean", _OWN | {"kl": 0.5}, {"method": "sasr", "kl": 0.5}),
        ("sasr, SFT and GRPO steps", "token-mean", _OWN, {"method": "sasr", "warmup_steps": 1, **_FIRST}),
        ("srft", "token-mean", _SRFT, {"method": "srft", "shown": "in-group"}),
        ("srft, the official code's sign, entropies of tokens, over std", "token-mean",
         _SRFT | {"scale": "group", "confidence": "token", "confidence_sign": 1},
         {"method": "srft", "shown": "in-group", "sft_entropy_sign": 1, "entropy_level": "token", "std": True}),
        ("srft, its ratio, probability and the entropy of the batch", "token-mean",
         _SRFT | _UNCLIPPED | {"ratio": "token", "confidence": "batch", "demonstration": "probability"},
         {"method": "srft", "shown": "in-group", "own": "ratio", "entropy_level": "batch",
          "demonstration": "probability"}),
        ("prefix_rft", "token-mean", _PREFIX, {"method": "prefix_rft", "begun": "in-group"}),
        ("prefix_rft, half of the prefixes, over std", "token-mean",
         _PREFIX | {"scale": "group", "prefix_keep": 0.5, "entropy_on": "all"},
         {"method": "prefix_rft", "begun": "in-group", "keep_ratio": 0.5, "std": True, "entropy_mode": "all"}),
        ("uft", "token-mean", _UFT, {"method": "uft", "begun": "all", "hint_weight": 0.5, "kl": 0.5}),
        ("uft, published weights", "token-mean", _UFT | {"kl": 0.001, "prefix_weight": 0.001},
         {"method": "uft", "begun": "all"}),
        ("bread", "token-mean", _ORIGINAL | {"prefix": "context"}, {"method": "bread", "begun": "all"}),
        ("dft", "token-mean", _DEMONSTRATIONS | {"demonstration": "probability"}, _SHOWN | {"method": "dft"}),
        ("asft", "token-mean",
         _DEMONSTRATIONS | {"demonstration": "probability", "kl": 0.5, "estimator": "full-forward"},
         _SHOWN | {"method": "asft", "kl": 0.5}),
        ("asft, the other direction", "sequence-mean",
         _DEMONSTRATIONS | {"demonstration": "probability", "kl": 0.5, "estimator": "full"},
         _SHOWN | {"method": "asft", "kl": 0.5, "direction": "reverse", "aggregation": "sequence-mean"}),
        ("gift", "token-mean", _DEMONSTRATIONS | {"demonstration": "raised", "raised_by": 3.0},
         _SHOWN | {"method": "gift", "beta": 3.0}),
        ("trapo", "token-mean", _TRAPO, {"method": "trapo", "begun": "rounds", "lr": 0.1}),
        ("trapo, a narrower bound, over std", "token-mean",
         _TRAPO | {"scale": "group", "prefix_bound": 0.02, "prefix_weight": 0.5},
         {"method": "trapo", "begun": "rounds", "lr": 0.1, "alpha": 0.02, "prefix_weight": 0.5, "std": True}),
        ("sdft", "sequence-mean", _TAUGHT, {"method": "sdft", "epochs": 1}),
        ("sdpo", "sequence-mean", _TAUGHT | {"clip_high": 0.02},
         {"method": "sdpo", "teacher": "start", "ratio_bound": 1.02, "epochs": 1}),
        ("sdft, reverse KL", "sequence-mean", _TAUGHT | {"divergence": "reverse"},
         {"method": "sdft", "divergence": "reverse-kl", "epochs": 1}),
        ("sdft, forward KL", "sequence-mean", _TAUGHT | {"clip_high": 0.02, "divergence": "forward"},
         {"method": "sdft", "divergence": "forward-kl", "ratio_bound": 1.02, "epochs": 1}),
        ("sdft, JSD of the 20 likeliest", "sequence-mean",
         _TAUGHT | {"divergence": "jsd", "mixture": 0.5, "likeliest": 20},
         {"method": "sdft", "divergence": "jsd", "top_k": 20, "epochs": 1}),
        ("sdpo, JSD", "sequence-mean", _TAUGHT | {"divergence": "jsd", "mixture": 0.3},
         {"method": "sdpo", "divergence": "jsd", "alpha": 0.3, "teacher": "start", "epochs": 1}),
        ("sdpo, reverse KL of the 20 likeliest and a tail", "sequence-mean",
         _TAUGHT | {"divergence": "reverse", "likeliest": 20, "tail": True},
         {"method": "sdpo", "divergence": "reverse-kl", "top_k": 20, "tail": True, "teacher": "start", "epochs": 1}),
        ("exgrpo", "token-mean", _SFT | {"compared": "all"}, {"method": "exgrpo", "replayed": True}),
        ("exgrpo, over std", "token-mean", _SFT | {"compared": "all", "scale": "group"},
         {"method": "exgrpo", "replayed": True, "std": True}),
    )
)  # fmt: skip


def run(case: dict, session: Any, loaded: Any, make_trainer: Any) -> None:
    """One case."""
    import copy

    from thence.pipeline.rl_update import Update
    from thence.train.policy import Policy

    if case["ranks"] > 1:
        session.skip("the update of a rollout batch is driven on one rank")
    options, policy = case["options"], Policy(loaded.model)
    method, trajectories = _trajectories(case, session, loaded.tokenizer)
    reference = Policy(copy.deepcopy(loaded.model)) if method.reference_passes else None
    trainer = make_trainer(case, policy, trajectories, _alone(), reference)
    if options.get("replayed"):
        trajectories = _with_replays(trainer, trajectories)
    bound = options.get("importance_bound")
    stage: Any = SimpleNamespace(temperature=options.get("temperature", 1.0), importance_bound=bound, fault=None)
    if method.stage == "sft":
        train_demonstrations(case, session, trainer, method, trajectories)
        return
    minis, (teacher, scores) = 1 if options.get("sides") else options["minis"], _taught(method, trajectories, trainer)
    update = Update(stage, method, trainer, minis, teacher)
    session.watch(loaded.model.base_model)
    session.parameters(policy.model)
    rollouts = [rollout | said for rollout, said in zip(_rollouts(case, trajectories), scores, strict=True)]
    versions, metrics = [], _Steps(session, policy)
    if options.get("sides"):
        # Between an SFT step and a rollout batch the old policy is the present one.
        session.say(policy=options["policy"], rollouts=rollouts, versions=list(range(case["steps"])))
        take_turns(case, update, method, trajectories, metrics)
        return
    for generation in range(case["epochs"]):
        if bound is not None:
            trajectories, rollouts = _with_sampler(trainer, stage, trajectories, rollouts)
        versions += [generation * options["minis"]] * options["minis"]
        session.say(policy=options["policy"], rollouts=rollouts, versions=versions)
        update.take(trajectories, metrics)  # pyright: ignore[reportArgumentType]


class _Steps:
    """Stands where a stage keeps its metrics: keeps the parameters after every step."""

    def __init__(self, session: Any, policy: Any):
        self.session, self.policy = session, policy
        self.shares, self.side = SimpleNamespace(add=lambda batch, chosen: None), self

    def append(self, report: Any) -> None:
        """Keep the parameters after a side step."""
        self.stepped(report, 0)

    def weighed(self, batch: Any, chosen: Any) -> None:
        """Note rows without any weight: thence leaves them out of its passes, and counts them in the normaliser."""
        for row in batch.rows:
            if not row.weights.any():
                self.session.forward(row.token_ids)

    def taught(self, scores: Any) -> None:
        """The adapter scores for itself."""

    def observer(self, chosen: Any, rows: Any) -> None:
        """Nothing to watch."""

    def stepped(self, report: Any, clipped: int) -> None:
        """Keep the parameters."""
        self.session.stepped(self.policy.model)


class _SolutionFirst:
    """Stands where a stage renders the teacher's prompts: the solution, then the student's prompt."""

    def token_ids(self, prompt: Any, solution: Any) -> tuple[int, ...]:
        """The teacher's prompt."""
        return (*solution, *prompt.token_ids)


def _taught(method: Any, trajectories: list[Any], trainer: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The teacher of a method, which keeps the weights of the start; and what is said of it for every trajectory: its
    log-probabilities of the tokens, from a plain forward pass, and what it reads before them. No teacher: nothing."""
    import copy

    import torch

    from thence.pipeline.teacher import TeacherPass
    from thence.train.policy import Policy

    if method.teacher is None:
        return None, [{} for _ in trajectories]
    prompts: Any = _SolutionFirst()
    scorer, found = Policy(copy.deepcopy(trainer.policy.model).requires_grad_(False)), []
    for trajectory, solution in zip(trajectories, method.solutions(trajectories), strict=True):
        if solution is None:
            found.append({})
            continue
        before = prompts.token_ids(trajectory.prompt, solution)
        ids = torch.tensor([[*before, *trajectory.response_ids]])
        with torch.no_grad():
            logp = scorer.model(input_ids=ids, use_cache=False).logits[0, len(before) - 1 : -1].log_softmax(-1)
        taken = logp.gather(1, ids[0, len(before) :, None])[:, 0].double().tolist()
        found.append({"teacher": taken, "teacher_prompt": before})
    return TeacherPass("rl", method, prompts, trainer, 1.0, scorer), found


def _alone() -> Any:
    from thence.train.parallel import SingleProcess

    return SingleProcess()


def _is_shown(case: dict, place: int) -> bool:
    """Whether the response at a place is a demonstration."""
    shown = case["options"].get("shown")
    if shown == "all":
        return True
    return place % GROUP == GROUP - 1 if shown == "in-group" else shown == "apart" and place >= case["examples"] // 2


def _rewards(case: dict, size: int) -> list[float]:
    if case["options"].get("shown") == "in-group":
        # the same own rewards in every group, whose mean is one half: RED's factor of it is one
        return [
            (0.0, 1.5, 0.0, 1.0)[i % GROUP] + (0.25 * (i // GROUP) if i % GROUP == GROUP - 1 else 0)
            for i in range(size)
        ]
    return [(0.0, 1.0, 0.25, 2.0)[i % GROUP] * (1.0 + 0.5 * (i // GROUP)) for i in range(size)]


def _trajectories(case: dict, session: Any, tokenizer: Any) -> tuple[Any, list[Any]]:
    """The method, and every example of the case as a trajectory."""
    from thence.data.chat import render_all
    from thence.data.readers import read_examples
    from thence.data.trajectory import Prompt, Trajectory
    from thence.methods.registry import methods

    options = {name: value for name, value in case["options"].items() if name not in STRANGERS}
    method = methods()[options.pop("method")](options)
    examples, _ = read_examples(session.data("messages"))
    rows = render_all(examples, tokenizer).rows[: case["examples"]]
    found = []
    for i, (row, reward) in enumerate(zip(rows, _rewards(case, len(rows)), strict=True)):
        group, number = _group(case, i), _round(case, i)
        origin = "demonstration" if _is_shown(case, i) or number == LAST_ROUND else "rollout"
        first = tuple(rows[group * GROUP].response_ids or ()) if method.demonstrations == "shown" else None
        prompt = Prompt(group, tuple(row.prompt_ids), first, draw=group)
        response = tuple(row.response_ids or ())
        made = Trajectory(prompt, response, origin=origin, score=reward, prefix=_begun(case, i, len(response)))
        found.append(in_turns(made.in_round(number)) if case["options"].get("turns") else made.in_round(number))
    return method, found


def _round(case: dict, place: int) -> int:
    """The round of sampling in which the response at a place came about."""
    return (0, 1, 1, LAST_ROUND)[place % GROUP] if case["options"].get("begun") == "rounds" else 0


def _group(case: dict, place: int) -> int:
    apart = case["options"].get("shown") == "apart" and _is_shown(case, place)
    return case["examples"] + place if apart else place // GROUP


def _rollouts(case: dict, trajectories: list[Any]) -> list[dict]:
    return [
        {"reward": t.score, "group": _group(case, i), "demonstration": _is_shown(case, i),
         # To a method of rounds a demonstration is a response of which the expert wrote all.
         "prefix": len(t.response_ids) if _round(case, i) == LAST_ROUND else t.prefix,
         "repeated": _round(case, i) == _round(case, i + 1) == 1 and trajectories[i + 1].prefix > 0,
         "replay": t.origin == "replay",
         "environment": [place for place, own in enumerate(t.after_prompt()[1]) if not own],
         "sampler": t.behaviour or ()}
        for i, t in enumerate(trajectories)
    ]  # fmt: skip


def _begun(case: dict, place: int, tokens: int) -> int:
    """Tokens of the response at a place that an expert wrote."""
    begun = case["options"].get("begun")
    if begun == "rounds":
        return tokens // 3 if _round(case, place) == 1 else 0
    return tokens // 3 if begun == "all" or (begun == "in-group" and place % GROUP == GROUP - 1) else 0


def _with_replays(trainer: Any, trajectories: list[Any]) -> list[Any]:
    """The last of every group as a replay, sampled by a policy that is off by a fixed wave."""
    from dataclasses import replace

    from thence.methods.base import bare_row

    found = []
    scored = trainer.statistics([bare_row(t) for t in trajectories], 1.0)
    for i, (trajectory, (logp, _)) in enumerate(zip(trajectories, scored, strict=True)):
        past = tuple(a + NOISE * math.sin(1.7 * t + i) for t, a in enumerate(logp.double().tolist()))
        last = i % GROUP == GROUP - 1
        found.append(replace(trajectory, origin="replay", behaviour=past) if last else trajectory)
    return found


def _with_sampler(
    trainer: Any, stage: Any, trajectories: list[Any], rollouts: list[dict]
) -> tuple[list[Any], list[dict]]:
    """Trajectories with the log-probabilities of a sampler that is not the trainer: off by a fixed wave."""
    from dataclasses import replace

    from thence.methods.base import bare_row

    found, said = [], []
    known = [t.sampler_logps for t in trajectories]
    scored = trainer.statistics([bare_row(t) for t in trajectories], stage.temperature)
    for i, (trajectory, (logp, _)) in enumerate(zip(trajectories, scored, strict=True)):
        wave = [NOISE * math.sin(1.7 * t + i) for t in range(len(logp))]
        # One list is said for all rollout batches, so the second gets what the first had.
        sampler = known[i] or tuple(a + b for a, b in zip(logp.double().tolist(), wave, strict=True))
        found.append(replace(trajectory, sampler_logps=sampler))
        said.append({**rollouts[i], "sampler": list(sampler)})
    return found, said
