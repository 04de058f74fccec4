"""The typed schema of recipes: one source for TOML files, Python and command-line flags.

A recipe names its stages in order; the part of a stage's name before the first ``-`` is its kind, and the table of
the kind is the default of every stage of that kind::

    stages = ["eval-base", "sft", "eval-sft", "rl", "eval-rl"]
    [eval]          # holds for the three evaluations
    [eval-base]     # would override [eval] for the first one

Nothing here imports torch, so that ``thence --help`` and ``--dry-run`` of a typo answer at once.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from thence.errors import RecipeError
from thence.text_values import field_type, read_value


class Section(BaseModel):
    """A table of a recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, coerce_numbers_to_str=True, allow_inf_nan=False
    )


class Model(Section):
    """The model that the first stage starts from."""

    path: str | None = None
    """A Hugging Face folder or hub name, or `world:chain/rich` for a base of the embedded world."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `path`, read by transformers."""
    init: dict[str, Any] | None = None
    """Instead of `path`: a transformers configuration (with `model_type`) to start from random weights."""
    tokenizer: str | None = None
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

    source: list[str] = ["world:chain"]
    """JSONL or Parquet files, Hugging Face data sets, or `world:chain` (the embedded world)."""
    split: str = "train"
    """Split of a hub data set or of the embedded world."""
    layout: Literal["auto", "messages", "prompt-completion", "question-answer", "verl", "text"] = "auto"
    """How columns are read; auto finds it from their names."""
    columns: dict[str, str] = {}
    """Renames: what the layout expects = the name in the file."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first so many examples."""
    seed: int = 0
    """Seed of the embedded world's generator."""
    skip_bad: bool = False
    """List rows that cannot be used and go on, instead of stopping at the first."""
    template: str = "own"
    """Chat template: own (the tokenizer's), none, or a path to a Jinja file."""
    template_variables: dict[str, Any] = {}
    """Values of the chat template's own variables, for example { enable_thinking = false }."""
    system: str | None = None
    """System message put before every prompt that has none."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Examples with longer prompts are left out, and counted."""
    max_response_tokens: int | None = Field(default=None, ge=1)
    """Longer demonstrations are cut, and counted; a cut one has no end token."""


class Faulty(Section):
    """A bug of other trainers, switched on: what a stage would have been with it. `docs/faults.md` lists them."""

    names: list[str] = Field(min_length=1)
    """Keys of `thence.faults.catalogue.FAULTS`; several act together."""
    accumulation: int = Field(default=8, ge=1)
    """Micro-batches of one rank in an optimizer step of the trainer that has the fault."""
    ranks: int = Field(default=1, ge=1)
    """Its data-parallel ranks; one process plays them all."""


class Optimization(Section):
    """What SFT and RL stages share: the optimizer, its schedule, micro-batches, checkpoints and what ends them."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after warm-up."""
    warmup: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps over which the learning rate rises linearly."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """Share of the peak at which linear and cosine end."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW, on matrices only; vectors (norms, biases) are not decayed."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0: no clipping."""
    skip_norm: float = Field(default=0.0, ge=0)
    """Take no step where the gradient norm is above this; 0: never. HPT's release has 80, ExGRPO's 500."""
    micro_batch_tokens: int = Field(default=8192, ge=1)
    """Tokens in one forward and backward, padding included. It never changes the gradient, only memory and speed."""
    packing: bool = False
    """Lay rows end to end without padding, each attending to itself only."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Steps between checkpoints. The last step of a stage is always kept."""
    flops: float | None = Field(default=None, gt=0)
    """End the stage at the step nearest to so many FLOPs: 6N a trained token, 2N a generated one (N parameters)."""
    tokens: int | None = Field(default=None, ge=1)
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

    lr: float = Field(default=5e-5, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after warm-up."""
    warmup: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps over which the learning rate rises linearly."""
    floor: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak at which linear and cosine end."""
    data: dict[str, Any] = {}
    """Overrides of [data] for this stage."""
    method: str = "sft"
    """A method that trains on demonstrations alone; `thence methods` lists them."""
    options: dict[str, Any] = {}
    """Settings of the method."""
    batch: int = Field(default=64, ge=1)
    """Demonstrations per optimizer step, over all ranks."""
    epochs: float = Field(default=3, gt=0)
    """Passes over the data. The last, smaller batch of an epoch is trained too, with its own normaliser."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps instead of epochs."""
    train_on: Literal["response", "all"] = "response"
    """all: prompt tokens are trained too (pretraining); it has to be asked for."""
    held_out: int = Field(default=0, ge=0)
    """Examples put aside, never trained, on which the loss is measured."""
    held_out_every: int = Field(default=50, ge=1)
    """Steps between measurements of the held-out loss; the first and the last are always made."""


class Rl(Optimization):
    """A stage of reinforcement learning. Defaults: section 4 of arXiv 2604.23747."""

    lr: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""
    data: dict[str, Any] = {}
    """Overrides of [data] for this stage."""
    method: str = "grpo"
    """grpo, dr_grpo, dapo or a method of another package; `thence methods` lists them."""
    options: dict[str, Any] = {}
    """Settings of the method."""
    steps: int = Field(default=500, ge=1)
    """Rollout batches. Each makes prompts / mini_batch optimizer steps."""
    prompts: int = Field(default=128, ge=1)
    """Prompts per rollout batch, over all ranks."""
    rollouts: int = Field(default=8, ge=1)
    """Rollouts per prompt: the size of a group."""
    mini_batch: int | None = Field(default=None, ge=1)
    """Prompts per optimizer step; default: all prompts of the rollout batch, one step."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling, and of every log-probability that the objective uses."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; 1: off."""
    top_k: int = Field(default=0, ge=0)
    """0: off."""
    max_tokens: int = Field(default=8192, ge=1)
    """Longest response; where it is not set, less if the model's context leaves less beside the longest prompt."""
    reward: str = "math"
    """exact, math, math-after-think, math-boxed, or an own function: package.module:function or file.py:function."""
    reward_seconds: float = Field(default=10.0, gt=0)
    """Time limit of one answer check, or of one call of an own function."""
    reward_right_from: float | None = None
    """The score from which an own function means right; default: what it states, else only scores of 0 and 1 tell."""
    rollout_rows: int = Field(default=512, ge=1)
    """Most responses sampled side by side."""
    engine: Literal["native", "vllm"] = "native"
    """What samples: this process with the trainer's own weights, or vLLM in a process of its own."""
    vllm: dict[str, Any] = {}
    """Settings of vLLM, for example python and kv_cache_gb: docs/vllm.md."""
    unknown: Literal["leave-out", "zero"] = "leave-out"
    """Responses that nobody can judge (time-out, a reward of None). leave-out: not trained. zero: a reward of 0."""
    importance_bound: float | None = Field(default=None, gt=0)
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
    splits: dict[str, dict[str, Any]] = {}
    """Several named test sets, each a table of overrides of `data`; empty: one, called after its split."""
    temperatures: list[Annotated[float, Field(ge=0)]] = Field(default=[0.6], min_length=1)
    """One column of the table each; 0 is greedy."""
    samples: int = Field(default=1, ge=1)
    """Responses per problem: accuracy is avg@samples."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; 1: off."""
    max_tokens: int = Field(default=8192, ge=1)
    """Longest response; where it is not set, less if the model's context leaves less beside the longest prompt."""
    reward: str = "math"
    """Grader, as in rl."""
    reward_seconds: float = Field(default=10.0, gt=0)
    """Time limit of one answer check, or of one call of an own function."""
    reward_right_from: float | None = None
    """The score from which an own function means right; default: what it states, else only scores of 0 and 1 tell."""
    rollout_rows: int = Field(default=512, ge=1)
    """Most responses sampled side by side."""


KINDS: dict[str, type[Section]] = {"sft": Sft, "rl": Rl, "eval": Eval}


class Recipe(Section):
    """A whole run: a model and the stages it goes through."""

    name: str = "run"
    """Names the run's folder."""
    description: str = ""
    """One line, shown by `thence recipes`."""
    seed: int = 0
    """Every random number of the run follows from it."""
    folder: str | None = None
    """Run folder; default: runs/<name>-seed<seed>."""
    stages: list[str] = ["sft", "rl", "eval"]
    """Names in order; the part before the first `-` is the kind: sft, rl or eval."""
    model: Model
    data: Data = Data()
    tables: dict[str, Sft | Rl | Eval] = Field(default={}, exclude=True)
    """The resolved table of every stage; filled from the tables of the file."""

    def stage(self, name: str) -> Sft | Rl | Eval:
        """The resolved settings of a stage."""
        return self.tables[name]

    def stage_data(self, overrides: Mapping[str, Any]) -> Data:
        """[data] with a stage's overrides laid over it."""
        return _validated(Data, {**self.data.model_dump(), **overrides}, "data", file=None)

    def run_folder(self) -> Path:
        """Where the run keeps everything."""
        return Path(self.folder) if self.folder else Path("runs") / f"{self.name}-seed{self.seed}"

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


def kind_of(stage: str) -> str:
    """The kind of a stage: the part of its name before the first `-`."""
    return stage.split("-", 1)[0]


def load_recipe(origin: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        origin: a TOML file, the name of a shipped recipe, or the tables as a mapping.
        overrides: dotted names to values, for example ``{"sft.lr": 2e-5}``; strings are parsed as TOML values.

    Raises:
        RecipeError: unknown recipe or key, wrong type or a combination that makes no sense.
    """
    if isinstance(origin, Mapping):
        file, tables = None, {key: value for key, value in origin.items()}
    else:
        file, tables = read_tables(origin)
    return build_recipe(apply_overrides(tables, overrides or {}), file=file)


def build_recipe(tables: Mapping[str, Any], file: str | None = None) -> Recipe:
    """Validate nested plain values into a recipe. Raises RecipeError."""
    stages = tables.get("stages", Recipe.model_fields["stages"].default)
    if not isinstance(stages, list) or not stages or not all(isinstance(s, str) for s in stages):
        raise RecipeError("stages is not a list of names", remedy='write stages = ["sft", "rl"]', file=file)
    for name in stages:
        if kind_of(name) not in KINDS:
            raise RecipeError(
                f"stage {name!r} has no kind",
                remedy=f"begin its name with one of {', '.join(KINDS)}, for example sft-short",
                file=file,
                field="stages",
            )
    if len(set(stages)) != len(stages):
        raise RecipeError(
            "a stage is named twice", remedy="give each its own name, for example eval-base", file=file, field="stages"
        )
    resolved = {}
    for name in stages:
        table = {**_table(tables, kind_of(name), file), **_table(tables, name, file)}
        resolved[name] = _validated(KINDS[kind_of(name)], table, name, file)
    own = {key: value for key, value in tables.items() if key not in KINDS and key not in stages}
    if "tables" in own:
        raise RecipeError(
            "unknown key", remedy=f"fields are: {', '.join(_fields_of(Recipe, ()))}", file=file, field="tables"
        )
    recipe = _validated(Recipe, own, "", file, known=[*KINDS, *stages])
    return recipe.model_copy(update={"tables": resolved})


def apply_overrides(tables: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Lay dotted names over nested tables; ``-`` in a field's name counts as ``_``. Returns a new mapping.

    A text is read by the type of its field: see :func:`thence.text_values.read_value`.
    """
    result = _copied(tables)
    values = {
        name: read_value(value, type_of(name)) if isinstance(value, str) else value for name, value in overrides.items()
    }
    if "stages" in values:
        result = _with_stages(result, values.pop("stages"))
    stages = result.get("stages", Recipe.model_fields["stages"].default)
    for dotted, value in values.items():
        node, parts = result, dotted.split(".")
        for i, part in enumerate(parts):
            # the names of stages and splits keep their dashes; in a field's name a dash stands for an underscore
            name = part if part in node or (i == 0 and part in stages) else part.replace("-", "_")
            if i == len(parts) - 1:
                node[name] = value
                break
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise RecipeError(f"{part} is not a table", remedy="name a field of the recipe", field=f"--{dotted}")
    return result


def type_of(dotted: str) -> Any:
    """The annotation of the field with this dotted name; Any where it is not known."""
    table, *path = dotted.split(".")
    path = [part.replace("-", "_") for part in path]
    if kind_of(table) not in KINDS or not path:
        return field_type(Recipe, [table.replace("-", "_"), *path])
    # the tables `data` and `splits` of a stage are laid over [data]
    below = path[1:] if path[0] == "data" else path[2:] if path[0] == "splits" else []
    return field_type(Data, below) if below else field_type(KINDS[kind_of(table)], path)


def _with_stages(tables: dict[str, Any], stages: Any) -> dict[str, Any]:
    """The tables with other stages; the table of a stage that is no longer run goes with it."""
    before = tables.get("stages", [])
    gone = {name for name in before if name not in stages and name not in KINDS} if isinstance(stages, list) else set()
    return {key: value for key, value in tables.items() if key not in gone} | {"stages": stages}


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("thence") / "recipes"))
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def read_tables(origin: str | Path) -> tuple[str, dict[str, Any]]:
    """The path and the plain tables of a TOML file or a shipped recipe, not validated. Raises RecipeError."""
    shipped = shipped_recipes()
    path = shipped.get(str(origin), Path(origin))
    try:
        return str(path), tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        near = difflib.get_close_matches(str(origin), shipped, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(
            f"no recipe {str(origin)!r}", remedy=f"{hint}`thence recipes` lists the shipped ones; or give a TOML file"
        ) from None
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"line (\d+)", str(error))
        raise RecipeError(
            f"not valid TOML: {error}", remedy="fix this line", file=path, line=int(at.group(1)) if at else None
        ) from None


def _table(tables: Mapping[str, Any], name: str, file: str | None) -> dict[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, Mapping):
        raise RecipeError(f"{name} is not a table", remedy=f"write [{name}]", file=file, field=name)
    return dict(table)


def _validated(kind: type, values: Mapping[str, Any], where: str, file: str | None, known: Sequence[str] = ()) -> Any:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in ([where] if where else []) + list(first["loc"]))
        if first["type"] == "extra_forbidden":
            leaf = str(first["loc"][-1])
            fields = _fields_of(kind, first["loc"][:-1])
            near = difflib.get_close_matches(leaf, [*fields, *known], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"fields are: {', '.join(fields)}"
            raise RecipeError("unknown key", remedy=hint, file=file, field=field) from None
        problem = first["msg"].removeprefix("Value error, ")
        shown = "" if first["type"] in ("missing", "value_error") else f" (got {first['input']!r})"
        raise RecipeError(
            problem + shown, remedy="fix this field; `thence run --fields` lists all", file=file, field=field or None
        ) from None


def _fields_of(kind: type, path: Sequence[int | str]) -> list[str]:
    """The names of the fields of the table at a path in a section."""
    for part in path:
        inner = getattr(kind, "model_fields", {}).get(part)
        if inner is None or not isinstance(inner.annotation, type):
            return []
        kind = inner.annotation
    return [name for name, field in getattr(kind, "model_fields", {}).items() if not field.exclude]


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value
