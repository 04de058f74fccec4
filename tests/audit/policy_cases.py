"""Probes, random objectives and mistakes of reinforcement learning, for tests and ``benchmarks/audit_policy.py``."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

from tests.audit.policy_loop import Loop, Row
from thence.audit.judge.case import Judge
from thence.audit.judge.evidence import Evidence, said_policy
from thence.audit.policy.probe import LENGTHS, rollout_facts
from thence.audit.result import Case, CaseResult
from thence.audit.solve.probe import Probe, write_probe

_SCALED = {"scale": "none"}
_KL = {"kl": 0.05}
_IS = {"correction": "truncate", "correction_cap": 1.1}
_WARM = {"temperature": 0.7}
_WIDE = {"clip_high": 0.4}
_TRUST = {"surrogate": "tv", "clip_low": 0.003, "clip_high": 0.004}

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "baseline-batch": (_SCALED, "advantage-baseline"),
    "baseline-none": (_SCALED, "advantage-baseline"),
    "baseline-rloo": ({}, "advantage-baseline"),
    "groups-interleaved": ({}, "advantage-groups"),
    "groups-shifted": ({}, "advantage-groups"),
    "padded-group": ({}, "advantage-padded"),
    "scale-none": ({}, "advantage-deviation"),
    "scale-batch": ({}, "advantage-deviation"),
    "bessel": ({}, "advantage-bessel"),
    "eps": ({}, "advantage-deviation"),
    "zero-variance": ({}, "advantage-zero-variance"),
    "sign": ({}, "advantage-sign"),
    "clip-missing": ({}, "clip-missing"),
    "clip-one-sided": ({}, "clip-missing"),
    "clip-both": ({}, "clip-both-sides"),
    "clip-low-as-high": (_WIDE, "clip-range"),
    "clip-range": ({}, "clip-range"),
    "dual-missing": ({"dual_clip": 1.3}, "clip-dual"),
    "dual-added": ({}, "clip-dual"),
    "surrogate-weight": ({}, "clip-surrogate"),
    "trust-as-clip": (_TRUST, "clip-surrogate"),
    "trust-as-band": (_TRUST, "clip-surrogate"),
    "pull-missing": (_TRUST | {"pull": 0.3}, "kl-coefficient"),
    "pull-double": (_TRUST | {"pull": 0.3}, "kl-coefficient"),
    "ratio-missing": ({}, "ratio-missing"),
    "old-recomputed": ({}, "ratio-missing"),
    "ratio-sequence": ({}, "ratio-level"),
    "ratio-token": ({"ratio": "sequence"}, "ratio-level"),
    "old-stale": ({}, "old-version"),
    "old-sampler": ({}, "old-sampler"),
    "kl-missing": (_KL, "kl-coefficient"),
    "kl-double": (_KL, "kl-coefficient"),
    "kl-added": ({}, "kl-coefficient"),
    "kl-sign": (_KL, "kl-sign"),
    "kl-k1": (_KL, "kl-estimator"),
    "kl-k2": (_KL, "kl-estimator"),
    "kl-place": (_KL, "kl-place"),
    "kl-reference": (_KL, "kl-reference"),
    "entropy-added": ({}, "entropy-bonus"),
    "temperature-ignored": (_WARM, "temperature"),
    "temperature-twice": (_WARM, "temperature"),
    "temperature-inverse": (_WARM, "temperature"),
    "importance-missing": (_IS, "importance-missing"),
    "importance-uncapped": (_IS, "importance-bound"),
    "importance-cap": (_IS, "importance-bound"),
    "importance-masked": (_IS, "importance-mode"),
    "importance-level": (_IS, "importance-level"),
    "importance-inverted": (_IS, "importance-inverted"),
    "truncated": ({"truncated": "mask"}, "truncated-trained"),
    "environment-trained": ({}, "environment-trained"),
    "end-missing": ({}, "end-missing"),
    "first-missing": ({}, "first-missing"),
    "counted": ({}, "normaliser-counted"),
    "rows": ({}, "sequence-mean"),
    "micro": ({}, "micro-batch-mean"),
    "groups": ({}, "group-mean"),
    "last-only": ({}, "last-only"),
    "scale": ({}, "scale-accumulation"),
    "leak": ({}, "leak"),
}
"""Mistake of ``Loop`` -> the settings asked for where it shows, and what it is called."""


def random_objective(seed: int) -> dict[str, Any]:
    """Settings that somebody may ask for, drawn at random."""
    draw = random.Random(seed)
    asked: dict[str, Any] = {"scale": draw.choice(["none", "group", "batch"])}
    # Divided by the deviation of a flat group, any other baseline is divided by almost nothing.
    baselines = ["group", "leave-one-out"] + ["batch", "none"] * (asked["scale"] != "group")
    asked |= {"baseline": draw.choice(baselines), "bessel": draw.random() < 0.5, "eps": draw.choice([1e-6, 1e-4])}
    asked |= {"ratio": draw.choice(["token", "token", "sequence", "none"])}
    asked |= {"surrogate": draw.choice(["clip", "clip", "weight", "mask"])}
    asked |= {"clip_low": draw.choice([0.1, 0.2]), "clip_high": draw.choice([0.2, 0.28])}
    if draw.random() < 0.3:
        asked["dual_clip"] = draw.choice([1.5, 3.0])
    if draw.random() < 0.5:
        asked |= {"kl": draw.choice([0.01, 0.1]), "estimator": draw.choice(["k1", "k2", "k3"])}
        asked |= {"kl_in": draw.choice(["loss", "loss", "reward"])}
    if draw.random() < 0.1:
        asked |= {"kl": 0.05, "estimator": "full", "kl_in": "loss"}
    if draw.random() < 0.15:
        asked["entropy"] = 0.01
    asked["temperature"] = draw.choice([1.0, 1.0, 0.8, 1.2])
    if draw.random() < 0.5:
        asked |= {"correction": draw.choice(["truncate", "mask"]), "correction_cap": draw.choice([1.1, 2.0])}
        asked |= {"correction_level": draw.choice(["token", "sequence"])}
    normalisers = ["token-mean", "token-mean", "sequence-mean", "constant-divisor", "micro-batch-mean"]
    asked["normaliser"] = draw.choice(normalisers)
    asked["longest"] = 20.0 if asked["normaliser"] == "constant-divisor" else 0.0
    asked["truncated"] = draw.choice(["train", "mask"])
    asked["counted"] = draw.choice(["all", "all", "informative"])
    return asked


@cache
def judge_of(folder: Path, seed: int = 0) -> tuple[Judge, Any, tuple[Row, ...]]:
    """The judge, the model and the rollouts of a probe of this seed, written below a folder."""
    from transformers import AutoModelForCausalLM

    probe: Probe = write_probe(folder / str(seed), lengths=LENGTHS, seed=seed)
    model = AutoModelForCausalLM.from_pretrained(probe.model, attn_implementation="eager")
    rows = []
    for (ids, labels), fact in zip(probe.rows, rollout_facts(LENGTHS, seed), strict=True):
        start = sum(label == -100 for label in labels)
        own = (fact["reward"], fact["group"], fact["truncated"], tuple(fact["environment"]), tuple(fact["noise"]))
        rows.append(Row(ids, start, *own))
    return Judge.of_probe(probe), model, tuple(rows)


def audit(folder: Path, asked: dict[str, Any], mistake: str = "", seed: int = 0, steps: int = 4) -> CaseResult:
    """Train by the loop, with a mistake or none, and judge what it left."""
    judge, model, rows = judge_of(folder, seed)
    loop = Loop(asked, mistake, steps=steps, per_generation=2)
    states, versions, sampler = loop.run(model, rows)
    facts = [
        {
            "reward": row.reward,
            "group": row.group,
            "truncated": row.truncated,
            "environment": row.environment,
            "sampler": logps,
        }
        for row, logps in zip(rows, sampler, strict=True)
    ]
    said = said_policy({"policy": asked, "rollouts": facts, "versions": versions})
    assert said is not None
    case = Case(
        "case",
        loop.micro_batch,
        len(rows) // loop.micro_batch,
        examples=len(rows),
        steps=loop.steps,
        epochs=loop.steps,
        lr=loop.lr,
        asked=said[0].normaliser,
    )
    return judge.case(case, Evidence(states, pieces=judge.plan(case), policy=said[0], facts=said[1]))
