"""The tables of a recipe: the model, the data and one table for each kind of stage. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from thence.given_files import folder_place
from thence.settings.limits import (
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
    """A Hugging Face folder or hub name, or `world:chain/rich` for a base of the embedded world."""
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


class Data(Section):
    """Where examples come from and how they become tokens."""

    source: list[Source] = Field(default=["world:chain"], min_length=1)
    """JSONL or Parquet files, Hugging Face data sets, or `world:chain` (the embedded world)."""
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


class Faulty(Section):
    """Bugs of other trainers, switched on to measure their effect. `docs/faults.md` lists them."""

    names: list[Text] = Field(min_length=1)
    """Names of faults, as in `docs/faults.md`. Several act together."""
    accumulation: Processes = 8
    """Micro-batches per rank in one optimizer step of the faulty trainer."""
    ranks: Processes = 1
    """Data-parallel ranks of the faulty trainer. One process simulates them all."""


class Optimization(Section):
    """What SFT and RL stages share: optimizer, schedule, micro-batches, checkpoints and the budget."""

    lr: Rate
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up."""
    warmup: Share = 0.0
    """Share of the steps in which the learning rate rises linearly to its peak."""
    floor: Share = 0.0
    """Final learning rate of linear and cosine, as a share of the peak."""
    betas: tuple[PartShare, PartShare] = (0.9, 0.999)
    """AdamW's beta1 and beta2."""
    eps: Epsilon = 1e-8
    """AdamW's epsilon."""
    weight_decay: Coefficient = 0.01
    """AdamW's weight decay. It acts on matrices only, not on vectors (norms, biases)."""
    clip_norm: Norm = 1.0
    """Largest global gradient norm. 0: no clipping."""
    skip_norm: Norm = 0.0
    """Skip the optimizer step if the gradient norm is above this. 0: never skip. HPT's release has 80, ExGRPO's 500."""
    micro_batch_tokens: Tokens = 8192
    """Tokens in one forward and backward pass, padding included. Changes memory and speed, never the gradient."""
    packing: bool = False
    """Pack rows end to end without padding. Each row attends to itself only."""
    activation_checkpointing: bool | Processes = False
    """Recompute activations in the backward pass to save memory. 2: of every second layer, 3: of every third, ..."""
    checkpoint_every: Steps = 10
    """Steps between checkpoints. The last step of a stage always has one."""
    keep_every: Steps | None = None
    """Keep a checkpoint of every so many steps, to be used later as RUN:STAGE@STEP. Default: only the newest stays."""
    checkpoint_async: bool = False
    """Write checkpoints while training goes on, from a copy in host memory. One at a time: the next one waits."""
    flops: Flops | None = None
    """Budget in FLOPs; the stage ends at the nearest step. N parameters: 6N per trained token, 2N per sampled one."""
    tokens: TokenBudget | None = None
    """Budget in trained tokens. The stage ends at the nearest step."""
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
    """Shape of the learning rate after the warm-up."""
    warmup: Share = 0.1
    """Share of the steps in which the learning rate rises linearly to its peak."""
    floor: Share = 0.1
    """Final learning rate of linear and cosine, as a share of the peak."""
    data: dict[str, Any] = {}
    """Changes to [data] for this stage."""
    method: Place = "sft"
    """A method that trains on demonstrations only. `thence methods` lists all methods."""
    options: dict[str, Any] = {}
    """Options of the method. `thence methods NAME` lists them."""
    batch: Rows = 64
    """Demonstrations per optimizer step, over all ranks."""
    epochs: Epochs = 3
    """Passes over the data. The last, smaller batch of an epoch is trained too, with its own normaliser."""
    steps: Steps | None = None
    """Optimizer steps, instead of epochs."""
    train_on: Literal["response", "all"] = "response"
    """response: only response tokens are trained. all: prompt tokens too (pretraining)."""
    held_out: Natural = 0
    """Number of held-out examples. They are never trained; the loss on them is measured."""
    held_out_every: Steps = 50
    """Steps between measurements of the held-out loss. The first and the last step always have one."""


class Rl(Optimization):
    """A stage of reinforcement learning. Defaults: section 4 of arXiv 2604.23747."""

    lr: Rate = 1e-6
    """Peak learning rate."""
    data: dict[str, Any] = {}
    """Changes to [data] for this stage."""
    method: Place = "grpo"
    """grpo, dapo, luffy, ... or a method of another package. `thence methods` lists all methods."""
    options: dict[str, Any] = {}
    """Options of the method. `thence methods NAME` lists them."""
    steps: Steps = 500
    """Rollout batches. Each gives prompts / mini_batch optimizer steps."""
    prompts: Rows = 128
    """Prompts per rollout batch, over all ranks."""
    rollouts: Rows = 8
    """Responses sampled per prompt: the size of a group."""
    mini_batch: Rows | None = None
    """Prompts per optimizer step. Default: all prompts of the rollout batch in one step."""
    temperature: SomeTemperature = 1.0
    """Sampling temperature. The loss uses log-probabilities at this temperature."""
    top_p: SomeShare = 1.0
    """Nucleus sampling. 1: off."""
    top_k: Natural = 0
    """Sample from the k most probable tokens. 0: off."""
    max_tokens: Tokens = 8192
    """Longest response. If it is not set, it is cut to what the model's context leaves after the longest prompt."""
    reward: Place = "math"
    """exact, math, math-after-think, math-boxed, or your own function: package.module:function or file.py:function."""
    reward_seconds: Seconds = 10.0
    """Time limit of one answer check or one call of your own function, in seconds."""
    reward_right_from: Signed | None = None
    """Lowest score of your own function that counts as right. Default: what it states; else only 0 and 1 are judged."""
    rollout_rows: Rows = 512
    """Largest number of responses sampled in parallel."""
    engine: Literal["native", "vllm"] = "native"
    """Sampler. native: this process, with the trainer's weights. vllm: vLLM in a separate process."""
    vllm: dict[str, Any] = {}
    """Settings of vLLM, for example python and kv_cache_gb. See docs/vllm.md."""
    unknown: Literal["leave-out", "zero"] = "leave-out"
    """Responses without a verdict (time-out, a reward of None). leave-out: not trained. zero: reward 0."""
    importance_bound: SomeCoefficient | None = None
    """Cap on a sampled token's weight, the trainer's over the sampler's probability. Usual: 2. Default: no weight."""

    @model_validator(mode="after")
    def _mini_batch_divides(self) -> Rl:
        if self.mini_batch is not None and self.prompts % self.mini_batch:
            raise ValueError(f"mini_batch {self.mini_batch} does not divide prompts {self.prompts}")
        return self


class Eval(Section):
    """A stage that measures accuracy. Defaults: temperature 0.6, as section 4 of arXiv 2604.23747."""

    data: dict[str, Any] = {}
    """Changes to [data] for this stage. The split is `test` unless set here."""
    splits: dict[Name, dict[str, Any]] = {}
    """Named test sets. Each is a table of changes to `data`. Empty: one test set, named after its split."""
    temperatures: list[Temperature] = Field(default=[0.6], min_length=1)
    """Sampling temperatures. Each is a column of the table; 0 is greedy."""
    samples: Rows = 1
    """Responses per problem. Accuracy is avg@samples."""
    top_p: SomeShare = 1.0
    """Nucleus sampling. 1: off."""
    max_tokens: Tokens = 8192
    """Longest response. If it is not set, it is cut to what the model's context leaves after the longest prompt."""
    reward: Place = "math"
    """Grader, with the same choices as rl.reward."""
    reward_seconds: Seconds = 10.0
    """Time limit of one answer check or one call of your own function, in seconds."""
    reward_right_from: Signed | None = None
    """Lowest score of your own function that counts as right. Default: what it states; else only 0 and 1 are judged."""
    rollout_rows: Rows = 512
    """Largest number of responses sampled in parallel."""

    @field_validator("temperatures")
    @classmethod
    def _each_once(cls, value: list[float]) -> list[float]:
        if len(set(value)) < len(value):
            raise ValueError("a temperature is given twice")
        return value


class Recipe(Section):
    """A whole run: a model and the stages it goes through."""

    name: Name = "run"
    """Name of the run and of its folder."""
    description: Text = ""
    """A line of description for `thence recipes`."""
    seed: Seed = 0
    """Seed of all random numbers of the run."""
    folder: Place | None = None
    """Run folder. Default: runs/<name>-seed<seed>."""
    stages: list[Name] = ["sft", "rl", "eval"]
    """Stages in order. The part of a name before the first `-` is the kind: sft, rl or eval."""
    parallel: Literal["auto", "none", "ddp", "fsdp2", "hsdp"] = "auto"
    """How ranks share training: whole copies (ddp) or weights cut over ranks (fsdp2, hsdp). auto: ddp if it fits."""
    model: Model
    data: Data = Data()
    sharding: Sharding = Sharding()
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
