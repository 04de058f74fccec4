"""What a plan knows of model, data and ranks, and what it had to assume: said in words, once each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thence.accounting.flops import FAMILIES, Counts, parameters
from thence.accounting.layout import choose_layout, is_cut, parts_of, weight_bytes
from thence.accounting.lora import adapter_parameters, quantized_parameters
from thence.accounting.memory import Held, Reference
from thence.accounting.published import own_configuration, public_architecture, published_table
from thence.accounting.work import Work
from thence.recipe import Data, Recipe


@dataclass(slots=True)
class Known:
    """What is given about model and data, and what had to be assumed so far.

    Args:
        room: tokens of a row that the model takes; None: no limit is known.
        longest_prompt, longest_row: of the training data, tokens; None: not measured.
        passes: how often the policy reads every row of a stage without gradient; where it is missing, once.
    """

    counts: Counts | None
    room: int | None
    examples: int | None
    prompt: float | None
    response: float | None
    longest_prompt: int | None
    longest_row: int | None
    ranks: int
    references: Mapping[str, Reference]
    teachers: Mapping[str, str]
    works: Mapping[str, Work]
    passes: Mapping[str, float]
    held: Held
    on_host: bool
    assumed: list[str] = field(default_factory=list)

    def assume(self, text: str) -> None:
        """Keep an assumption, in words."""
        if text not in self.assumed:
            self.assumed.append(text)


def held_by(recipe: Recipe, device_bytes: float | None, compute_bytes: int, known: Known) -> Held:
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
        known.assume(f"{cut.context} ranks share each row")
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


def usable_examples(data: Data, known: Known) -> int | None:
    """Examples of a stage's data; None: not known."""
    if known.examples is None:
        if data.limit is not None:
            known.assume(f"the data holds at least limit = {data.limit:,} usable examples")
        return data.limit
    return known.examples if data.limit is None else min(known.examples, data.limit)


def take_published_sizes(recipe: Recipe, known: Known) -> None:
    """Take what is published of data sets that were not read."""
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


def take_model(recipe: Recipe, config: Mapping[str, Any] | None, known: Known) -> None:
    """Take the model's shape. Raises UserError: the configuration is of a known family, but lacks a field."""
    config = config or recipe.model.init
    if config is None and recipe.model.path is not None:
        config = own_configuration(Path(recipe.model.path).expanduser())
    if config is None and recipe.model.path is not None:
        config = public_architecture(recipe.model.path)
        if config is not None:
            known.assume(f"{recipe.model.path} has its published shape: its own configuration was not read")
    if config is None:
        known.assume("the model's configuration is not known: no FLOPs and no memory")
        return
    whole = {**config, **recipe.model.config_overrides}
    if (family := whole.get("model_type")) not in FAMILIES:
        known.assume(f"models of type {family} are not counted: no FLOPs and no memory")
        return
    known.counts = parameters(whole)
    longest = whole.get("max_position_embeddings")
    if isinstance(longest, int) and not whole.get("rope_scaling"):
        known.room = longest


def compute_bytes_of(recipe: Recipe, known: Known) -> int:
    """Bytes of a number in forward and backward, by the recipe alone."""
    chosen = recipe.model.compute_dtype
    if chosen == "auto":
        known.assume("compute_dtype auto is counted as float32; it is bfloat16 on a GPU that has it")
    return {"auto": 4, "float32": 4, "float64": 8, "bfloat16": 2}[chosen]
