"""A recipe, and one table for each kind of stage; the other tables are in `tables`. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from thence.given_files import folder_place
from thence.recipe.tables import Data, Environment, Faulty, Model, PartialRollouts, Sharding, Trackers
from thence.settings.limits import (
    BatchesAhead,
    Coefficient,
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
    Steps,
    Temperature,
    Text,
    TokenBudget,
    Tokens,
)
from thence.settings.section import Section
from thence.settings.validation import validated


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
    keep_last: Rows | None = None
    """Keep the newest so many checkpoints, also once the stage is done. Default: 1 while the stage trains."""
    keep_best: Text | None = None
    """The stage's model is that of the step with the best value: eval, eval/NAME (a test set) or held_out_loss."""
    patience: Rows | None = None
    """End the stage after so many measurements in a row that are no better than the best. Needs keep_best."""
    eval_every: Steps | None = None
    """Steps between measurements on test sets while training. The last step has one too. Default: none."""
    eval_on: list[Text] = []
    """Test sets to measure on: names of [eval.splits]. Default: those of the next eval stage."""
    eval_limit: Rows | None = None
    """Use only so many problems of each test set while training, from the start."""
    checkpoint_async: bool = False
    """Write checkpoints while training goes on, from a copy in host memory. One at a time: the next one waits."""
    flops: Flops | None = None
    """Budget in FLOPs; the stage ends at the nearest step. N parameters: 6N per trained token, 2N per sampled one and
    per token that a teacher scores."""
    tokens: TokenBudget | None = None
    """Budget in trained tokens. The stage ends at the nearest step."""
    fault: Faulty | None = None
    """Train with a bug on purpose: a name, a list of names, or a table with names, accumulation and ranks."""

    @field_validator("fault", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        return {"names": names} if isinstance(names, list) else names

    @field_validator("eval_on", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

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
    stop: Literal["held-out"] | None = None
    """held-out: end the stage when the held-out loss reaches 1.10 times its smallest value, whose model it leaves."""


AHEAD_BOUND = 2.0
"""Of importance weights where an earlier policy sampled responses or their beginnings, and the recipe sets none."""

Played = TypeVar("Played", "Rl", "Eval")


def environment_table(value: Any) -> Any:
    """The table of an environment that may be given by its class alone."""
    return {"path": value} if isinstance(value, str) else value


def without_other_rewards(stage: Played) -> Played:
    """A stage with an environment, which has no other reward. Raises ValueError where it has one."""
    if stage.environment is not None and (
        stage.reward != type(stage).model_fields["reward"].default or (isinstance(stage, Rl) and stage.rewards)
    ):
        raise ValueError("the environment gives the rewards: leave reward and rewards out")
    return stage


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
    expected_tokens: Tokens | None = None
    """Mean length of a response that --dry-run counts with. The run ignores it. Default: that of demonstrations."""
    reward: Place = "math"
    """exact, math, math-after-think, math-boxed, or your own function: package.module:function or file.py:function."""
    rewards: dict[Place, Signed] = {}
    """Several rewards with their weights, in place of reward: { math = 1.0, "own.py:brief" = 0.2 }."""
    reward_seconds: Seconds = 10.0
    """Time limit of one answer check or one call of your own function, in seconds."""
    reward_right_from: Signed | None = None
    """Lowest score of your own function that counts as right. Default: what it states; else only 0 and 1 are judged."""
    environment: Environment | None = None
    """Rollouts of several turns: your own class (file.py:Class), or a table. It gives rewards. Default: one turn."""
    rollout_rows: Rows = 512
    """Largest number of responses sampled in parallel."""
    engine: Literal["native", "vllm"] = "native"
    """Sampler. native: this process, with the trainer's weights. vllm: vLLM in a separate process."""
    vllm: dict[str, Any] = {}
    """Settings of vLLM, for example python and kv_cache_gb. See docs/vllm.md."""
    unknown: Literal["leave-out", "zero"] = "leave-out"
    """Responses without a verdict (time-out, a reward of None). leave-out: not trained. zero: reward 0."""
    importance_bound: SomeCoefficient | None = None
    """Cap on a sampled token's weight, the trainer's over the sampler's probability. Usual: 2. Default: no weight, and
    2 where ahead or partial is set."""
    ahead: BatchesAhead = 0
    """Rollout batches that are sampled, by a process of its own, while earlier ones are trained. 0: none. With 1 or 2,
    a batch is sampled from the weights of so many steps before. See docs/asynchronous.md."""
    partial: PartialRollouts | None = None
    """Partial rollouts: more prompts are sampled at once than a batch has. Default: a batch waits for all its own."""

    @model_validator(mode="before")
    @classmethod
    def _weighed_if_older(cls, values: Any) -> Any:
        """Responses of an earlier policy are weighed (:mod:`thence.rollout.correction`)."""
        if not isinstance(values, Mapping) or values.get("importance_bound") is not None:
            return values
        older = values.get("ahead") or values.get("partial")
        return {**values, "importance_bound": AHEAD_BOUND} if older else values

    @field_validator("environment", mode="before")
    @classmethod
    def _with_a_path(cls, value: Any) -> Any:
        return environment_table(value)

    @model_validator(mode="after")
    def _one_reward(self) -> Rl:
        return without_other_rewards(self)

    @model_validator(mode="after")
    def _mini_batch_divides(self) -> Rl:
        if self.mini_batch is not None and self.prompts % self.mini_batch:
            raise ValueError(f"mini_batch {self.mini_batch} does not divide prompts {self.prompts}")
        return self

    @model_validator(mode="after")
    def _more_in_flight(self) -> Rl:
        if self.partial is not None and self.partial.in_flight <= self.prompts:
            raise ValueError(
                f"partial.in_flight {self.partial.in_flight} is not more than prompts {self.prompts}: no group could "
                "be left for a later batch"
            )
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
    expected_tokens: Tokens | None = None
    """Mean length of a response that --dry-run counts with. The run ignores it. Default: that of demonstrations."""
    reward: Place = "math"
    """Grader, with the same choices as rl.reward."""
    reward_seconds: Seconds = 10.0
    """Time limit of one answer check or one call of your own function, in seconds."""
    reward_right_from: Signed | None = None
    """Lowest score of your own function that counts as right. Default: what it states; else only 0 and 1 are judged."""
    environment: Environment | None = None
    """Rollouts of several turns, as in rl.environment. Default: one turn."""
    rollout_rows: Rows = 512
    """Largest number of responses sampled in parallel."""

    @field_validator("environment", mode="before")
    @classmethod
    def _with_a_path(cls, value: Any) -> Any:
        return environment_table(value)

    @model_validator(mode="after")
    def _one_reward(self) -> Eval:
        return without_other_rewards(self)

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
    trackers: Trackers = Trackers()
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
