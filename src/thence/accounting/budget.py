"""The budget of a recipe before it runs: steps, tokens, FLOPs and memory of every stage.

What the data would tell and has not told yet (lengths, counts) is assumed, and every assumption is said in words.
There are no times in it: :mod:`thence.accounting.estimate` makes them, for given hardware.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from thence.accounting.batches import Figures, Lengths, Scored, group_flops, said, stage_figures
from thence.accounting.flops import causal_pairs, forward_flops, rule_flops, training_flops
from thence.accounting.known import Known, compute_bytes_of, held_by, take_model, take_published_sizes, usable_examples
from thence.accounting.lengths import capped, longest_row, mean_response, mean_turns
from thence.accounting.memory import (
    NO_REFERENCE,
    Held,
    Line,
    Memory,
    Reference,
    activation_memory,
    ahead_memory,
    checkpoint_memory,
    loading_memory,
    logit_memory,
    reference_memory,
    rollout_memory,
    state_memory,
    sum_memory,
    teacher_memory,
    vllm_memory,
    whole_copy,
)
from thence.accounting.planned import Executed, Plan, Rollouts, StagePlan
from thence.accounting.published import public_architecture
from thence.accounting.traffic import Sent, context_traffic, sampling_traffic, scoring_traffic, step_traffic
from thence.accounting.work import Outcome, Work
from thence.recipe import Data, Eval, Recipe, Rl, Sft, kind_of

__all__ = ["Plan", "Reference", "StagePlan", "plan", "public_architecture", "sft_steps"]
VLLM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
VLLM_ROWS = 64
VLLM_CACHE_GB = 2.0
"""vLLM's rows in parallel and its cache where the recipe names none: the defaults of its settings."""


def plan(
    recipe: Recipe,
    config: Mapping[str, Any] | None = None,
    n_examples: int | None = None,
    mean_prompt_tokens: float | None = None,
    mean_response_tokens: float | None = None,
    *,
    ranks: int = 1,
    device_bytes: float | None = None,
    references: Mapping[str, Reference] = MappingProxyType({}),
    teachers: Mapping[str, str] = MappingProxyType({}),
    works: Mapping[str, Work] = MappingProxyType({}),
    passes: Mapping[str, float] = MappingProxyType({}),
    compute_bytes: int | None = None,
    on_host: bool = False,
    longest_prompt_tokens: int | None = None,
    longest_row_tokens: int | None = None,
) -> Plan:
    """Plan a recipe.

    Args:
        config: the model's ``config.json``; default: ``model.init``, the folder ``model.path``, or, for a public model
            that is not there, its published shape.
        n_examples: usable examples of the training data, before a stage's own ``limit``.
        mean_prompt_tokens: of the rendered prompts.
        mean_response_tokens: of the demonstrations; rollouts are assumed to be as long, or as ``expected_tokens`` says.
        ranks: processes that share each step.
        device_bytes: memory of one of them, which decides what ``parallel = "auto"`` is.
        references: what stages compare the policy with, by their names.
        teachers: stages whose method has a teacher, and its weights: :class:`thence.methods.base.Teacher`.
        works: what a rollout batch of each RL stage samples and trains; where it is missing, every response once.
        passes: how often the policy reads each row of an RL stage without gradient; where it is missing, once.
        compute_bytes: bytes of a number in forward and backward; default: what the recipe says.
        on_host: the ranks train in host memory, on CPUs.
        longest_prompt_tokens, longest_row_tokens: of the training data; default: the mean prompt, and not known.

    Raises:
        UserError: the configuration is given, of a known family, but lacks a field.
    """
    known = Known(
        counts=None,
        room=None,
        examples=n_examples,
        prompt=mean_prompt_tokens,
        response=mean_response_tokens,
        longest_prompt=longest_prompt_tokens,
        longest_row=longest_row_tokens,
        ranks=ranks,
        references=references,
        teachers=teachers,
        works=works,
        passes=passes,
        held=Held(),
        on_host=on_host,
    )
    size = compute_bytes or compute_bytes_of(recipe, known)
    take_model(recipe, config, known)
    known.held = held_by(recipe, device_bytes, size, known)
    take_published_sizes(recipe, known)
    if known.prompt is None:
        known.assume("mean prompt length is not known: prompts are counted as 0 tokens")
        known.prompt = 0.0
    stages = tuple(_stage(recipe, name, known) for name in recipe.stages)
    name = recipe.model.path or "model.init"
    return Plan(name, known.counts, stages, ranks, tuple(known.assumed), known.held.layout, device_bytes, known.held)


def sft_steps(n_examples: int, batch: int, epochs: float) -> int:
    """Optimizer steps of so many passes over the data, the last, smaller batch of each pass included."""
    return max(1, round(epochs * math.ceil(n_examples / batch)))


def _stage(recipe: Recipe, name: str, known: Known) -> StagePlan:
    settings = recipe.stage(name)
    data = recipe.stage_data(settings.data) if settings.data else recipe.data
    if isinstance(settings, Sft):
        return _within_budget(_plan_sft(name, settings, data, known), settings, known)
    if isinstance(settings, Rl):
        return _within_budget(_plan_rl(name, settings, data, known), settings, known)
    return _plan_eval(name, settings, data, known)


def _within_budget(stage: StagePlan, settings: Sft | Rl, known: Known) -> StagePlan:
    """The stage, ended where its budget of FLOPs or tokens is spent."""
    limit = settings.flops or settings.tokens
    if limit is None:
        return stage
    most, least = (_share(each, settings, limit) for each in (stage, stage.at_least or stage))
    if most is None or least is None:
        known.assume(f"{stage.name}: where its budget ends it is not known, so it is counted to its last step")
        return stage
    ends = "trained tokens" if settings.tokens else "FLOPs by the rule"
    if min(most, least) < 1:
        known.assume(f"{stage.name}: it ends at its budget of {limit:,.3g} {ends}")
    cheap = None if stage.at_least is None else stage.at_least.scaled(least)
    return replace(stage.scaled(most), at_least=cheap)


def _share(stage: StagePlan, settings: Sft | Rl, limit: float) -> float | None:
    spent = stage.trained_tokens if settings.tokens else stage.rule_flops
    return None if spent is None else min(1.0, limit / spent) if spent else 1.0


def _plan_sft(name: str, sft: Sft, data: Data, known: Known) -> StagePlan:
    steps, rows = sft.steps, None
    if steps is not None:
        rows = float(steps * sft.batch)
    elif (examples := usable_examples(data, known)) is not None:
        examples = max(examples - sft.held_out, 0)
        steps, rows = sft_steps(examples, sft.batch, sft.epochs), sft.epochs * examples
    longest = known.longest_row
    if longest is None and data.max_prompt_tokens and data.max_response_tokens:
        longest = data.max_prompt_tokens + data.max_response_tokens
    tokens = _pass_tokens(name, sft, longest, known)
    memory = _training_memory(name, sft, known, tokens)
    if rows is None or known.response is None:
        what = "the number of examples" if rows is None else "the mean response length"
        known.assume(f"{name}: tokens and FLOPs are not known without {what}")
        return StagePlan(name, kind_of(name), steps, generated_tokens=0, memory=memory, micro_batch_tokens=tokens)
    prompt, response = known.prompt or 0.0, capped(known.response, data.max_response_tokens)
    length = prompt + response
    loss_tokens = rows * (length if sft.train_on == "all" else response)
    rule = executed = None
    if known.counts:
        passes = known.references.get(name, NO_REFERENCE).passes
        rule = rule_flops(known.counts.total, loss_tokens, scored=passes * loss_tokens)
        pairs = rows * causal_pairs(length)
        how = (sft.activation_checkpointing, known.held.adapters)
        executed = Executed(
            training_flops(known.counts, rows * length, pairs, loss_tokens, *how),
            passes * forward_flops(known.counts, rows * length, pairs, loss_tokens),
        )
    sent = _sent(sft, sft.batch * length, tokens, known.references.get(name, NO_REFERENCE).passes, known)
    own = {"sent": sent, "micro_batch_tokens": tokens, "step_rows": sft.batch}
    return StagePlan(name, kind_of(name), steps, loss_tokens, 0, rule, executed, memory, **own)


def _plan_rl(name: str, rl: Rl, data: Data, known: Known) -> StagePlan:
    minis = rl.prompts // (rl.mini_batch or rl.prompts)
    tokens = _pass_tokens(name, rl, longest_row(rl, data, known), known)
    memory = _training_memory(name, rl, known, tokens, _sampling_lines(name, rl, data, known))
    parallel = None if rl.engine == "vllm" else _rollout_rows(name, rl, known)
    work = _work(name, rl, known)
    response = mean_response(name, rl, known)
    shown = response if known.response is None else capped(known.response, data.max_response_tokens)
    lengths = Lengths(known.prompt or 0.0, response, shown, mean_turns(name, rl, known))
    own = known.passes.get(name)
    if own is None:
        known.assume(f"{name}: the exact count holds one scoring pass over the rows that are trained")
    passes = (1 if own is None else own) + known.references.get(name, NO_REFERENCE).passes
    scored = Scored(passes, name in known.teachers)
    if scored.taught:
        known.assume(f"{name}: a teacher scores every response, after a solution of the same length")
    rows = (rl.mini_batch or rl.prompts) * rl.rollouts
    sent = _sent(rl, rows * (lengths.prompt + response + lengths.turns.observed), tokens, passes, known)
    if known.counts and rl.engine != "vllm":
        sent += sampling_traffic(known.counts, known.held)
    low, high = sorted(
        (stage_figures(o, rl, lengths, known.counts, known.held.adapters, scored) for o in (work.least, work.most)),
        key=lambda found: 6 * found.trained + 2 * found.generated,
    )

    def made(found: Figures, **more: Any) -> StagePlan:
        drawn = _rollouts(rl, found.responses, rl.steps, lengths, known)
        own = (rl.steps * minis, found.trained, found.generated, found.rule, found.executed)
        return StagePlan(name, kind_of(name), *own, rollouts=drawn, micro_batch_tokens=tokens, step_rows=rows, **more)

    least = made(low) if work.depends else None
    return made(high, memory=memory, rollout_rows=parallel, sent=sent, at_least=least)


def _work(name: str, rl: Rl, known: Known) -> Work:
    """What a rollout batch of the method samples and trains, said where it is not every response, once each."""
    plain = Work.just(Outcome(rl.prompts * rl.rollouts, rl.prompts * rl.rollouts))
    if name not in known.works:
        known.assume(f"{name}: what {rl.method} samples and trains is not known: every response once, and nothing else")
        return plain
    work = known.works[name]
    if work != plain:
        both = (work.least, work.most)
        sampled, own, shown = (said(both, part) for part in ("sampled", "trained", "demonstrations"))
        why = f"; it depends on {work.depends}" if work.depends else ""
        known.assume(
            f"{name}: {rl.method} samples {sampled} responses a batch, and trains {own} and {shown} demonstrations{why}"
        )
    return work


def _plan_eval(name: str, settings: Eval, data: Data, known: Known) -> StagePlan:
    length = longest_row(settings, data, known)
    memory, problems = None, 0
    for overrides in settings.splits.values() or ({},):
        limit = overrides.get("limit", data.limit)
        if limit is None:
            known.assume(f"{name}: how many problems there are is not known before the data is read")
            memory = _sampling_memory(settings.rollout_rows, length, known)
            return StagePlan(name, "eval", 0, 0, memory=memory, rollout_rows=settings.rollout_rows)
        problems += limit
    responses = problems * settings.samples * len(settings.temperatures)
    rows = min(settings.rollout_rows, math.ceil(problems * settings.samples / known.ranks))
    memory = _sampling_memory(rows, length, known)
    prompt, response = known.prompt or 0.0, mean_response(name, settings, known)
    lengths = Lengths(prompt, response, response, mean_turns(name, settings, known))
    generated = responses * response
    rule = executed = None
    if known.counts:
        rule = rule_flops(known.counts.total, 0, generated)
        executed = Executed(sampling=group_flops(known.counts, lengths, responses, settings.samples))
    drawn = _rollouts(settings, responses, len(settings.temperatures), lengths, known)
    return StagePlan(name, "eval", 0, 0, generated, rule, executed, memory, rows, rollouts=drawn)


def _sampling_memory(rows: int, length: int, known: Known) -> Memory | None:
    """Of an evaluation: every rank samples from a whole model."""
    if known.counts is None:
        return None
    width = known.held.width
    text = f"{known.counts.total:,} parameters x {width} B (an evaluation samples from a whole model)"
    weights = Line("weights", known.counts.total * width, text, "always")
    return Memory((weights, *rollout_memory(known.counts, rows, length, width)))


def _rollouts(stage: Rl | Eval, responses: float, batches: int, lengths: Lengths, known: Known) -> Rollouts | None:
    """How responses are sampled; None: the model is not known."""
    if known.counts is None:
        return None
    size, rows = known.held.width, stage.rollout_rows
    if isinstance(stage, Rl) and stage.engine == "vllm":
        size = VLLM_SIZES.get(stage.vllm.get("dtype", "float32"), 4)
        rows = stage.vllm.get("max_rows", VLLM_ROWS)
    counts = known.counts
    return Rollouts(
        responses=responses,
        batches=batches,
        rows=rows,
        prompt=lengths.prompt + lengths.turns.observed / 2,
        response=lengths.response,
        longest=stage.max_tokens,
        weights=(counts.matmul + counts.vocab * counts.hidden) * size,
        cache=2 * counts.layers * counts.kv_heads * counts.head_dim * size,
        size=size,
    )


def _pass_tokens(name: str, stage: Sft | Rl, longest: int | None, known: Known) -> int:
    """Tokens of one pass on a rank: a micro-batch is full, or one row that is longer stands alone."""
    if longest is None and known.prompt:  # the data were read, by who gave their means
        return stage.micro_batch_tokens
    if longest is None:
        known.assume(f"{name}: no row is longer than micro_batch_tokens; a longer one stands alone, and needs more")
        return stage.micro_batch_tokens
    return max(stage.micro_batch_tokens, math.ceil(longest / known.held.context))


def _training_memory(
    name: str, stage: Sft | Rl, known: Known, tokens: int, more: tuple[Line, ...] = ()
) -> Memory | None:
    if known.counts is None:
        return None
    size = known.held.compute_bytes
    reference = known.references.get(name, NO_REFERENCE)
    if reference.passes and not known.held.adapters:  # adapters are switched off instead
        more = (reference_memory(known.counts, known.held), *more)
    if stage.checkpoint_async:
        averaged = known.teachers.get(name) == "average"
        more = (checkpoint_memory(known.counts, known.held, known.on_host, 4 if averaged else 3), *more)
    return Memory(
        (
            *loading_memory(known.counts, known.held, known.on_host),
            *state_memory(known.counts, known.held),
            *sum_memory(known.counts, known.held, known.ranks),
            activation_memory(known.counts, tokens, size, stage.activation_checkpointing, known.held.context),
            *logit_memory(known.counts, tokens, known.held.frozen_head, reference.whole),
            *more,
        )
    )


def _sent(stage: Sft | Rl, tokens: float, full: int, scored: float, known: Known) -> tuple[Sent, ...]:
    """What a rank sends in an optimizer step over so many tokens, in passes of ``full`` of them."""
    if known.counts is None or known.ranks == 1:
        return ()
    own = tokens / known.ranks
    passes = max(1, math.ceil(own / full))
    if known.held.cut:
        known.assume(f"a step has {passes:,} passes a rank: micro-batches are counted as full")
    return (
        *step_traffic(known.counts, known.held, known.ranks, passes),
        *scoring_traffic(known.counts, known.held, passes, scored),
        *context_traffic(known.counts, known.held, own, stage.activation_checkpointing, scored),
    )


def _sampling_lines(name: str, rl: Rl, data: Data, known: Known) -> tuple[Line, ...]:
    if known.counts is None:
        return ()
    adapted = known.held.adapters  # they are switched off instead
    teacher: tuple[Line, ...] = ()
    if known.teachers.get(name, "current") != "current" and not adapted:
        teacher = (teacher_memory(known.counts, known.held),)
    if rl.engine == "vllm":
        size, cache = VLLM_SIZES.get(rl.vllm.get("dtype", "float32"), 4), rl.vllm.get("kv_cache_gb", VLLM_CACHE_GB)
        known.assume(f"{name}: vLLM's own memory is not counted beyond its weights and rl.vllm.kv_cache_gb")
        if not cache:
            known.assume(f"{name}: with kv_cache_gb = 0 vLLM takes most of the device: whether it fits is not known")
        return (*teacher, *vllm_memory(known.counts, size, cache))
    length = longest_row(rl, data, known)
    sampler = rollout_memory(known.counts, _rollout_rows(name, rl, known), length, known.held.width)
    if rl.ahead:
        sampler = ahead_memory(known.counts, rl.ahead, sampler)
    return (*teacher, *whole_copy(known.counts, known.held), *sampler)


def _rollout_rows(name: str, rl: Rl, known: Known) -> int:
    work = known.works.get(name)
    prompts = rl.prompts if work is None or work.at_once is None else work.at_once
    prompts = prompts if rl.partial is None else rl.partial.in_flight
    return min(rl.rollout_rows, math.ceil(prompts * rl.rollouts / known.ranks))
