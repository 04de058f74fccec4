"""The schema of a recipe: model, data, what a stage of each kind is, and the whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from thence.given_files import folder_place
from thence.settings.limits import (  # fmt: skip
    Coefficient,
    Count,
    Epochs,
    Epsilon,
    Flops,
    Name,
    Natural,
    Norm,
    PartShare,
    Place,
    Processes,
    Rate,
    Rows,
    Seconds,
    Seed,
    Share,
    Signed,
    SomeCoefficient,
    SomeShare,
    SomeTemperature,
    Source,
    Steps,
    Temperature,
    Text,
    TokenBudget,
    Tokens,
)
from thence.settings.section import Section
from thence.settings.validation import validated


class Model(Section):
    """The model that the first stage starts from."""

    path: Source | None = None
    """A Hugging Face folder or hub name, or `world:chain/rich` for a base of the embedded world."""
    gguf_file: Place | None = None
    """Name of a GGUF file inside `path`, read by transformers."""
    init: dict[str, Any] | None = None
    """Instead of `path`: a transformers configuration (with `model_type`) to start from random weights."""
    tokenizer: Source | None = None
    """A folder or hub name; default: `path`. `world:chain` is the tokenizer of the embedded world."""
    config_overrides: dict[str, Any] = {}
    """Fields of the model's configuration to change, for example rope_theta and max_position_embeddings."""
    compute_dtype: Literal["auto", "float32", "float64", "bfloat16"] = "auto"
    """Forward and backward; master weights stay float32. auto: bfloat16 on a GPU that has it, else float32."""
    trust_remote_code: bool = False
    """Run Python code that a model's repository ships. It is printed when on."""

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if (self.path is None) == (self.init is None):
            raise ValueError("give exactly one of path and init")
        if self.init is not None and self.tokenizer is None:
            raise ValueError("init needs a tokenizer: set model.tokenizer")
        return self


class Data(Section):
    """Where examples come from and how they are rendered to tokens."""

    source: list[Source] = Field(default=["world:chain"], min_length=1)
    """JSONL or Parquet files, Hugging Face data sets, or `world:chain` (the embedded world)."""
    split: Place = "train"
    """Split of a hub data set or of the embedded world."""
    layout: Literal["auto", "messages", "prompt-completion", "question-answer", "verl", "text"] = "auto"
    """How columns are read; auto finds it from their names."""
    columns: dict[str, Text] = {}
    """Renames: what the layout expects = the name in the file."""
    limit: Count | None = None
    """Take only the first so many examples."""
    seed: Seed = 0
    """Seed of the embedded world's generator."""
    skip_bad: bool = False
    """List rows that cannot be used and go on, instead of stopping at the first."""
    template: Text = "own"
    """Chat template: own (the tokenizer's), none, or a path to a Jinja file."""
    template_variables: dict[str, Any] = {}
    """Values of the chat template's own variables, for example { enable_thinking = false }."""
    system: Text | None = None
    """System message put before every prompt that has none."""
    max_prompt_tokens: Tokens | None = None
    """Examples with longer prompts are left out, and counted."""
    max_response_tokens: Tokens | None = None
    """Longer demonstrations are cut, and counted; a cut one has no end token."""


class Faulty(Section):
    """A bug of other trainers, switched on: what a stage would have been with it. `docs/faults.md` lists them."""

    names: list[Text] = Field(min_length=1)
    """Keys of `thence.faults.catalogue.FAULTS`; several act together."""
    accumulation: Processes = 8
    """Micro-batches of one rank in an optimizer step of the trainer that has the fault."""
    ranks: Processes = 1
    """Its data-parallel ranks; one process plays them all."""


class Optimization(Section):
    """What SFT and RL stages share: the optimizer, its schedule, micro-batches, checkpoints and what ends them."""

    lr: Rate
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after warm-up."""
    warmup: Share = 0.0
    """Share of the steps over which the learning rate rises linearly."""
    floor: Share = 0.0
    """Share of the peak at which linear and cosine end."""
    betas: tuple[PartShare, PartShare] = (0.9, 0.999)
    """AdamW."""
    eps: Epsilon = 1e-8
    """AdamW."""
    weight_decay: Coefficient = 0.01
    """AdamW, on matrices only; vectors (norms, biases) are not decayed."""
    clip_norm: Norm = 1.0
    """Largest global gradient norm; 0: no clipping."""
    skip_norm: Norm = 0.0
    """Take no step where the gradient norm is above this; 0: never. HPT's release has 80, ExGRPO's 500."""
    micro_batch_tokens: Tokens = 8192
    """Tokens in one forward and backward, padding included. It never changes the gradient, only memory and speed."""
    packing: bool = False
    """Lay rows end to end without padding, each attending to itself only."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    checkpoint_every: Steps = 10
    """Steps between checkpoints. The last step of a stage is always kept."""
    flops: Flops | None = None
    """End the stage at the step nearest to so many FLOPs: 6N a trained token, 2N a generated one (N parameters)."""
    tokens: TokenBudget | None = None
    """End the stage at the step nearest to so many trained tokens."""
    fault: Faulty | None = None
    """Train with a bug on purpose: a name, a list of names, or a table with names, accumulation and ranks."""

    @field_validator("fault", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        return {"names": names} if isinstance(names, list) else names

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.flops is not None and self.tokens is not None:
            raise ValueError("give one of flops and tokens")
        return self


class Sft(Optimization):
    """A stage of supervised fine-tuning. Defaults: section 4 of arXiv 2604.23747."""

    lr: Rate = 5e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after warm-up."""
    warmup: Share = 0.1
    """Share of the steps over which the learning rate rises linearly."""
    floor: Share = 0.1
    """Share of the peak at which linear and cosine end."""
    data: dict[str, Any] = {}
    """Overrides of [data] for this stage."""
    method: Place = "sft"
    """A method that trains on demonstrations alone; `thence methods` lists them."""
    options: dict[str, Any] = {}
    """Settings of the method."""
    batch: Rows = 64
    """Demonstrations per optimizer step, over all ranks."""
    epochs: Epochs = 3
    """Passes over the data. The last, smaller batch of an epoch is trained too, with its own normaliser."""
    steps: Steps | None = None
    """Optimizer steps instead of epochs."""
    train_on: Literal["response", "all"] = "response"
    """all: prompt tokens are trained too (pretraining); it has to be asked for."""
    held_out: Natural = 0
    """Examples put aside, never trained, on which the loss is measured."""
    held_out_every: Steps = 50
    """Steps between measurements of the held-out loss; the first and the last are always made."""


class Rl(Optimization):
    """A stage of reinforcement learning. Defaults: section 4 of arXiv 2604.23747."""

    lr: Rate = 1e-6
    """Peak learning rate."""
    data: dict[str, Any] = {}
    """Overrides of [data] for this stage."""
    method: Place = "grpo"
    """grpo, dr_grpo, dapo or a method of another package; `thence methods` lists them."""
    options: dict[str, Any] = {}
    """Settings of the method."""
    steps: Steps = 500
    """Rollout batches. Each makes prompts / mini_batch optimizer steps."""
    prompts: Rows = 128
    """Prompts per rollout batch, over all ranks."""
    rollouts: Rows = 8
    """Rollouts per prompt: the size of a group."""
    mini_batch: Rows | None = None
    """Prompts per optimizer step; default: all prompts of the rollout batch, one step."""
    temperature: SomeTemperature = 1.0
    """Of sampling, and of every log-probability that the objective uses."""
    top_p: SomeShare = 1.0
    """Nucleus sampling; 1: off."""
    top_k: Natural = 0
    """0: off."""
    max_tokens: Tokens = 8192
    """Longest response; where it is not set, less if the model's context leaves less beside the longest prompt."""
    reward: Place = "math"
    """exact, math, math-after-think, math-boxed, or your own function: package.module:function or file.py:function."""
    reward_seconds: Seconds = 10.0
    """Time limit of one answer check, or of one call of your own function."""
    reward_right_from: Signed | None = None
    """The score from which your own function means right; default: what it states, else only scores of 0 and 1 tell."""
    rollout_rows: Rows = 512
    """Most responses sampled side by side."""
    engine: Literal["native", "vllm"] = "native"
    """What samples: this process with the trainer's own weights, or vLLM in a process of its own."""
    vllm: dict[str, Any] = {}
    """Settings of vLLM, for example python and kv_cache_gb: docs/vllm.md."""
    unknown: Literal["leave-out", "zero"] = "leave-out"
    """Responses that nobody can judge (time-out, a reward of None). leave-out: not trained. zero: a reward of 0."""
    importance_bound: SomeCoefficient | None = None
    """Weigh every sampled token by trainer's over sampler's probability, at most this; 2 is usual, none: not at all."""

    @model_validator(mode="after")
    def _mini_batch_divides(self) -> Rl:
        if self.mini_batch is not None and self.prompts % self.mini_batch:
            raise ValueError(f"mini_batch {self.mini_batch} does not divide prompts {self.prompts}")
        return self


class Eval(Section):
    """A stage that measures accuracy. Defaults: temperature 0.6, as section 4 of arXiv 2604.23747."""

    data: dict[str, Any] = {}
    """Overrides of [data] for this stage; its split is `test` unless it says otherwise."""
    splits: dict[Name, dict[str, Any]] = {}
    """Several named test sets, each a table of overrides of `data`; empty: one, called after its split."""
    temperatures: list[Temperature] = Field(default=[0.6], min_length=1)
    """One column of the table each; 0 is greedy."""
    samples: Rows = 1
    """Responses per problem: accuracy is avg@samples."""
    top_p: SomeShare = 1.0
    """Nucleus sampling; 1: off."""
    max_tokens: Tokens = 8192
    """Longest response; where it is not set, less if the model's context leaves less beside the longest prompt."""
    reward: Place = "math"
    """Grader, as in rl."""
    reward_seconds: Seconds = 10.0
    """Time limit of one answer check, or of one call of your own function."""
    reward_right_from: Signed | None = None
    """The score from which your own function means right; default: what it states, else only scores of 0 and 1 tell."""
    rollout_rows: Rows = 512
    """Most responses sampled side by side."""

    @field_validator("temperatures")
    @classmethod
    def _each_once(cls, value: list[float]) -> list[float]:
        if len(set(value)) < len(value):
            raise ValueError("a temperature is given twice")
        return value


class Recipe(Section):
    """A whole run: a model and the stages it goes through."""

    name: Name = "run"
    """Names the run's folder."""
    description: Text = ""
    """One line, shown by `thence recipes`."""
    seed: Seed = 0
    """Every random number of the run follows from it."""
    folder: Place | None = None
    """Run folder; default: runs/<name>-seed<seed>."""
    stages: list[Name] = ["sft", "rl", "eval"]
    """Names in order; the part before the first `-` is the kind: sft, rl or eval."""
    model: Model
    data: Data = Data()
    tables: dict[str, Sft | Rl | Eval] = Field(default={}, exclude=True)
    """The resolved table of every stage; filled from the tables of the file."""

    def stage(self, name: str) -> Sft | Rl | Eval:
        """The resolved settings of a stage."""
        return self.tables[name]

    def stage_data(self, overrides: Mapping[str, Any], where: str = "data") -> Data:
        """[data] with a stage's overrides laid over it. Raises RecipeError; ``where`` names the overrides in it."""
        return validated(Data, {**self.data.model_dump(), **overrides}, where)

    def run_folder(self) -> Path:
        """Where the run keeps everything. Raises RecipeError where no folder can be."""
        path = Path(self.folder) if self.folder else Path("runs") / f"{self.name}-seed{self.seed}"
        return folder_place(path, "folder" if self.folder else "name")

    def resolved(self) -> dict[str, Any]:
        """The recipe as nested plain values: what is written to the run folder, and loads to the same recipe.

        ``max_tokens`` is in it only where it was set: one that was not gives way to the model's context.
        """
        plain = self.model_dump(mode="json", exclude_none=True)
        for name, stage in self.tables.items():
            unset = {"max_tokens"} - stage.model_fields_set
            plain[name] = stage.model_dump(mode="json", exclude_none=True, exclude=unset)
        return plain

    def same_as(self, other: Recipe) -> bool:
        """Whether every setting is the same, set or left at its default."""
        tables = [{name: stage.model_dump() for name, stage in recipe.tables.items()} for recipe in (self, other)]
        return self.model_dump() == other.model_dump() and tables[0] == tables[1]


KINDS: dict[str, type[Section]] = {"sft": Sft, "rl": Rl, "eval": Eval}


def kind_of(stage: str) -> str:
    """The kind of a stage: the part of its name before the first `-`."""
    return stage.split("-", 1)[0]
