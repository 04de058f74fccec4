"""Audit a step of reinforcement learning of your own, in this process: ``check_policy(step, model=model)``."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thence.audit.judge.case import Judge
from thence.audit.judge.evidence import Evidence
from thence.audit.policy.facts import Rollout
from thence.audit.policy.objective import PolicyObjective
from thence.audit.policy.probe import LENGTHS, rollout_facts
from thence.audit.policy.read import PolicyFacts
from thence.audit.report import Report
from thence.audit.result import Case, CaseResult
from thence.audit.run.own_step import (
    frozen_in,
    random_rows,
    reshaped,
    state_of,
    step_report,
    takes_a_cut,
    vocabulary_of,
)
from thence.audit.solve.sequences import KnownExample
from thence.audit.solve.signs import looks_like_signs
from thence.errors import UserError

ROW = ("input_ids", "response_mask", "reward", "group", "truncated")
"""What a row of your own must hold."""


@dataclass(frozen=True)
class _Row:
    ids: tuple[int, ...]
    start: int
    fact: Rollout
    noise: tuple[float, ...]


def check_policy(
    step: Callable[..., Any],
    *,
    model: nn.Module,
    asked: PolicyObjective | None = None,
    rollouts: Sequence[Mapping[str, Any]] | None = None,
    updates: int = 2,
    generations: int = 2,
    lr: float | None = None,
    vocabulary: int | None = None,
    seed: int = 0,
) -> Report:
    """Verify your own step of reinforcement learning, setting by setting, from real optimizer steps.

    ``step(model, rollouts, update)`` trains the model in place with one optimizer step on all rollouts. ``update``
    counts the optimizer steps on these rollouts from 0. Each rollout is a dict of lists as long as ``input_ids``:
    ``response_mask`` (1: written by the policy, 0: prompt or environment), ``old_logps`` (under the parameters that
    made this generation batch), ``reference_logps`` (under the initial parameters) and ``sampler_logps`` (as a sampling
    engine that differs a little gives them), 0 in the prompt and at the temperature asked for; and ``reward``,
    ``group`` and ``truncated``. The step may use these log-probabilities or make its own. If it takes ``micro_batch``
    and ``accumulation`` too, the same rollouts are cut in several ways.

    Args:
        step: your step. Plain SGD with ``lr`` is judged in full. Of Adam only the first step can be judged, by its
            signs, and so no ratio, clipping or KL.
        model: a small one without dropout, as for ``check``; it is copied, not changed.
        asked: the objective that you mean; None: the defaults of ``PolicyObjective``.
        rollouts: rows of your own with ``input_ids``, ``response_mask``, ``reward``, ``group`` and ``truncated``;
            None: random ones that let every part show.
        updates: optimizer steps on one generation batch. The rate should be large enough that the second leaves the
            clip range: the report says what did not show.
        generations: how often old log-probabilities are made anew.
        lr: the learning rate, if the step is plain SGD.
        vocabulary: of random rows; None: that of the model.
        seed: of random rows.

    Raises:
        UserError: a setting that there is not, rows that lack something, or a vocabulary that is not known.
    """
    begun = time.monotonic()
    asked = asked or PolicyObjective()
    asked.check()
    rows = _own_rows(rollouts) if rollouts is not None else _random(vocabulary or vocabulary_of(model), seed)
    cut = takes_a_cut(step)
    known = [KnownExample((), (), row.ids, (-100,) * row.start + row.ids[row.start :]) for row in rows]
    texts = [str(i) for i in range(max(max(row.ids) for row in rows) + 1)]
    judge = Judge(copy.deepcopy(model), known, texts, -1, None)
    results = []
    for case in _cases(len(rows), cut, asked.normaliser, lr, updates * generations):
        results.append(_one(step, model, rows, case, judge, asked, updates, cut))
    probe = {"rollouts": len(rows), "seed": seed}
    return step_report("check_policy", step, model, results, asked.normaliser, cut, begun, probe)


def _cases(rows: int, cut: bool, asked: str, lr: float | None, steps: int) -> list[Case]:
    optimizer: Literal["sgd", "unknown"] = "unknown" if lr is None else "sgd"
    common = {"optimizer": optimizer, "lr": 1.0 if lr is None else lr, "asked": asked, "examples": rows}
    common |= {"steps": steps, "epochs": steps}
    if not cut:
        return [Case("the step as it is", rows, 1, **common)]
    micro = max(rows // 3, 1)
    return [
        Case(f"micro {rows} x 1", rows, 1, **common),
        Case(f"micro {micro} x {-(-rows // micro)}", micro, -(-rows // micro), **common),
    ]


def _one(
    step: Callable[..., Any],
    model: nn.Module,
    rows: Sequence[_Row],
    case: Case,
    judge: Judge,
    asked: PolicyObjective,
    updates: int,
    cut: bool,
) -> CaseResult:
    own = copy.deepcopy(model)
    states, versions, samplers = [state_of(own)], [], []
    reference = old = sampler = _logps(own, rows, asked.temperature)
    given: list[dict[str, Any]] = []
    begun = time.monotonic()
    for number in range(case.steps):
        if number % updates == 0:
            old = reference if number == 0 else _logps(own, rows, asked.temperature)
            sampler = [[a + b for a, b in zip(o, row.noise, strict=True)] for o, row in zip(old, rows, strict=True)]
            given = [_given(row, *logps) for row, *logps in zip(rows, old, reference, sampler, strict=True)]
        versions.append(number // updates * updates)
        samplers.append(tuple(map(tuple, sampler)))
        arguments = {"micro_batch": case.micro_batch, "accumulation": case.accumulation} if cut else {}
        try:
            step(own, given, number % updates, **arguments)
        except Exception as error:
            return CaseResult(case, "failed", f"the step raised {type(error).__name__}: {error}")
        states.append(state_of(own))
        if case.optimizer == "unknown" and _signs(states[0], states[1]):
            # Of Adam as it is, nothing can be said of later steps, so none is taken.
            case = replace(case, steps=1, epochs=1)
            break
    seconds = time.monotonic() - begun
    plan = judge.plan(replace(case, steps=1, epochs=1), cut_known=cut)[0]
    first = [replace(row.fact, sampler=logps) for row, logps in zip(rows, samplers[0], strict=True)]
    facts = PolicyFacts(tuple(first), tuple(versions), 0, tuple(samplers))
    if reason := reshaped(states[0], states[-1]):
        return CaseResult(case, "not judged", reason, seconds=seconds)
    pieces = [plan] * (len(states) - 1)
    evidence = Evidence(
        states, pieces=pieces, scale_known=case.optimizer == "sgd", frozen=frozen_in(model), policy=asked, facts=facts
    )
    return replace(judge.case(case, evidence), seconds=seconds)


def _given(row: _Row, old: list[float], reference: list[float], sampler: list[float]) -> dict[str, Any]:
    """A row as the step gets it."""
    prompt = [0.0] * row.start
    written = [int(t not in row.fact.environment) for t in range(len(row.ids) - row.start)]
    return {
        "input_ids": list(row.ids),
        "response_mask": [0] * row.start + written,
        "old_logps": prompt + old,
        "reference_logps": prompt + reference,
        "sampler_logps": prompt + sampler,
        "reward": row.fact.reward,
        "group": row.fact.group,
        "truncated": row.fact.truncated,
    }


def _logps(model: nn.Module, rows: Sequence[_Row], temperature: float) -> list[list[float]]:
    """Log-probabilities of the response tokens of every row under the model as it is, nats."""
    exact = copy.deepcopy(model).double().eval()
    found = []
    with torch.no_grad():
        for row in rows:
            output = exact(input_ids=torch.tensor([row.ids]))
            logits = output.logits if hasattr(output, "logits") else output
            logp_TV = torch.log_softmax(logits[0, row.start - 1 : -1].double() / temperature, -1)
            found.append(logp_TV.gather(1, torch.tensor(row.ids[row.start :])[:, None])[:, 0].tolist())
    return found


def _random(vocabulary: int, seed: int) -> list[_Row]:
    rows = []
    labelled = random_rows(vocabulary, seed, LENGTHS)
    for row, fact in zip(labelled, rollout_facts(LENGTHS, seed), strict=True):
        noise = tuple(fact.pop("noise"))
        start = sum(label == -100 for label in row["labels"])
        rows.append(_Row(tuple(row["input_ids"]), start, Rollout.of(fact), noise))
    return rows


def _own_rows(rollouts: Sequence[Mapping[str, Any]]) -> list[_Row]:
    rows = []
    noise = rollout_facts([len(row.get("input_ids", ())) for row in rollouts])
    for number, row in enumerate(rollouts):
        missing = [key for key in ROW if key not in row]
        mask = list(row.get("response_mask", ()))
        if missing or len(mask) != len(row["input_ids"]) or not any(mask) or mask[0]:
            wrong = f"no {missing[0]}" if missing else "a response_mask that does not fit its input_ids"
            raise UserError(
                f"rollout {number} has {wrong}",
                remedy=f"give {', '.join(ROW)}; the mask is as long as input_ids and 0 in the prompt",
                field="rollouts",
            )
        start = mask.index(1)
        outside = tuple(t for t, written in enumerate(mask[start:]) if not written)
        fact = Rollout(float(row["reward"]), int(row["group"]), 0, bool(row["truncated"]), outside)
        size = len(mask) - start
        rows.append(_Row(tuple(row["input_ids"]), start, fact, tuple(noise[number]["noise"][:size])))
    return rows


def _signs(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    change = torch.cat([(before[name] - after[name]).double().reshape(-1) for name in before]).numpy()
    return looks_like_signs(change)
