"""The tables of a recipe that describe its model, its data and its ranks. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from thence.settings.limits import (
    Count,
    Name,
    Place,
    Processes,
    Rows,
    Seconds,
    Seed,
    Share,
    SomeCoefficient,
    Source,
    Text,
    Tokens,
)
from thence.settings.section import Section


class Lora(Section):
    """Train low-rank adapters (LoRA, arXiv 2106.09685) instead of the weights, which stay as they are."""

    rank: Rows
    """Rank of every adapter."""
    alpha: SomeCoefficient | None = None
    """What an adapter adds is multiplied by alpha / rank. Default: 2 x rank."""
    targets: Literal["all-linear"] | Annotated[list[Place], Field(min_length=1)] = "all-linear"
    """Linear layers that get an adapter: names or ends of names, as q_proj. all-linear: all but the output layer."""
    modules_to_save: list[Place] = []
    """Modules that are trained whole beside the adapters, for example norm."""
    quantize: Literal["nf4"] | None = None
    """nf4: keep the weights under the adapters in 4 bits (QLoRA). Needs bitsandbytes. Default: as they are."""

    @property
    def strength(self) -> float:
        """alpha, given or not."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


class Model(Section):
    """The model that the first stage starts from."""

    path: Source | None = None
    """A Hugging Face folder or hub name, `RUN:STAGE@STEP` (what a run has trained), or `world:chain/rich`."""
    gguf_file: Place | None = None
    """A GGUF file inside `path`. transformers reads it."""
    init: dict[str, Any] | None = None
    """A transformers configuration (with `model_type`), instead of `path`. The weights start random."""
    tokenizer: Source | None = None
    """A folder or hub name. Default: `path`. `world:chain` is the tokenizer of the embedded world."""
    config_overrides: dict[str, Any] = {}
    """Changes to the model's configuration, for example rope_theta and max_position_embeddings."""
    compute_dtype: Literal["auto", "float32", "float64", "bfloat16"] = "auto"
    """Type of the computation. Master weights stay float32. auto: bfloat16 on a GPU that has it, else float32."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository. thence prints a line when this is on."""
    lora: Lora | None = None
    """Train adapters instead of the weights, in every training stage: a table with rank and more."""

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if (self.path is None) == (self.init is None):
            raise ValueError("give exactly one of path and init")
        if self.init is not None and self.tokenizer is None:
            raise ValueError("init needs a tokenizer: set model.tokenizer")
        return self


class Sharding(Section):
    """How weights, gradients and moments are cut over ranks by `parallel = "fsdp2"` or `"hsdp"`, and how rows are."""

    replicas: Processes = 1
    """Groups of ranks that each hold a whole copy, with `hsdp`. Gradients are summed in a group, then over groups."""
    reshard_after_forward: bool = True
    """Free weights after the forward pass, and gather them again for the backward pass. false: faster, more memory."""
    sum_every_pass: bool = True
    """Sum gradients over ranks after every backward pass. false: once a step, from whole gradients in memory."""
    offload: bool = False
    """Keep weights, gradients and moments in host memory, where the optimizer steps too. For GPUs."""
    context: Processes = 1
    """Ranks that share every row of training, each with a piece of its tokens, in any layout. Needs packing."""


class Trackers(Section):
    """Where metrics go besides the run folder. The key of an account comes from the tracker's own login."""

    to: list[Literal["tensorboard", "trackio", "wandb"]] = []
    """tensorboard: files in the run folder. wandb: Weights & Biases. Needs `pip install "thence[trackers]"`."""
    project: Name = "thence"
    """Project at trackio and Weights & Biases."""


class Data(Section):
    """Where examples come from and how they become tokens."""

    source: list[Source] = Field(default=["world:chain"], min_length=1)
    """JSONL or Parquet files, Hugging Face data sets, or `world:chain` (see `docs/embedded-world.md`)."""
    split: Place = "train"
    """Split of a Hugging Face data set or of the embedded world."""
    layout: Literal["auto", "messages", "prompt-completion", "question-answer", "verl", "text"] = "auto"
    """How columns are read. auto: chosen from the names of the columns."""
    columns: dict[str, Text] = {}
    """Renamed columns: the name that the layout expects = the name in the file."""
    limit: Count | None = None
    """Use only this many examples, from the start."""
    seed: Seed = 0
    """Seed of the embedded world's generator."""
    weights: list[SomeCoefficient] | None = Field(default=None, min_length=1)
    """One weight for each source: their shares of the rows. Too small a source is repeated. Default: every row once."""
    pass_rate: tuple[Share, Share] | None = None
    """Use only rows whose column `pass_rate` lies between these, both included: [0.1, 0.9]."""
    order: Literal["shuffled", "as-given", "easy-first", "hard-first"] = "shuffled"
    """Order in which rows are trained. easy-first and hard-first sort by the column `pass_rate`."""
    skip_bad: bool = False
    """Skip rows that cannot be used and list them. Off: stop at the first such row."""
    template: Text = "own"
    """Chat template: own (the tokenizer's), none, or a path to a Jinja file."""
    template_variables: dict[str, Any] = {}
    """Values of the chat template's variables, for example { enable_thinking = false }."""
    system: Text | None = None
    """System message for every prompt that has none."""
    max_prompt_tokens: Tokens | None = None
    """Examples with longer prompts are left out and counted."""
    max_response_tokens: Tokens | None = None
    """Longer demonstrations are cut and counted. A cut one has no end token."""
    leave_out_cut: bool = False
    """Leave examples out whose demonstration is longer than max_response_tokens, instead of cutting it."""


class Environment(Section):
    """An environment of your own that answers the policy's turns: tools, a simulator. `docs/turns.md` explains it."""

    path: Place
    """Your own class: package.module:Class or file.py:Class, with reset(row) and step(text)."""
    max_turns: Rows = 8
    """Turns of the policy in one rollout, at most."""
    max_observation_tokens: Tokens = 4096
    """Tokens of all observations in one rollout, at most. An observation beyond it ends the rollout unread."""
    role: Literal["tool", "user"] = "tool"
    """Role of an observation in the chat template. Without a template an observation is plain text."""
    score: Literal["sum", "last"] = "sum"
    """A rollout's score. sum: of the rewards of all its turns. last: the last reward."""
    seconds: Seconds = 10.0
    """Time limit of one reset or step, in seconds."""
    on_error: Literal["stop", "unknown"] = "stop"
    """What an environment that fails does. stop: end the run with its error. unknown: its rollout has no score."""
    processes: Processes = 1
    """Processes of environments on every rank. Rollouts are dealt to them in turn."""
    expected_turns: Annotated[float, Field(ge=1, le=1e6)] | None = None
    """Mean turns of a rollout, for plans only."""
    expected_observation_tokens: Tokens | None = None
    """Mean tokens of all observations of a rollout, for plans only."""


class PartialRollouts(Section):
    """A batch holds the groups that end first, and the others are resumed by later weights. See docs/partial.md."""

    in_flight: Rows
    """Prompts whose groups are sampled at once, over all ranks: more than rl.prompts."""
    chunk_tokens: Tokens = 256
    """Tokens that an unfinished response gets between two looks at how many groups have ended."""


class Faulty(Section):
    """Bugs of other trainers, switched on to measure their effect. `docs/faults.md` lists them."""

    names: list[Text] = Field(min_length=1)
    """Names of faults, as in `docs/faults.md`. Several act together."""
    accumulation: Processes = 8
    """Micro-batches per rank in one optimizer step of the faulty trainer."""
    ranks: Processes = 1
    """Data-parallel ranks of the faulty trainer. One process simulates them all."""
