"""Random probes of reinforcement learning for the audit of the audit: thence's own steps on rollouts, with faults.

Drawn are rewards, groups, lengths, truncated responses and tokens of an environment, how a rollout batch is dealt to
optimizer steps, the objective (normaliser, standard deviation, clip ranges, ratio of tokens or responses, KL and its
estimator, temperature, correction for the sampler), the sampler's log-probabilities, the model and the cut.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.audit.mutation import END, PAD, VOCABULARY, make_model, records, snapshot
from tests.audit.policy_probes import LONGEST, NORMALISERS, PolicyProbe, any_probe
from thence.audit.judge.case import Judge
from thence.audit.judge.evidence import Evidence
from thence.audit.policy.facts import PolicyStep, Rollout
from thence.audit.policy.objective import PolicyObjective
from thence.audit.policy.predict import advantages, token_weights
from thence.audit.policy.read import PolicyFacts
from thence.audit.result import CaseResult
from thence.audit.solve.observation import forward_rows
from thence.audit.solve.sequences import KnownExample
from thence.errors import StepRefused
from thence.faults.catalogue import FAULTS
from thence.faults.cut import Window
from thence.faults.fault import Fault
from thence.faults.step import FaultyStep
from thence.objective import (
    Batch,
    Clip,
    Context,
    Generation,
    Logp,
    NegativeKl,
    Row,
    Sampled,
    Term,
    divisors,
    local_counts,
)
from thence.rollout.correction import truncated_importance
from thence.train.parallel import SingleProcess
from thence.train.policy import Policy
from thence.train.step import StepSettings, policy_statistics

MEANS = ("sequence-mean", "micro-batch-mean", "rank-mean", "pass-mean", "micro-batch-sequence-mean")
APART = 0.1
"""A probe shows a fault where the weights of some step are that far from the clean ones, relative to their size."""

MOVE = (0.3, 1.0)
"""The largest change of a log-probability in the first step, nats: clips act on some tokens, and none runs away."""
LEAST = 1e-3
"""The smallest of the largest changes of a parameter in a step; zero is none of them."""
FAR = 4.0
"""A log-ratio above it is no step of reinforcement learning any more; such a probe is drawn again."""


@dataclass(frozen=True)
class Taken:
    """What the steps of a probe left behind: parameters before the first and after each, and what went in."""

    states: list[Mapping[str, Tensor]]
    clean: list[Batch]
    windows: list[Window]
    rollouts: tuple[Rollout, ...]


def policy_faults() -> list[Fault]:
    """Every fault of reinforcement learning."""
    return [fault for fault in FAULTS.values() if fault.needs.features]


def probes(fault: Fault | None, count: int, seed: int = 0) -> list[PolicyProbe]:
    """So many probes, the same for the same seed."""
    draw = random.Random(f"{seed}/policy/{fault.name if fault else 'clean'}")
    return [draw_probe(draw, fault) for _ in range(count)]


def draw_probe(draw: random.Random, fault: Fault | None = None) -> PolicyProbe:
    """A probe that shows the fault; without one, any."""
    while True:
        probe = _paced(any_probe(draw, fault), draw.uniform(*MOVE))
        try:
            if shows(probe, fault) if fault is not None else _is_tame(probe, take_steps(probe, [])):
                return probe
        except StepRefused:  # it ran away so far that nothing is finite any more
            continue


def _paced(probe: PolicyProbe, move: float) -> PolicyProbe:
    """The probe with a learning rate whose first step moves some log-probability that far, in nats."""
    first = tuple(range(probe.size))
    tiny = replace(probe, case=replace(probe.case, lr=1e-3), steps=(first,), versions=(0,), dtype=torch.float64)
    taken = take_steps(tiny, [])
    model = make_model(probe.seed, torch.float64)
    before, after = (logps(model, state, probe, first, probe.asked.temperature) for state in taken.states)
    most = float(np.abs(after - before).max())
    return replace(probe, case=replace(probe.case, lr=float(f"{min(1e-3 * move / most, 3.0):.3g}") if most else 1.0))


def _is_tame(probe: PolicyProbe, taken: Taken) -> bool:
    """Whether no log-probability has run away from its old or reference one, and no update drowns in rounding."""
    for before, after in itertools.pairwise(taken.states):
        most = max(float((after[name] - before[name]).abs().max()) for name in before)
        if 0 < most < LEAST:
            return False
    for step in policy_steps(probe, taken, probe.asked.temperature):
        for other in (step.old, step.reference):
            if not np.abs(step.logp - other).max() < FAR:
                return False
    return True


def take_steps(probe: PolicyProbe, names: Sequence[str]) -> Taken:
    """Take the probe's steps with these faults; none: the clean ones."""
    case, model = probe.case, make_model(probe.seed, probe.dtype)
    policy, reference = Policy(model), Policy(copy.deepcopy(model))
    faulty = FaultyStep(names, micro_batch=case.micro_batch, accumulation=case.accumulation, ranks=case.ranks)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.lr)
    settings = StepSettings(probe.budget, False, 0.0, probe.dtype)
    states, clean, windows = [snapshot(model)], [], []
    rollouts, sampled, started = list(probe.rollouts), {}, -1
    for number, examples in enumerate(probe.steps):
        if probe.versions[number] != started:
            started = probe.versions[number]
            batch = probe.rollouts[examples[0]].batch
            sampled = _sample(probe, batch, policy, reference, settings)
            for example, own in sampled.items():
                if own.sampler is not None:
                    rollouts[example] = replace(rollouts[example], sampler=tuple(own.sampler.tolist()))
        moved = number > probe.versions[number]
        rows = tuple(_row(probe, example, sampled[example], policy, settings, moved) for example in examples)
        clean.append(Batch(_terms(probe.asked), rows, probe.asked.temperature))
        faulty(policy, optimizer, clean[-1], SingleProcess(), settings)
        assert faulty.window is not None
        states.append(snapshot(model))
        windows.append(faulty.window)
    return Taken(states, clean, windows, tuple(rollouts))


def _sample(
    probe: PolicyProbe, batch: int, policy: Policy, reference: Policy, settings: StepSettings
) -> dict[int, Sampled]:
    """The responses of a rollout batch, by example, as the policy stands before its first step."""
    asked = probe.asked
    mine = [i for i, rollout in enumerate(probe.rollouts) if rollout.batch == batch]
    generation = Generation(
        torch.tensor([probe.rollouts[i].reward for i in mine], dtype=torch.float64),
        torch.tensor([probe.rollouts[i].group for i in mine]),
        asked.scale == "group",
        asked.by_response,
        asked.clip_low,
        asked.clip_high,
    )
    values = advantages(probe.rollouts, asked, np.zeros(len(probe.rollouts)))
    found = {}
    for place, i in enumerate(mine):
        prompt, response, rollout = probe.prompts[i], probe.responses[i], probe.rollouts[i]
        ids = torch.tensor([*prompt, *response])
        whole = Row(ids, torch.arange(len(ids)) >= len(prompt), torch.zeros(1, len(response)))
        old, theirs = (
            policy_statistics(own, [whole], asked.temperature, settings)[0][0] for own in (policy, reference)
        )
        sampler = old + torch.tensor(probe.noise[i]).to(old) if probe.noise else None
        environment = torch.zeros(len(response), dtype=torch.bool)
        environment[list(rollout.environment)] = True
        found[i] = Sampled(
            generation,
            place,
            float(values[i]),
            len(prompt),
            truncated=rollout.truncated,
            environment=environment if rollout.environment else None,
            old=old,
            reference=theirs,
            sampler=sampler,
            trust=truncated_importance(old.double(), sampler, asked.correction_cap)
            if asked.correction == "truncate" and sampler is not None
            else None,
            bound=asked.correction_cap,
        )
    return found


def _row(
    probe: PolicyProbe, example: int, sampled: Sampled, policy: Policy, settings: StepSettings, moved: bool
) -> Row:
    """The clean row of an example."""
    asked, rollout = probe.asked, probe.rollouts[example]
    ids = torch.tensor([*probe.prompts[example], *probe.responses[example]])
    places = torch.ones(len(probe.responses[example]), dtype=torch.bool)
    places[list(rollout.environment)] = False
    filtered = asked.counted == "informative" and sampled.advantage == 0
    if (asked.truncated == "mask" and rollout.truncated) or filtered:
        places[:] = False
    trained = torch.zeros(len(ids), dtype=torch.bool)
    trained[sampled.start :] = places
    count = int(places.sum())
    share = 1 / max(count, 1) if asked.normaliser == "sequence-mean" else 1.0
    weight = torch.full((count,), sampled.advantage * share, dtype=torch.float64)
    if sampled.trust is not None:
        weight *= sampled.trust[places].double()
    assert sampled.old is not None and sampled.reference is not None
    row = Row(ids, trained, weight[None], sampled=sampled if moved else replace(sampled, old=None))
    if asked.by_response and moved and count:
        # As methods/gspo.py: the ratio of the response is a constant of its weights.
        now = policy_statistics(policy, [row], asked.temperature, settings)[0][0].double()
        ratio = float((now - sampled.old[places].double()).mean().exp())
        advantage = sampled.advantage
        held = ratio > 1 + asked.clip_high if advantage > 0 else advantage < 0 and ratio < 1 - asked.clip_low
        weight *= 0.0 if held else ratio
    weights = [weight] + ([torch.full((count,), asked.kl * share, dtype=torch.float64)] if asked.kl else [])
    return replace(
        row,
        weights=torch.stack(weights),
        behaviour=sampled.old[places] if moved and asked.ratio == "token" else None,
        reference=sampled.reference[places] if asked.kl else None,
    )


def _terms(asked: PolicyObjective) -> tuple[Term, ...]:
    normaliser = NORMALISERS[asked.normaliser]
    clip = Clip(asked.clip_low, asked.clip_high, asked.dual_clip)
    terms = [Term("policy", Logp() if asked.by_response else clip, normaliser)]
    return (*terms, Term("kl", NegativeKl(asked.estimator), normaliser)) if asked.kl else tuple(terms)


def policy_steps(probe: PolicyProbe, taken: Taken, temperature: float) -> list[PolicyStep]:
    """The facts of every step, from the parameters alone, at a temperature."""
    model = make_model(probe.seed, torch.float64)
    found = []
    for number, examples in enumerate(probe.steps):
        n, ranks, micro = len(examples), probe.case.ranks, probe.case.micro_batch
        cells = np.arange(n) // micro
        row = np.repeat(np.arange(n), [len(probe.responses[e]) for e in examples])
        place = np.concatenate([np.arange(len(probe.responses[e])) for e in examples])
        logs = [logps(model, taken.states[v], probe, examples, temperature) for v in range(number + 1)]
        old = logs[probe.versions[number]]
        given = [taken.rollouts[e].sampler for e in examples]
        sampler = np.concatenate(given) if given[0] else old
        found.append(
            PolicyStep(
                taken.rollouts, np.array(examples), cells // ranks, cells % ranks, row, place, logs[-1], old, logs[0],
                sampler,
            )
        )  # fmt: skip
    return found


def logps(
    model: Any, state: Mapping[str, Tensor], probe: PolicyProbe, examples: Sequence[int], temperature: float
) -> np.ndarray:
    """Log-probabilities of the response tokens of examples, shape (T,), float64."""
    model.load_state_dict(state, strict=False)
    found = []
    with torch.no_grad():
        for e in examples:
            ids = torch.tensor([*probe.prompts[e], *probe.responses[e]])
            logits = model(input_ids=ids[None], use_cache=False).logits[0, len(probe.prompts[e]) - 1 : -1]
            found.append((logits / temperature).log_softmax(-1).gather(1, ids[len(probe.prompts[e]) :, None])[:, 0])
    return torch.cat(found).numpy()


def weights_of(probe: PolicyProbe, batch: Batch, state: Mapping[str, Tensor]) -> np.ndarray:
    """The weight of every response token in a batch of thence's step, trained or not, shape (T,)."""
    model = make_model(probe.seed, torch.float64)
    model.load_state_dict(state, strict=False)
    settings = StepSettings(10_000, False, 0.0, torch.float64)
    sizes, found = divisors(batch.terms, local_counts(batch)), []
    scored = policy_statistics(Policy(model), batch.rows, batch.temperature, settings)
    for row, (logp, _) in zip(batch.rows, scored, strict=True):
        logp = logp.double()
        total = torch.zeros(len(logp), dtype=torch.float64)
        for term, weight, size in zip(batch.terms, row.weights.double(), sizes, strict=True):
            behaviour, reference = (None if v is None else v.double() for v in (row.behaviour, row.reference))
            total += weight * term.surrogate.slope(logp, Context(weight, behaviour, reference)) / size
        assert row.sampled is not None
        spread = torch.zeros(len(row.token_ids), dtype=torch.float64)
        spread[row.trained] = total
        found.append(spread[row.sampled.start :])
    return torch.cat(found).numpy()


def shows(probe: PolicyProbe, fault: Fault) -> bool:
    """Whether the batches have what the fault needs, and its weights are apart from the clean ones in some step."""
    taken = _tried(probe, fault)
    if taken is None:
        return False
    if not _is_tame(probe, taken):
        return False
    if fault.name == "temperature-ignored":
        return True
    if fault.name == "group-means" and _is_another_mean(probe, taken):
        return False
    for clean, window, state in zip(taken.clean, taken.windows, taken.states, strict=False):
        a, b = weights_of(probe, clean, state), weights_of(probe, window.batch, state)
        if np.linalg.norm(b - a) > APART * max(float(np.linalg.norm(a)), 1e-9):
            return True
    return False


def _is_another_mean(probe: PolicyProbe, taken: Taken) -> bool:
    """Whether means of groups are here those of micro-batches, ranks or responses as well, in some step."""
    for number, step in enumerate(policy_steps(probe, taken, probe.asked.temperature)):
        found = weights_of(probe, taken.windows[number].batch, taken.states[number])
        for other in MEANS:
            weights = token_weights(step, replace(probe.asked, normaliser=other))
            if np.linalg.norm(found - weights) < APART * np.linalg.norm(found):
                return True
    return False


def _tried(probe: PolicyProbe, fault: Fault) -> Taken | None:
    """The probe's steps with the fault; None: its batches lack what the fault is about."""
    if len(probe.steps) < fault.needs.steps or len(set(probe.versions)) < fault.needs.generations:
        return None
    clean = take_steps(probe, [])
    if any(fault.needs.lacking(batch) for batch in clean.clean):
        return None
    return take_steps(probe, [fault.name])


def known(probe: PolicyProbe) -> list[KnownExample]:
    """The examples as the audit looks for them."""
    return [
        KnownExample((), (), (*prompt, *response), (*[-100] * len(prompt), *response))
        for prompt, response in zip(probe.prompts, probe.responses, strict=True)
    ]


def make_judge(probe: PolicyProbe) -> Judge:
    """The judge of a probe."""
    texts = [str(i) for i in range(VOCABULARY)]
    return Judge(make_model(probe.seed, torch.float32), known(probe), texts, PAD, END)


def judge_probe(probe: PolicyProbe, names: Sequence[str]) -> CaseResult:
    """Take the probe's steps with these faults (none: the clean steps) and judge them."""
    taken = take_steps(probe, names)
    rows = [forward_rows(records(window, step), step, PAD) for step, window in enumerate(taken.windows)]
    evidence = Evidence(
        taken.states,
        rows=rows,
        longest=LONGEST,
        policy=probe.asked,
        facts=PolicyFacts(taken.rollouts, probe.versions),
    )
    return make_judge(probe).case(probe.case, evidence)
