"""Random probes for the audit of the audit: a fault is switched on, real steps are taken, and the audit judges them.

Nothing about a probe is fixed but what a fault needs to show at all: rows, lengths, tokens, weights of the model, the
cut that the fault plays, the cut that the engine really makes, precision, objective and advantages are drawn.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thence.audit.judge.case import Judge
from thence.audit.judge.evidence import Evidence
from thence.audit.judge.windows import window_sizes
from thence.audit.objectives import OBJECTIVES, StepRows
from thence.audit.result import Case, CaseResult
from thence.audit.solve.observation import forward_rows
from thence.audit.solve.sequences import KnownExample
from thence.faults.catalogue import FAULTS, Fault, Needs
from thence.faults.cut import CutPlan, PolicyFacts, Window
from thence.faults.step import FaultyStep
from thence.objective import Batch, Clip, Logp, Normaliser, Row, Term, local_counts
from thence.train.parallel import SingleProcess
from thence.train.policy import Policy
from thence.train.step import StepSettings, accumulate_gradients, policy_statistics

PAD, END, FIRST_TOKEN, VOCABULARY = 0, 1, 2, 96
MOST_ROWS, MOST_TOKENS = 12, 130
APART = {"float32": 0.05, "autocast": 0.35}
"""Weights that differ by less, relative to their size, count as alike in a probe; such a probe is drawn again."""
ASKED = {"token-mean": Normaliser("tokens"), "sequence-mean": Normaliser("sequences")}
LONGEST = 40.0
SCALES = ("times-accumulation", "over-accumulation", "times-ranks", "over-ranks", "gradient-averaged")
CLIPS = (0.1, 0.3, 1.0, 2.0)
OBJECTIVE_OF = {
    "sequence-means": "sequence-mean",
    "mean-of-means": "micro-batch-mean",
    "sum-of-means": "micro-batch-mean",
    "rank-means": "rank-mean",
    "pass-means": "pass-mean",
    "micro-batch-sequence-means": "micro-batch-sequence-mean",
}


@dataclass(frozen=True)
class Probe:
    """One random probe."""

    case: Case
    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    advantages: tuple[float, ...] | None
    budget: int
    engine_packing: bool
    dtype: torch.dtype
    seed: int

    @property
    def plan(self) -> CutPlan:
        return CutPlan(self.case.micro_batch, self.case.accumulation, self.case.ranks)


def draw_probe(draw: random.Random, fault: Fault | None = None) -> Probe:
    """A probe that shows the fault; without one, any."""
    while True:
        probe = _draw(draw, fault)
        if fault is None or _shows(probe, fault):
            return probe


def judge_probe(probe: Probe, names: Sequence[str]) -> CaseResult:
    """Take the probe's steps with these faults (none: the clean step) and judge them."""
    model = make_model(probe.seed, probe.dtype)
    judge = Judge(copy.deepcopy(model).float(), known(probe), [str(i) for i in range(VOCABULARY)], PAD, END)
    states, windows = take_steps(probe, model, names)
    rows = [forward_rows(records(window, step), step, PAD) for step, window in enumerate(windows)]
    return judge.case(probe.case, Evidence(states, rows=rows or [[]], advantages=probe.advantages, longest=LONGEST))


def named(result: CaseResult, fault: Fault) -> bool:
    """Whether the audit names the fault."""
    found = {finding.id for finding in result.all_findings}
    return bool(found & set(fault.finds)) and (not fault.also or bool(found & set(fault.also)))


def take_steps(probe: Probe, model: Any, names: Sequence[str]) -> tuple[list[Mapping[str, Tensor]], list[Window]]:
    """Parameters before the first optimizer step and after each, and what went into the model in each."""
    case = probe.case
    faulty = FaultyStep(names, micro_batch=case.micro_batch, accumulation=case.accumulation, ranks=case.ranks)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.lr)
    compute = torch.bfloat16 if case.precision == "autocast" else probe.dtype
    settings = StepSettings(probe.budget, probe.engine_packing, case.clip, compute)
    states: list[Mapping[str, Tensor]] = [snapshot(model)]
    windows: list[Window] = []

    def stepped(*_: Any) -> None:
        assert faulty.window is not None
        states.append(snapshot(model))
        windows.append(faulty.window)

    optimizer.register_step_post_hook(stepped)
    done = 0
    for size in window_sizes(case):
        if len(windows) >= case.steps:
            break
        faulty(
            Policy(model),
            optimizer,
            batch_of(probe, [(done + i) % case.examples for i in range(size)]),
            SingleProcess(),
            settings,
        )
        done += size
    return states, windows


def batch_of(probe: Probe, examples: Sequence[int]) -> Batch:
    """The clean batch of these examples."""
    normaliser = ASKED.get(probe.case.asked, Normaliser("sequences", LONGEST))
    rows = []
    for i in examples:
        prompt, response = probe.prompts[i], probe.responses[i]
        weight = 1.0 if probe.advantages is None else probe.advantages[i]
        weight /= len(response) if probe.case.asked == "sequence-mean" else 1
        trained = torch.arange(len(prompt) + len(response)) >= len(prompt)
        weights = torch.full((1, len(response)), weight, dtype=torch.float64)
        rows.append(Row(torch.tensor([*prompt, *response]), trained, weights))
    surrogate = Logp() if probe.advantages is None else Clip(0.2, 0.28)
    return Batch((Term("probe", surrogate, normaliser),), tuple(rows))


def known(probe: Probe) -> list[KnownExample]:
    """The examples as the audit looks for them."""
    return [
        KnownExample((), (), (*prompt, *response), (*[-100] * len(prompt), *response))
        for prompt, response in zip(probe.prompts, probe.responses, strict=True)
    ]


def records(window: Window, step: int) -> list[dict[str, Any]]:
    """What a watcher of the virtual ranks would have noted: every micro-batch, padded on the right."""
    found = []
    for slots in window.cut.cells:
        forwards = []
        for cell in slots:
            ids = [window.batch.rows[i].token_ids.tolist() for i in cell]
            longest = max(map(len, ids))
            padded = [[*own, *[PAD] * (longest - len(own))] for own in ids]
            forwards.append({"step": step, "input_ids": padded, "attention_mask": None, "position_ids": None})
        found.append({"forwards": forwards})
    return found


def snapshot(model: Any) -> Mapping[str, Tensor]:
    """A copy of the parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def make_model(seed: int, dtype: torch.dtype) -> Any:
    """A random Llama in which the gradients of different tokens point apart; the seed decides its size too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    draw = random.Random(seed)
    heads = draw.choice((1, 2, 3))
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "num_hidden_layers": draw.choice((1, 1, 2)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice((1, heads)),
        "head_dim": 24 // heads,
        "intermediate_size": draw.choice((32, 48)),
        "tie_word_embeddings": draw.choice((True, False)),
        "initializer_range": 0.2,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": END,
        "attn_implementation": "eager",
    }
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype=dtype)  # pyright: ignore
    torch.set_rng_state(state)
    return model.eval()


def _draw(draw: random.Random, fault: Fault | None) -> Probe:
    needs = fault.needs if fault is not None else Needs(advantages=draw.random() < 0.3, steps=draw.choice((1, 1, 1, 2)))
    ranks = draw.randint(needs.ranks, 3)
    micro_batch = draw.randint(needs.micro_batch, 3)
    accumulation = draw.randint(max(needs.micro_batches, 2 if needs.incomplete else 1), 5)
    window = micro_batch * accumulation * ranks
    full = window if needs.steps == 1 else window * 2
    if needs.incomplete or needs.short or draw.random() < 0.3:
        full = max(2, draw.randint(1, max(window - 1, 1)) + (window if needs.steps > 1 else 0))
    lr = 1.0 if needs.steps == 1 else 0.1
    precision = draw.choice(("float32", "float32", "float32", "autocast"))
    asked = (
        "token-mean"
        if fault is not None
        else draw.choice(("token-mean", "token-mean", "sequence-mean", "constant-divisor"))
    )
    epochs = 2 if needs.steps > 1 else 1
    case = Case(
        "drawn", micro_batch, accumulation, ranks, examples=full, epochs=epochs, steps=needs.steps, lr=lr,
        precision=precision, asked=asked, clip=draw.choice(CLIPS) if needs.clip else 0.0,
    )  # fmt: skip
    prompts, responses = _texts(draw, full, needs.advantages)
    dtype = torch.float64 if precision == "float32" and draw.random() < 0.2 else torch.float32
    return Probe(
        case, prompts, responses, _advantages(draw, prompts) if needs.advantages else None,
        draw.randint(20, 120), draw.random() < 0.3, dtype, draw.randrange(10**6),
    )  # fmt: skip


def _texts(draw: random.Random, count: int, grouped: bool):
    """Prompts and responses; groups of one, three or four share a prompt, otherwise no two rows begin alike."""
    starts = draw.sample(range(FIRST_TOKEN, VOCABULARY), min(count, VOCABULARY - FIRST_TOKEN))
    tokens = range(FIRST_TOKEN, VOCABULARY)
    prompts, responses = [], []
    left = 0
    for i in range(count):
        if left == 0:
            prompts.append((starts[i % len(starts)], *draw.choices(tokens, k=draw.randint(1, 5))))
            left = draw.choice((1, 3, 3, 4)) if grouped else 1
        else:
            prompts.append(prompts[-1])
        left -= 1
        length = draw.choice((2, 3, 4, 6, 9, 13, 18))
        responses.append((*draw.choices(tokens, k=length - 1), END))
    return tuple(prompts), tuple(responses)


def _advantages(draw: random.Random, prompts: Sequence[tuple[int, ...]]) -> tuple[float, ...]:
    """Reward minus mean of the group, none of them near zero; one alone in its group has its reward."""
    result: list[float] = []
    for start in range(len(prompts)):
        if start and prompts[start] == prompts[start - 1]:
            continue
        size = sum(p == prompts[start] for p in prompts)
        while True:
            rewards = [draw.choice((0.0, 0.3, 0.5, 0.8, 1.0, 2.0)) for _ in range(size)]
            own = [r - sum(rewards) / size for r in rewards] if size > 1 else [draw.choice((0.5, 1.0))]
            if min(abs(a) for a in own) > 0.05:
                break
        result += own
    return tuple(result)


def _shows(probe: Probe, fault: Fault) -> bool:
    """Whether the probe is small enough, meets the fault's needs, and nothing else would give the same weights."""
    case = probe.case
    if case.examples > MOST_ROWS * case.steps or sum(map(len, probe.responses)) > MOST_TOKENS * case.steps:
        return False
    sizes = window_sizes(case)
    if fault.name == "window-mixed":
        return len(sizes) == 4 and sizes[1] < sizes[0]
    window = Window(batch_of(probe, range(sizes[0])), probe.plan.cut(sizes[0]))
    if fault.needs.unmet(window.cut, case.clip):
        return False
    if fault.name in SCALES and (case.accumulation == case.ranks or window.cut.slots < case.accumulation):
        return False
    if fault.name == "padding-trained":
        cells = window.cut.micro_batches
        return any(len({len(window.batch.rows[i].token_ids) for i in cell}) > 1 for cell in cells)
    least = APART[case.precision]
    if fault.needs.clip:
        return _clipped_apart(probe, window) > 2 * least
    if fault.name in OBJECTIVE_OF or fault.name == "double-counted":
        return _told_apart(fault, lengths_of(window), least)
    if fault.name == "incomplete-window-scaled":
        return abs(window.cut.slots / case.accumulation - 1) > least
    if fault.finds == ("token-dependent",) or fault.needs.advantages:
        return _uneven(probe, fault, window) > 2 * least
    return True


def _told_apart(fault: Fault, lengths: StepRows, least: float) -> bool:
    """Whether the fault's weights are not those of an objective that the audit names first."""
    if fault.name == "double-counted":
        weights, others = np.where(lengths.micro_batch == 0, 2.0, 1.0), list(OBJECTIVES)
    else:
        weights = OBJECTIVES[OBJECTIVE_OF[fault.name]].weights(lengths)
        others = list(OBJECTIVES)[: list(OBJECTIVES).index(OBJECTIVE_OF[fault.name])]
    return all(apart(weights, OBJECTIVES[other].weights(lengths), lengths) > least for other in others)


def _uneven(probe: Probe, fault: Fault, window: Window) -> float:
    """How far the factors that the fault gives to tokens (of advantages: to rows) lie apart: largest over mean, less 1.

    A factor that is the same everywhere is a matter of scale, and none of advantages or of tokens.
    """
    model = make_model(probe.seed, probe.dtype)
    settings = StepSettings(10_000, False, 0.0, probe.dtype)
    policy = PolicyFacts(lambda rows: policy_statistics(Policy(model), rows, 1.0, settings), PAD, 512, 1.0)
    assert fault.change is not None
    after = fault.change(window, policy)
    rows = zip(after.batch.rows, window.batch.rows, strict=True)
    factors = [(new.weights / old.weights)[0].numpy() for new, old in rows]
    if fault.needs.advantages:
        factors = [np.array([f.mean() for f in factors])]
    return max(float(np.abs(f / f.mean() - 1).max()) for f in factors)


def _clipped_apart(probe: Probe, window: Window) -> float:
    """How far the factors lie apart by which the ranks clip their shards: largest over smallest, less 1."""
    model = make_model(probe.seed, probe.dtype)
    settings = StepSettings(10_000, False, 0.0, probe.dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    accumulate_gradients(Policy(model), optimizer, window.batch, local_counts(window.batch), settings)
    squares = torch.zeros(probe.case.ranks, dtype=torch.float64)
    for parameter in model.parameters():
        for rank, chunk in enumerate(parameter.grad.chunk(probe.case.ranks)):
            squares[rank] += chunk.double().square().sum()
    factors = (probe.case.clip / squares.sqrt()).clamp(max=1.0)
    return float(factors.max() / factors.min() - 1)


def lengths_of(window: Window) -> StepRows:
    """The window as the audit's objectives see it."""
    n = len(window.batch.rows)
    micro, rank = np.zeros(n, int), np.zeros(n, int)
    for r, slots in enumerate(window.cut.cells):
        for k, cell in enumerate(slots):
            micro[list(cell)], rank[list(cell)] = k, r
    return StepRows(np.array([row.n_trained for row in window.batch.rows]), micro, rank)


def apart(a: np.ndarray, b: np.ndarray, lengths: StepRows) -> float:
    """Relative distance between the shapes of two rules' weights, long rows counting more."""
    root = np.sqrt(lengths.lengths)
    a, b = a * root, b * root
    return float(np.linalg.norm(b - a * (a @ b) / (a @ a)) / np.linalg.norm(b))


def probes(fault: Fault | None, count: int, seed: int = 0) -> list[Probe]:
    """So many probes, the same for the same seed."""
    draw = random.Random(f"{seed}/{fault.name if fault else 'clean'}")
    return [draw_probe(draw, fault) for _ in range(count)]


def faults() -> list[Fault]:
    """Every fault."""
    return list(FAULTS.values())
