"""Everything that a recipe names, opened and tried before the first step, for every stage that is not done yet.

``run`` refuses what does not hold; ``--dry-run`` prints it. What cannot be tried where it is asked, such as a model on
the hub without network, is not verified, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from thence.data.chat import end_token_ids
from thence.data.sources import JSON_SUFFIXES, PARQUET_SUFFIXES
from thence.data.trajectory import Prompt
from thence.errors import RecipeError, UserError
from thence.methods.registry import stage_method
from thence.pipeline.adapters import check_lora, try_lora
from thence.pipeline.ahead import check_ahead
from thence.pipeline.changes import Resumption
from thence.pipeline.context import step_of
from thence.pipeline.folder import RunFolder
from thence.pipeline.ground import Ground
from thence.pipeline.partial import check_partial
from thence.pipeline.prompts import RenderedPrompts, check_answers, check_trained, read_only
from thence.pipeline.rehearsal import no_demonstrations, rehearse
from thence.pipeline.reward_trial import try_environment, try_reward
from thence.pipeline.rewards import reward_names
from thence.pipeline.rl_stage import check_settings
from thence.pipeline.room import check_rows, response_tokens
from thence.pipeline.sft_stage import put_aside
from thence.pipeline.teacher import check_teacher, check_teacher_rows, drawn_prompts
from thence.pipeline.test_sets import measured_sets, test_sets
from thence.pipeline.trackers import check_trackers
from thence.pipeline.validation import check_validation
from thence.recipe import Data, Eval, Model, Recipe, Rl, Sft, naming_fields_of
from thence.rollout.native import Sampling
from thence.rollout.vllm.ready import check_vllm
from thence.rollout.vllm.settings import vllm_settings
from thence.train.context_length import context_of, open_config
from thence.train.model import load_tokenizer
from thence.train.model_files import resolve
from thence.train.run_models import run_of
from thence.train.written import check_manifest, check_written


@dataclass(frozen=True)
class CheckResult:
    """What became of one thing that a recipe names.

    Args:
        part: what was tried, for example ``rl: reward math``.
        state: refused: it cannot work. unverified: it could not be tried here.
        reason, remedy: why, and what to do about it; the reason of ``ok`` may be empty.
        error: what a run raises.
    """

    part: str
    state: Literal["ok", "refused", "unverified"]
    reason: str = ""
    remedy: str = ""
    error: UserError | None = None


def gives_degrees(finding: CheckResult) -> bool:
    """Whether a reward was found to give degrees without a threshold: there will be no accuracy."""
    return finding.state == "ok" and "and no threshold, so results are" in finding.reason


class NotAtHand(Exception):
    """It could not be tried here. Carries what a run raises, if it cannot do without."""

    def __init__(self, reason: str, error: UserError | None = None):
        super().__init__(reason)
        self.error = error


@dataclass
class Preflight:
    """A recipe being tried.

    Args:
        ranks: processes that will share each step.
        leads: whether this process also tries what is enough to try once: rewards and vLLM.
        restart: whether the run that stands in the folder will be thrown away.
        prompts: takes the data tables that are rendered.
    """

    recipe: Recipe
    folder: RunFolder
    ranks: int = 1
    leads: bool = True
    restart: bool = False
    prompts: RenderedPrompts = field(default_factory=RenderedPrompts)
    resumption: Resumption = field(default_factory=Resumption)
    findings: list[CheckResult] = field(default_factory=list)
    tokenizer: Any = None
    context: int | None = None
    trying: str = ""  # the stage that is being tried, if one is
    absent: dict[str, UserError] = field(default_factory=dict)

    def attempt(self, part: str, act: Callable[[], str | None]) -> None:
        """Try one thing, and note what became of it."""
        try:
            with naming_fields_of(self.trying, self.recipe.stage(self.trying)) if self.trying else nullcontext():
                self.findings.append(CheckResult(part, "ok", act() or ""))
        except NotAtHand as absent:
            remedy = absent.error.remedy if absent.error is not None else ""
            self.findings.append(CheckResult(part, "unverified", str(absent), remedy, absent.error))
        except UserError as error:
            self.findings.append(CheckResult(part, "refused", str(error).split("\n  remedy:")[0], error.remedy, error))


def preflight(
    recipe: Recipe,
    folder: Path | None = None,
    ranks: int = 1,
    *,
    leads: bool = True,
    restart: bool = False,
    repeat: Sequence[str] = (),
    prompts: RenderedPrompts | None = None,
) -> list[CheckResult]:
    """Try all that a recipe names, for the stages that are not done in the folder.

    Args:
        folder: the run folder; default: the recipe's.
        ranks: processes that will share each step.
        leads: False for all but the first of them; they leave out what is enough to try once.
        restart: the run that stands in the folder will be thrown away: no stage is done.
        repeat: stages that will be run again.
        prompts: takes the data tables that are rendered, for the stages.

    Returns:
        One finding for each thing that was tried, in the order of the stages.
    """
    trial = Preflight(
        recipe, RunFolder(folder or recipe.run_folder()), ranks, leads, restart, prompts or RenderedPrompts()
    )
    trial.attempt("run folder", lambda: _open_folder(trial, repeat))
    restart = trial.restart
    if leads and not restart and trial.findings[0].state == "ok":
        ground = Ground(recipe, trial.folder)
        trial.attempt("files that the run was begun with", lambda: ground.check(trial.resumption.again))
    again = trial.resumption.again
    left = [name for name in recipe.stages if restart or name in again or not trial.folder.is_done(name)]
    if recipe.trackers.to:
        trial.attempt("trackers", lambda: check_trackers(recipe))
    for name in left:
        trial.trying = name
        trial.attempt(f"{name}: settings", lambda name=name: _settings(trial, name))
    trial.trying = ""
    if not restart:
        trial.attempt("models of finished stages", lambda: _check_models(trial, left))
    if left:
        trial.attempt("model: tokenizer", lambda: _open_tokenizer(trial))
        trial.attempt("model: configuration", lambda: _open_config(trial))
        if recipe.model.lora is not None:
            trial.attempt("model: adapters", lambda: _try_adapters(trial))
    first, stages = trial.findings, []
    for name in reversed(left):  # the data of the first stage are rendered last, and so surely held for it
        trial.findings = []
        _try_stage(trial, name)
        stages = trial.findings + stages
    return first + stages


def _open_folder(trial: Preflight, repeat: Sequence[str]) -> None:
    trial.resumption = trial.folder.check(trial.recipe, trial.restart, repeat)
    trial.restart = trial.restart or trial.folder.restarting


def refuse(findings: Sequence[CheckResult]) -> None:
    """Raise the error of the first thing that a run cannot do without. Raises UserError."""
    wrong = {str(finding.error): finding.error for finding in findings if finding.error is not None}
    if len(wrong) == 1:
        raise next(iter(wrong.values()))
    if wrong:
        first, *more = wrong.values()
        others = "".join(f"\n  also: {str(error).splitlines()[0]}" for error in more)
        raise type(first)(
            first.problem, remedy=first.remedy + others, file=first.file, line=first.line, field=first.field
        )


def _settings(trial: Preflight, name: str) -> None:
    stage = trial.recipe.stage(name)
    if isinstance(stage, Sft | Rl):
        check_teacher(trial.recipe, name, stage_method(stage, name))
        step_of(name, stage)
        check_lora(trial.recipe, name)
        check_validation(trial.recipe, name)
        if stage.fault is not None and trial.ranks > 1:
            raise RecipeError(
                "a fault plays all ranks in one process, but several processes share the step",
                remedy="start a single process and give the number of ranks to the fault",
                field=f"{name}.fault",
            )
    if isinstance(stage, Rl):
        settings = vllm_settings(stage.vllm, f"{name}.vllm")
        check_settings(name, stage, trial.ranks)
        check_ahead(name, stage, stage_method(stage, name), trial.recipe.model.trust_remote_code)
        check_partial(name, stage, stage_method(stage, name))
        Sampling(stage.max_tokens, stage.temperature, stage.top_p, stage.top_k)
        if stage.engine == "vllm" and trial.leads:
            check_vllm(settings, f"{name}.vllm")
    if isinstance(stage, Eval):
        for temperature in stage.temperatures:
            if not 0 <= temperature < float("inf"):
                raise RecipeError(
                    f"a temperature of {temperature}", remedy="give 0 (greedy) or more", field=f"{name}.temperatures"
                )
        for split in test_sets(stage):
            if "/" in split or split in ("", ".", ".."):
                raise RecipeError(
                    f"results of test set {split!r} cannot be kept in a file of that name",
                    remedy=f"name it: [{name}.splits.NAME] with split = {split!r}",
                    field=f"{name}.splits",
                )


def _open_tokenizer(trial: Preflight) -> None:
    model = trial.recipe.model
    trial.tokenizer = _opened(model.tokenizer or model.path or "", lambda: load_tokenizer(model))


def _open_config(trial: Preflight) -> str:
    model = trial.recipe.model
    if trial.tokenizer is None and model.tokenizer is None and _is_hub_name(model.path or ""):
        raise NotAtHand(f"{model.path} is not at hand")  # asked once: without network that takes a minute
    trial.context = context_of(_opened(model.path or "", lambda: open_config(model)))
    _check_weights(model)
    return f"context {trial.context:,} tokens" if trial.context else "no limit of the context is told"


def _try_adapters(trial: Preflight) -> str:
    model = trial.recipe.model
    if trial.findings[-1].state != "ok" and _is_hub_name(model.path or ""):
        raise NotAtHand(f"{model.path} is not at hand")
    return try_lora(model)


def _check_models(trial: Preflight, left: Sequence[str]) -> None:
    """Raise DamagedFile where a finished stage's model is not as it was written, before anything follows from it."""
    stages = trial.recipe.stages
    trained = [name for name in stages if isinstance(trial.recipe.stage(name), Sft | Rl)]
    for name in trained:
        if name not in left:
            check_manifest(trial.folder.stage(name) / "model")
    for name in left:
        before = [other for other in trained if stages.index(other) < stages.index(name)]
        if before and before[-1] not in left:
            check_written(trial.folder.stage(before[-1]) / "model")


def _opened(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except UserError as error:
        if _is_hub_name(name):
            raise NotAtHand(f"{name} is not at hand: {error.problem}", error) from error
        raise


def _check_weights(settings: Model) -> None:
    """Whether a folder holds the weights that it promises; they are opened by the first stage."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

    folder = Path(resolve(settings.path or ""))
    if settings.init is not None or not folder.is_dir():
        return
    known = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    wanted = (settings.gguf_file,) if settings.gguf_file else known
    if not any((folder / name).is_file() for name in wanted):
        raise RecipeError(
            f"{folder} holds no weights ({' or '.join(wanted)})",
            remedy="give a Hugging Face folder with config.json, weights and tokenizer, or a reachable hub name",
            field="model.path",
        )


def _is_hub_name(name: str) -> bool:
    """Whether a name can only be one of the hub: nothing of this machine is called so."""
    return not (
        not name
        or name.startswith(("/", "./", "../", "~", "world:", "package:"))
        or name.lower().endswith(JSON_SUFFIXES + PARQUET_SUFFIXES)
        or Path(name).expanduser().exists()
        or run_of(name)[0] is not None
    )


def _try_stage(trial: Preflight, name: str) -> None:
    trial.trying = name
    stage = trial.recipe.stage(name)
    if isinstance(stage, Sft):
        trial.attempt(f"{name}: data", lambda: _try_sft(trial, name, stage))
    elif isinstance(stage, Rl):
        _try_sampled(trial, name, stage, name, stage.data)
    else:
        for split, table in test_sets(stage).items():
            _try_sampled(trial, name, stage, f"{name}, {split}", table)
    with suppress(RecipeError):  # of the settings, and said already
        for found in measured_sets(trial.recipe, name):
            trial.trying = found.owner
            _try_sampled(trial, found.owner, found.stage, f"{name}, measured on {found.name}", found.table)


def _load(
    trial: Preflight, overrides: dict[str, Any], rewards: Iterable[str] | None = None
) -> tuple[Data, list[Prompt]]:
    """A stage's data as its model will see them. Raises NotAtHand where they can only be read, or not even that."""
    data = trial.recipe.stage_data(overrides)
    far = [source for source in data.source if _is_hub_name(source)]
    if far and trial.tokenizer is None:  # the hub was asked for the tokenizer; without network that takes a while
        raise NotAtHand(f"{', '.join(far)} was not tried: there is no tokenizer")
    for source in far:
        if source in trial.absent:
            raise NotAtHand(f"{source} is not at hand", trial.absent[source])
    try:
        if trial.tokenizer is not None:
            return data, trial.prompts.load(data, trial.tokenizer)
        examples = read_only(data)
    except UserError as error:
        if far and error.file in far:
            trial.absent[error.file or ""] = error
            raise NotAtHand(str(error).split("\n  remedy:")[0], error) from error
        raise
    if rewards is not None:
        check_answers(examples, rewards)
    raise NotAtHand(f"{len(examples):,} examples were read, but not rendered: there is no tokenizer")


def _try_sft(trial: Preflight, name: str, stage: Sft) -> str:
    _, found = _load(trial, stage.data)
    prompts = [prompt for prompt in found if prompt.demonstration_ids]
    check_trained(prompts or found, stage.train_on, say=False)
    check_rows(name, prompts, trial.context)
    put_aside(prompts, stage.held_out, trial.recipe.seed)
    return f"{len(prompts):,} examples"


def _try_sampled(trial: Preflight, name: str, stage: Rl | Eval, part: str, overrides: dict[str, Any]) -> None:
    loaded: list[Prompt] = []

    def data() -> str:
        table, prompts = _load(trial, overrides, reward_names(stage))
        check_answers(prompts, reward_names(stage))
        limit = trial.context
        if isinstance(stage, Rl) and stage.engine == "vllm" and stage.vllm.get("max_model_len"):
            limit = min(stage.vllm["max_model_len"], limit or stage.vllm["max_model_len"])
        longest = response_tokens(name, stage, prompts, limit, say=False)
        end_token_ids(trial.tokenizer, table.template)
        loaded.extend(prompts)
        return f"{len(prompts):,} prompts, responses up to {longest:,} tokens"

    trial.attempt(f"{part}: data", data)
    if isinstance(stage, Rl) and loaded:
        trial.attempt(f"{part}: method {stage.method}", lambda: _try_method(trial, name, stage, loaded))
    if not trial.leads:
        return
    named = " + ".join(reward_names(stage))
    if stage.environment is None:
        trial.attempt(f"{part}: reward {named}", lambda: try_reward(stage, loaded, trial.tokenizer))
        return
    table = trial.recipe.stage_data(overrides)
    trial.attempt(f"{part}: environment {named}", lambda: try_environment(stage, loaded, trial.tokenizer, table))


def _try_method(trial: Preflight, name: str, stage: Rl, prompts: Sequence[Prompt]) -> str:
    shown = sum(bool(prompt.demonstration_ids) for prompt in prompts)
    method = stage_method(stage, name)
    if method.demonstrations != "no" and not shown:
        raise no_demonstrations()
    drawn = drawn_prompts(method, prompts, name)
    room = response_tokens(name, stage, drawn, trial.context, say=False)
    method = stage_method(stage, name, room)
    if method.demonstrations == "whole":
        check_rows(name, prompts, trial.context)
    table = trial.recipe.stage_data(stage.data)
    check_teacher_rows(name, method, table, trial.tokenizer, drawn, room, trial.context)
    try:
        rehearse(method, stage, drawn)
    except UserError:
        raise
    except Exception as error:  # a method of another package may look deeper into the sampler
        raise NotAtHand(f"made-up responses were too little for it: {type(error).__name__}: {error}") from error
    return f"{shown:,} of {len(prompts):,} prompts have a demonstration" if method.demonstrations != "no" else ""
