"""thence's own RL cases with a term broken, and a plain loop that trains what lies outside the responses.

The option ``wrong`` names what is broken; ``policy`` still says what is asked. The audit must name each.
"""

import contextlib
import dataclasses
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))  # this checkout's, whatever is installed

from thence.audit.adapters import _policy_loop, _thence_rl, _thence_turns, thence

STACK = "broken"
PACKAGES = ("thence", "torch")
AXES = frozenset()

FOUND = {
    # case, what is broken, options of the method, finding
    "coefficient doubled": ("rl_sft_loss", {"coefficient": 1.0}, "demonstration-weight"),
    "coefficient nought": ("rl_sft_loss", {"coefficient": 0.0}, "demonstration-missing"),
    "divided by their own tokens": ("rl_sft_loss", {}, "demonstration-normaliser"),
    "not shaped": ("luffy", {"method": "mixed_policy"}, "demonstration-surrogate"),
    "likelihood doubled": ("srft", {"sft_weight": 1.0}, "demonstration-weight"),
    "likelihood missing": ("srft", {"sft_weight": 0.0}, "demonstration-missing"),
    "sign of the entropy": ("srft", {"sft_entropy_sign": 1}, "entropy-weight"),
    "entropy of tokens": ("srft", {"entropy_level": "token"}, "entropy-weight"),
    "wrong ones doubled": ("srft", {"wrong_weight": 2.0}, "policy-weight"),
    "all of the prefix": ("prefix_rft", {"keep_ratio": 1.0}, "prefix-trained"),
    "none of the prefix": ("prefix_rft", {"keep_ratio": 0.0}, "prefix-missing"),
    "entropy on the prefix": ("prefix_rft", {"entropy_mode": "all", "entropy": 0.5}, "entropy-bonus"),
    "hint doubled": ("uft", {"hint_weight": 1.0}, "prefix-weight"),
    "hint missing": ("uft", {"hint_weight": 0.0}, "prefix-missing"),
    "prefix not counted": ("bread", {"normaliser": "paper"}, "normaliser-counted"),
    "prefix trained": ("bread", {"begun": None}, "prefix-trained"),
    "bounded prefix doubled": ("trapo", {"prefix_weight": 2.0}, "prefix-weight"),
    "bounded prefix missing": ("trapo", {"prefix_weight": 0.0}, "prefix-missing"),
    "plain likelihood of a prefix": ("trapo", {"alpha": 1e-12}, "prefix-trained"),
    "repeated prefix trained": ("trapo", {}, "prefix-trained"),
    "replay to the old policy": ("exgrpo", {}, "replay-ratio"),
    "SFT step doubled": ("relift, RL and SFT steps", {}, "demonstration-weight"),
    "whole KL halved": ("asft", {"kl": 0.25}, "kl-coefficient"),
    "no KL": ("asft", {"kl": 0.0}, "kl-coefficient"),
    "plain likelihood": ("gift", {"beta": 40.0}, "demonstration-surrogate"),
    "likelihood instead of probability": ("dft", {"method": "gift", "beta": 40.0}, "demonstration-surrogate"),
    "ratio not held": ("sdpo", {"ratio_bound": 50.0}, "clip-missing"),
    "advantages for the teacher": ("sdft", {}, "policy-weight"),
    "teacher left out": ("sdft", {}, "policy-weight"),
    "whole distributions, ratio not held": ("sdft, forward KL", {"ratio_bound": 50.0}, "clip-missing"),
    "observations trained": ("grpo, several turns", {}, "environment-trained"),
    "prompt trained": ("srft", {}, "prompt-trained"),
    "prompt trained beside a KL": ("sasr, its GRPO steps", {}, "prompt-trained"),
}
UNEXPLAINED = {
    "the other direction": ("sdft, reverse KL", {"divergence": "forward-kl"}),
    "all words": ("sdft, JSD of the 20 likeliest", {"top_k": 0}),
    "no tail": ("sdpo, reverse KL of the 20 likeliest and a tail", {"tail": False}),
    "the taken token alone": ("sdft, reverse KL", {"divergence": "sampled"}),
    "another mixture": ("sdpo, JSD", {"alpha": 0.5}),
}
"""Another divergence than the one asked for: the audit has no name for it, and must not say that it is right."""
LOOP = {
    "nothing": ("sequence-mean", None), "prompt": ("sequence-mean", "prompt-trained"),
    "prompt, counted": ("sequence-mean", "prompt-trained"), "padding": ("sequence-mean", "padding-trained"),
    "padding, counted": ("sequence-mean", "padding-trained"), 
    "padding of token means": ("token-mean", "padding-trained"),
}  # fmt: skip
"""What a plain loop trains outside the responses: normaliser asked for, and finding."""


def _broken(wrong, case, options):
    plain = next(c for c in _thence_rl.CASES if c["name"].startswith(f"RL: {case}, "))
    asked = dict(plain["options"]["policy"])
    if wrong == "entropy on the prefix":
        asked["entropy"] = 0.5
    said = {"wrong": wrong, "policy": asked}
    return plain | {"name": f"{case}: {wrong}", "quick": False, "options": {**plain["options"], **options, **said}}


CASES = (
    *(_broken(wrong, case, options) for wrong, (case, options, _) in FOUND.items()),
    *(_broken(wrong, case, options) for wrong, (case, options) in UNEXPLAINED.items()),
    *(_policy_loop.loop_case(f"loop: {wrong}", asked, {"scale": "none", "clip_low": None, "clip_high": None},
                             also=wrong) for wrong, (asked, _) in LOOP.items()),
)  # fmt: skip


def prepare():
    thence.prepare()


def run(case, session):
    if "also" in case["options"]:
        also = case["options"]["also"]
        _policy_loop.drive(case, session, case["options"]["policy"], advantages, lambda t, n: loss(also, t, n))
        return
    wrong = case["options"]["wrong"]
    case = case | {"options": {name: value for name, value in case["options"].items() if name != "wrong"}}
    with contextlib.ExitStack() as patched:
        for each in patches(wrong):
            patched.enter_context(each)
        if wrong == "prefix trained":
            begun = _thence_rl._rollouts
            told = lambda c, t: [{**r, "prefix": 3} for r in begun(c, t)]  # noqa: E731
            patched.enter_context(mock.patch.object(_thence_rl, "_rollouts", told))
        if wrong == "observations trained":
            found, places = _thence_rl._rollouts, _thence_turns.environment
            said = lambda c, t: [  # noqa: E731
                {**r, "environment": places(len(one.response_ids))} for r, one in zip(found(c, t), t, strict=True)
            ]
            patched.enter_context(mock.patch.object(_thence_rl, "_rollouts", said))
            patched.enter_context(mock.patch.object(_thence_rl, "in_turns", lambda trajectory: trajectory))
        thence.run(case, session)


def patches(wrong):
    import torch

    from thence.methods import base, rl_sft_loss, trapo
    from thence.methods.relift import Relift
    from thence.methods.self_distillation import SelfDistillation
    from thence.objective import Normaliser
    from thence.pipeline import rl_update
    from thence.pipeline.teacher import TeacherPass

    if wrong == "divided by their own tokens":
        own = lambda *_: Normaliser("term tokens")  # noqa: E731
        return [mock.patch.object(rl_sft_loss, "likelihood_normaliser", own)]
    if wrong == "repeated prefix trained":
        return [mock.patch.object(trapo, "trained_prefixes", lambda trajectories: [True] * len(trajectories))]
    if wrong == "replay to the old policy":
        return [mock.patch.object(base, "behaviour_of", lambda trajectory, old: old)]
    if wrong == "SFT step doubled":
        plain = Relift.side_steps

        def doubled(self, sampler):
            return [
                dataclasses.replace(s, weights=[{**w, "sft": 2 * w["sft"]} for w in s.weights])
                for s in plain(self, sampler)
            ]

        return [mock.patch.object(Relift, "side_steps", doubled)]
    if wrong == "advantages for the teacher":
        return [mock.patch.object(SelfDistillation, "weigh", weighed_by_advantages)]
    if wrong == "teacher left out":
        nothing = lambda self, rows: [torch.zeros(len(t.response_ids)) for t in rows]  # noqa: E731
        return [mock.patch.object(TeacherPass, "logps", nothing)]
    if wrong.startswith("prompt trained"):
        made = rl_update.make_rows
        return [mock.patch.object(rl_update, "make_rows", lambda *a, **k: [with_prompt(r) for r in made(*a, **k)])]
    return []


def weighed_by_advantages(self, trajectories, facts):
    """Of the group, a mean over each response, with the ratio held as the teacher's weights have it."""
    from thence.methods.grpo import Grpo

    found = zip(Grpo().advantages(trajectories).tolist(), facts, strict=True)
    held = self.options.ratio_bound
    return [{"distillation": a * f.log_ratio.double().exp().clamp(max=held) / len(f.logp)} for a, f in found]


def with_prompt(row):
    """A row whose prompt is trained as its first response token is."""
    import torch

    trained = torch.ones_like(row.trained)
    trained[0] = False
    more = int(trained.sum() - row.trained.sum())

    def wider(values):
        return None if values is None else torch.cat([values[..., :1].expand(*values.shape[:-1], more), values], -1)

    changed = {name: wider(getattr(row, name)) for name in ("weights", "behaviour", "reference")}
    return dataclasses.replace(row, trained=trained, **changed)


def advantages(rewards, mask):
    group = rewards.reshape(-1, _policy_loop.GROUP)
    return (group - group.mean(1, keepdim=True)).reshape(-1, 1).expand(mask.shape)


def loss(also, tensors, totals):
    mask = tensors["mask"]
    behind = (mask.cumsum(1) > 0) & (mask == 0)
    more = {"prompt": ~behind & (mask == 0), "padding": behind, "nothing": behind & False}[
        also.split(",")[0].split()[0]
    ]
    trained = mask + more.float()
    value = -(tensors["log_prob"] - tensors["old"]).exp() * tensors["advantages"] * trained
    counted = trained if also.endswith("counted") else mask
    if also.endswith("means"):
        return value.sum() / totals["tokens"]
    return (value.sum(1) / counted.sum(1)).sum() / totals["rows"]
