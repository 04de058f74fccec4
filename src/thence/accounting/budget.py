"""The budget of a recipe before it runs: steps, tokens, FLOPs and memory of every stage.

What the data would tell and has not told yet (lengths, counts) is assumed, and every assumption is said in words.
There are no times in a plan: a time is measured, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from thence.accounting.batches import Lengths, Scored, said, stage_figures
from thence.accounting.flops import (
    Counts,
    causal_pairs,
    forward_flops,
    parameters,
    rule_flops,
    sampling_flops,
    training_flops,
)
from thence.accounting.layout import choose_layout, is_cut, parts_of, weight_bytes
from thence.accounting.lora import adapter_parameters, quantized_parameters
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
    teacher_memory,
    whole_copy,
)
from thence.accounting.planned import Plan, StagePlan
from thence.accounting.published import own_configuration, public_architecture, published_table
from thence.accounting.traffic import Sent, sampling_traffic, step_traffic
from thence.accounting.work import Outcome, Work
from thence.recipe import Data, Eval, Recipe, Rl, Sft, kind_of


@dataclass(slots=True)
class _Known:
    """What is given about model and data, and what had to be assumed so far."""

    counts: Counts | None
    examples: int | None
    prompt: float | None
    response: float | None
    ranks: int
    references: Mapping[str, Reference]
    teachers: Mapping[str, str]
    works: Mapping[str, Work]
    held: Held
    on_host: bool
    assumed: list[str] = field(default_factory=list)

    def assume(self, text: str) -> None:
        if text not in self.assumed:
            self.assumed.append(text)


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
    compute_bytes: int | None = None,
    on_host: bool = False,
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
        compute_bytes: bytes of a number in forward and backward; default: what the recipe says.
        on_host: the ranks train in host memory, on CPUs.

    Raises:
        UserError: the configuration is given, of a known family, but lacks a field.
    """
    known = _Known(
        counts=None,
        examples=n_examples,
        prompt=mean_prompt_tokens,
        response=mean_response_tokens,
        ranks=ranks,
        references=references,
        teachers=teachers,
        works=works,
        held=Held(),
        on_host=on_host,
    )
    size = compute_bytes or _compute_bytes(recipe, known)
    known.counts = _counts(recipe, config, known)
    known.held = _held(recipe, device_bytes, size, known)
    _published_sizes(recipe, known)
    if known.prompt is None:
        known.assume("mean prompt length is not known: prompts are counted as 0 tokens")
        known.prompt = 0.0
    stages = tuple(_stage(recipe, name, known) for name in recipe.stages)
    name = recipe.model.path or "model.init"
    return Plan(name, known.counts, stages, ranks, tuple(known.assumed), known.held.layout, device_bytes)


def sft_steps(n_examples: int, batch: int, epochs: float) -> int:
    """Optimizer steps of so many passes over the data, the last, smaller batch of each pass included."""
    return max(1, round(epochs * math.ceil(n_examples / batch)))


def _held(recipe: Recipe, device_bytes: float | None, compute_bytes: int, known: _Known) -> Held:
    """How a rank holds the model, as a run of the recipe would have it."""
    width, cut = weight_bytes(recipe.model.compute_dtype), recipe.sharding
    lora = recipe.model.lora
    four_bits = lora is not None and lora.quantize is not None
    if recipe.parallel == "auto" and known.ranks > 1 and device_bytes is None and not four_bits:
        known.assume("the memory of a device is not known: parallel = auto is counted as ddp")
    adapters, quantized, largest = 0, 0, 0
    if known.counts is not None and lora is not None:
        adapters = adapter_parameters(known.counts, lora)
        known.assume(f"{adapters:,} parameters are trained (LoRA); the rule counts every parameter of the model")
    if cut.context > 1:
        known.assume(f"{cut.context} ranks share each row; no row has more than {cut.context} x micro_batch_tokens")
    every = known.counts.total if known.counts else 0
    state = width * (every + 4 * adapters if adapters else 4 * every)  # weights, gradient, two moments
    room = math.inf if device_bytes is None else device_bytes
    asked = "ddp" if four_bits and recipe.parallel == "auto" else recipe.parallel  # what is in 4 bits cannot be cut
    layout = choose_layout(asked, known.ranks, state, room)
    if known.counts is not None and lora is not None and not is_cut(layout):  # to cut them is refused
        quantized, largest = quantized_parameters(known.counts, lora)
    return Held(
        layout=layout,
        parts=parts_of(layout, known.ranks, cut.replicas),
        compute_bytes=compute_bytes,
        width=width,
        reshard=cut.reshard_after_forward,
        sum_every_pass=cut.sum_every_pass,
        offload=cut.offload,
        adapters=adapters,
        quantized=quantized,
        largest_quantized=largest,
        context=cut.context,
        frozen_head=lora is not None and not any(name.endswith("lm_head") for name in lora.modules_to_save),
    )


def _stage(recipe: Recipe, name: str, known: _Known) -> StagePlan:
    settings = recipe.stage(name)
    data = recipe.stage_data(settings.data)
    if isinstance(settings, Sft):
        return _plan_sft(name, settings, data, known)
    if isinstance(settings, Rl):
        return _plan_rl(name, settings, data, known)
    return _plan_eval(name, settings, data, known)


def _plan_sft(name: str, sft: Sft, data: Data, known: _Known) -> StagePlan:
    steps, rows = sft.steps, None
    if steps is not None:
        rows = float(steps * sft.batch)
    elif (examples := _examples(data, known)) is not None:
        examples = max(examples - sft.held_out, 0)
        steps, rows = sft_steps(examples, sft.batch, sft.epochs), sft.epochs * examples
    memory = _training_memory(name, sft, known)
    if rows is None or known.response is None:
        what = "the number of examples" if rows is None else "the mean response length"
        known.assume(f"{name}: tokens and FLOPs are not known without {what}")
        return StagePlan(name, kind_of(name), steps, generated_tokens=0, memory=memory)
    prompt, response = known.prompt or 0.0, _capped(known.response, data.max_response_tokens)
    length = prompt + response
    loss_tokens = rows * (length if sft.train_on == "all" else response)
    rule = exact = None
    if known.counts:
        passes = known.references.get(name, NO_REFERENCE).passes
        rule = rule_flops(known.counts.total, loss_tokens, scored=passes * loss_tokens)
        pairs = rows * causal_pairs(length)
        how = (sft.activation_checkpointing, known.held.adapters)
        exact = training_flops(known.counts, rows * length, pairs, loss_tokens, *how)
        exact += passes * forward_flops(known.counts, rows * length, pairs, loss_tokens)
    sent = _sent(sft, sft.batch * length, known)
    return StagePlan(name, kind_of(name), steps, loss_tokens, 0, rule, exact, memory, sent=sent)


def _plan_rl(name: str, rl: Rl, data: Data, known: _Known) -> StagePlan:
    steps = rl.steps * (rl.prompts // (rl.mini_batch or rl.prompts))
    memory = _training_memory(name, rl, known, _sampling_lines(name, rl, data, known))
    parallel = None if rl.engine == "vllm" else _rollout_rows(rl, known)
    work = _work(name, rl, known)
    response = _rollout_length(name, rl, known)
    shown = response if known.response is None else _capped(known.response, data.max_response_tokens)
    lengths = Lengths(known.prompt or 0.0, response, shown)
    scored = Scored(1 + known.references.get(name, NO_REFERENCE).passes, name in known.teachers)
    if scored.taught:
        known.assume(f"{name}: a teacher scores every response, after a solution of the same length")
    known.assume(f"{name}: the exact count holds one scoring pass over the rows that are trained")
    sent = _sent(rl, (rl.mini_batch or rl.prompts) * rl.rollouts * (lengths.prompt + response), known)
    if known.counts and rl.engine != "vllm":
        sent += sampling_traffic(known.counts, known.held)
    low, high = sorted(
        (stage_figures(o, rl, lengths, known.counts, known.held.adapters, scored) for o in (work.least, work.most)),
        key=lambda found: 6 * found[0] + 2 * found[1],
    )
    kind = kind_of(name)
    least = StagePlan(name, kind, steps, *low) if work.depends else None
    return StagePlan(name, kind, steps, *high, memory, parallel, sent, least)


def _work(name: str, rl: Rl, known: _Known) -> Work:
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


def _plan_eval(name: str, settings: Eval, data: Data, known: _Known) -> StagePlan:
    problems = 0
    for overrides in settings.splits.values() or ({},):
        limit = overrides.get("limit", data.limit)
        if limit is None:
            known.assume(f"{name}: how many problems there are is not known before the data is read")
            return StagePlan(name, "eval", 0, 0)
        problems += limit
    responses = problems * settings.samples * len(settings.temperatures)
    prompt, response = known.prompt or 0.0, _rollout_length(name, settings, known)
    generated = responses * response
    rule = exact = None
    if known.counts:
        rule = rule_flops(known.counts.total, 0, generated)
        exact = responses * sampling_flops(known.counts, prompt, response)
    return StagePlan(name, "eval", 0, 0, generated, rule, exact)


def _training_memory(name: str, stage: Sft | Rl, known: _Known, more: tuple[Line, ...] = ()) -> Memory | None:
    if known.counts is None:
        return None
    tokens, size = stage.micro_batch_tokens, known.held.compute_bytes
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
            activation_memory(known.counts, tokens, size, stage.activation_checkpointing, known.held.context),
            *logit_memory(known.counts, tokens, known.held.frozen_head, reference.whole),
            *more,
        )
    )


def _sent(stage: Sft | Rl, tokens: float, known: _Known) -> tuple[Sent, ...]:
    """What a rank sends in an optimizer step over so many tokens."""
    if known.counts is None or known.ranks == 1:
        return ()
    passes = max(1, math.ceil(tokens / known.ranks / stage.micro_batch_tokens))
    if known.held.cut:
        known.assume(f"a step has {passes:,} passes a rank: micro-batches are counted as full")
    return step_traffic(known.counts, known.held, known.ranks, passes)


def _sampling_lines(name: str, rl: Rl, data: Data, known: _Known) -> tuple[Line, ...]:
    if known.counts is None:
        return ()
    adapted = known.held.adapters  # they are switched off instead
    teacher: tuple[Line, ...] = ()
    if known.teachers.get(name, "current") != "current" and not adapted:
        teacher = (teacher_memory(known.counts, known.held),)
    if rl.engine == "vllm":
        known.assume(f"{name}: vLLM's own memory is not counted; rl.vllm.kv_cache_gb and the weights are most of it")
        return teacher
    longest = data.max_prompt_tokens or math.ceil(known.prompt or 0)
    sampler = rollout_memory(known.counts, _rollout_rows(rl, known), longest + rl.max_tokens)
    if rl.ahead:
        sampler = ahead_memory(known.counts, rl.ahead, sampler)
    return (*teacher, *whole_copy(known.counts, known.held), *sampler)


def _rollout_rows(rl: Rl, known: _Known) -> int:
    return min(rl.rollout_rows, math.ceil(rl.prompts * rl.rollouts / known.ranks))


def _rollout_length(name: str, stage: Rl | Eval, known: _Known) -> float:
    if stage.expected_tokens is not None:
        length = _capped(stage.expected_tokens, stage.max_tokens)
        known.assume(f"{name}: responses of {length:,.0f} tokens on average, by expected_tokens")
        return length
    if known.response is None:
        known.assume(f"{name}: every response is counted as long as max_tokens, {stage.max_tokens:,}: an upper bound")
        return float(stage.max_tokens)
    length = _capped(known.response, stage.max_tokens)
    known.assume(f"{name}: responses of {length:,.0f} tokens on average, as the demonstrations")
    return length


def _examples(data: Data, known: _Known) -> int | None:
    if known.examples is None:
        if data.limit is not None:
            known.assume(f"the data holds at least limit = {data.limit:,} usable examples")
        return data.limit
    return known.examples if data.limit is None else min(known.examples, data.limit)


def _published_sizes(recipe: Recipe, known: _Known) -> None:
    sizes = published_table("data_sets.toml")
    published = [sizes[name] for name in recipe.data.source if name in sizes]
    if len(published) != len(recipe.data.source):
        return
    if known.examples is None:
        known.examples = sum(each["examples"] for each in published)
        known.assume(f"{known.examples:,} examples ({published[0]['source']})")
    if known.response is None:
        tokens = sum(each["examples"] * each["response_tokens"] for each in published)
        known.response = tokens / sum(each["examples"] for each in published)
        known.assume(f"demonstrations of {known.response:,.0f} tokens on average ({published[0]['source']})")


def _counts(recipe: Recipe, config: Mapping[str, Any] | None, known: _Known) -> Counts | None:
    config = config or recipe.model.init
    if config is None and recipe.model.path is not None:
        config = own_configuration(Path(recipe.model.path).expanduser())
    if config is None and recipe.model.path is not None:
        config = public_architecture(recipe.model.path)
        if config is not None:
            known.assume(f"{recipe.model.path} has its published shape: its own configuration was not read")
    if config is None:
        known.assume("the model's configuration is not known: no FLOPs and no memory")
        return None
    return parameters({**config, **recipe.model.config_overrides})


def _compute_bytes(recipe: Recipe, known: _Known) -> int:
    chosen = recipe.model.compute_dtype
    if chosen == "auto":
        known.assume("compute_dtype auto is counted as float32; it is bfloat16 on a GPU that has it")
    return {"auto": 4, "float32": 4, "float64": 8, "bfloat16": 2}[chosen]


def _capped(length: float, limit: int | None) -> float:
    return length if limit is None else min(length, float(limit))
