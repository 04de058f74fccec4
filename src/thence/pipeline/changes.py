"""What of a recipe may change when its run is resumed, and what follows: one rule for every field.

A stage that has not begun takes any settings. For one that has, the field's rule decides: see ``RULES``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from thence.errors import UserError
from thence.pipeline.test_sets import test_sets
from thence.recipe import Data, Eval, Optimization, Recipe, kind_of

State = Literal["new", "begun", "done", "kept"]
"""Of a stage. kept: done, and its last checkpoint is still there, so that it can be continued."""


@dataclass(frozen=True)
class Rule:
    """Whether a field of a stage that has begun may change.

    Args:
        key: how it is judged.
        says: what follows, for the reader.
    """

    key: Literal["free", "onward", "length", "content", "repeat", "stages", "fixed"]
    says: str


FREE = Rule("free", "any time; no number changes but by rounding")
ONWARD = Rule("onward", "while the stage is not done; holds from the next step on")
LENGTH = Rule("length", "more at any time, if the last checkpoint is there; rates and weights that follow from it too")
CONTENT = Rule("content", "another place is fine, if the files in it are the same")
REPEAT = Rule("repeat", "any time; an evaluation that has begun is repeated, what it had is set aside")
STAGES = Rule("stages", "stages may be added, and taken away before they begin; those that have begun keep their order")
FIXED = Rule("fixed", "not after the first step of a stage that it concerns")


def _all(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_OPTIMIZATION = {
    **_all(ONWARD, "lr schedule warmup floor clip_norm skip_norm"),
    **_all(FREE, "micro_batch_tokens packing activation_checkpointing checkpoint_every keep_every keep_last"),
    **_all(FREE, "checkpoint_async"),
    **_all(ONWARD, "eval_every eval_on eval_limit keep_best patience"),
    **_all(LENGTH, "flops tokens"),
    **_all(FIXED, "betas eps weight_decay fault"),
}
RULES: Mapping[str, Mapping[str, Rule]] = {
    "": {**_all(FREE, "name description folder parallel"), "seed": FIXED, "stages": STAGES},
    "sharding": _all(FREE, "replicas reshard_after_forward sum_every_pass offload context"),
    "trackers": _all(FREE, "to project"),
    "model": {
        **_all(CONTENT, "path tokenizer"),
        **_all(FIXED, "gguf_file init config_overrides compute_dtype lora"),
        "trust_remote_code": FREE,
    },
    "data": {
        **_all(CONTENT, "source template"),
        **_all(FIXED, "split layout columns limit seed skip_bad template_variables system"),
        **_all(FIXED, "max_prompt_tokens max_response_tokens leave_out_cut weights pass_rate order"),
    },
    "sft": {
        **_OPTIMIZATION,
        **_all(FIXED, "data method options batch train_on held_out"),
        **_all(LENGTH, "epochs steps"),
        "held_out_every": FREE,
        "stop": ONWARD,
    },
    "rl": {
        **_OPTIMIZATION,
        **_all(FIXED, "data method options prompts rollouts mini_batch temperature top_p top_k max_tokens"),
        **_all(FIXED, "engine unknown importance_bound ahead partial reward_right_from"),
        **_all(FREE, "reward_seconds rollout_rows expected_tokens vllm"),
        "steps": LENGTH,
        "reward": CONTENT,
        **_all(FIXED, "rewards environment"),
    },
    "rl.environment": {
        "path": CONTENT,
        **_all(FIXED, "max_turns max_observation_tokens role score on_error"),
        **_all(FREE, "seconds processes expected_turns expected_observation_tokens"),
    },
    "eval": {
        **_all(REPEAT, "data splits temperatures samples top_p max_tokens reward reward_seconds reward_right_from"),
        "environment": REPEAT,
        **_all(FREE, "rollout_rows expected_tokens"),
    },
    "eval.environment": {
        **_all(REPEAT, "path max_turns max_observation_tokens role score on_error"),
        **_all(FREE, "seconds processes expected_turns expected_observation_tokens"),
    },
}
"""By table and field. ``data`` of a stage is judged field by field, with [data] laid under it."""


@dataclass(frozen=True)
class Change:
    """A setting that is not what it was.

    Args:
        field: its dotted name.
        before, now: its values.
        stage: whose it is; None: of the whole run.
        rule: what holds of it.
    """

    field: str
    before: Any
    now: Any
    stage: str | None
    rule: Rule

    def __str__(self) -> str:
        return f"{self.field} was {_shown(self.before)}, now {_shown(self.now)}"


@dataclass(frozen=True)
class Resumption:
    """What becomes of a run that is resumed.

    Args:
        changes: of its settings, all of them allowed.
        repeat: stages that are set aside and run again.
        extend: stages that were done and are continued from their last checkpoint.
    """

    changes: tuple[Change, ...] = ()
    repeat: tuple[str, ...] = ()
    extend: tuple[str, ...] = ()

    @property
    def again(self) -> frozenset[str]:
        """Stages that are run although they were done."""
        return frozenset((*self.repeat, *self.extend))


def rule_of(table: str, name: str) -> Rule:
    """The rule of a field of a table (``""``: of the top of the file)."""
    return RULES.get(table, {}).get(name, FIXED)


def differences(before: Recipe, now: Recipe) -> list[Change]:
    """Every setting that differs. [data] is looked at where a stage reads it."""
    found = [
        Change(name, getattr(before, name), getattr(now, name), None, rule_of("", name))
        for name in ("name", "description", "seed", "folder", "stages", "parallel")
        if getattr(before, name) != getattr(now, name)
    ]
    for table in ("model", "sharding", "trackers"):
        old, new = (getattr(recipe, table).model_dump() for recipe in (before, now))
        found += [
            Change(f"{table}.{name}", old[name], new[name], None, rule_of(table, name))
            for name in old
            if old[name] != new[name]
        ]
    for stage in before.stages:
        if stage in now.stages:
            found += _of_stage(before, now, stage)
    return found


def _of_stage(before: Recipe, now: Recipe, name: str) -> Iterable[Change]:
    old, new, kind = before.stage(name), now.stage(name), kind_of(name)
    past, present = old.model_dump(), new.model_dump()
    for field in type(old).model_fields:
        parts = [value for value in (past[field], present[field]) if isinstance(value, dict)]
        if f"{kind}.{field}" in RULES and len(parts) == 2:
            for part, value in parts[0].items():
                if value != parts[1][part]:
                    dotted, rule = f"{name}.{field}.{part}", rule_of(f"{kind}.{field}", part)
                    yield Change(dotted, value, parts[1][part], name, rule)
        elif field not in ("data", "splits") and past[field] != present[field]:
            yield Change(f"{name}.{field}", past[field], present[field], name, rule_of(kind, field))
    if isinstance(old, Eval) and isinstance(new, Eval):
        read, reads = (
            {split: recipe.stage_data(table).model_dump() for split, table in test_sets(stage).items()}
            for recipe, stage in ((before, old), (now, new))
        )
        if read != reads:
            split = next(s for s in (*read, *reads) if read.get(s) != reads.get(s))
            where = _first_difference(read.get(split), reads.get(split))
            field = f"{name}.{'data' if split in read and split in reads else 'splits'}{where[0]}"
            yield Change(field, where[1], where[2], name, rule_of("eval", "data"))
        return
    read, reads = before.stage_data(old.data).model_dump(), now.stage_data(new.data).model_dump()
    for field in Data.model_fields:
        if read[field] != reads[field]:
            yield Change(f"{name}.data.{field}", read[field], reads[field], name, rule_of("data", field))


def _first_difference(old: Any, new: Any) -> tuple[str, Any, Any]:
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in old if old[key] != new.get(key))
        return f".{key}", old[key], new.get(key)
    return "", old, new


def judge(
    before: Recipe,
    now: Recipe,
    states: Mapping[str, State],
    steps: Mapping[str, int],
    folder: Path,
    repeat: Iterable[str] = (),
) -> Resumption:
    """What follows from the changes of a recipe whose run has come so far.

    Args:
        before, now: the settings that the run has, and those that it is to be resumed with.
        states: of the stages that have begun.
        steps: that a stage's newest checkpoint has taken.
        folder: of the run, for the remedy.
        repeat: stages to be repeated.

    Raises:
        UserError: a setting that may not change; its old and new value are named.
    """
    begun: dict[str, State] = {name: state for name, state in states.items() if state != "new"}
    again = [name for name in now.stages if name in set(repeat)]
    extend: list[str] = []
    changes, refused = differences(before, now), []
    for change in changes:
        key, state = change.rule.key, begun.get(change.stage or "", "new")
        if key == "stages":
            if _reordered(before, now, begun):
                refused.append(change)
        elif key == "free" or (state == "new" if change.stage else not begun) or change.stage in again:
            continue
        elif key == "repeat":
            again.append(change.stage or "")
        elif key == "content":
            if not _are_files(change.before, change.now):
                refused.append(change)
        elif key == "length" and _grows(change, steps) and state in ("begun", "kept"):
            extend += [change.stage or ""] if state == "kept" else []
        elif not (key == "onward" and (state == "begun" or (state == "kept" and change.stage in _longer(changes)))):
            refused.append(change)
    if refused:
        raise _refusal(refused, begun, now, folder)
    again += [n for n in now.stages if n in begun and any(now.stages.index(n) > now.stages.index(e) for e in extend)]
    return Resumption(
        tuple(changes), tuple(n for n in now.stages if n in again and n not in extend), tuple(dict.fromkeys(extend))
    )


def _longer(changes: Iterable[Change]) -> set[str | None]:
    return {change.stage for change in changes if change.rule.key == "length"}


def _grows(change: Change, steps: Mapping[str, int]) -> bool:
    """Whether a longer stage is asked for, or a shorter one that has not come to its new end yet."""
    if change.field.endswith(".steps"):
        return change.now is None or change.now >= steps.get(change.stage or "", 0)
    return change.now is None or change.before is None or change.now > change.before


def _reordered(before: Recipe, now: Recipe, begun: Mapping[str, State]) -> bool:
    """Whether a stage that has begun is gone, or starts from another stage's model than it did."""

    def start(recipe: Recipe, name: str) -> list[str]:
        return [n for n in recipe.stages[: recipe.stages.index(name)] if kind_of(n) != "eval"]

    return any(n not in now.stages or start(before, n) != start(now, n) for n in begun if n in before.stages)


def _are_files(before: Any, now: Any) -> bool:
    """Whether both are names of files or folders, whose content is compared when the run is resumed."""

    def named(value: Any) -> list[tuple[str, str]]:
        names = [str(name) for name in (value if isinstance(value, list) else [value])]
        # a reward function of a file is known by its name in the file too
        return [(n.rpartition(":")[0], n.rpartition(":")[2]) if ".py:" in n else (n, "") for n in names]

    old, new = named(before), named(now)
    return len(old) == len(new) and all(
        a == b or (a[1] == b[1] and Path(b[0]).expanduser().exists() and _like_a_path(a[0]))
        for a, b in zip(old, new, strict=True)
    )


def _like_a_path(name: str) -> bool:
    return not name.startswith(("world:", "package:")) and ("/" in name or "." in name or Path(name).exists())


def _refusal(refused: list[Change], begun: Mapping[str, State], now: Recipe, folder: Path) -> UserError:
    first = refused[0]
    others = "".join(f"; {change}" for change in refused[1:])
    done = [c.stage for c in refused if c.stage and begun.get(c.stage) in ("done", "kept")]
    onward = [c for c in refused if c.rule.key in ("onward", "length") and c.stage in done]
    why = f"{first}{others}; what may change: {first.rule.says}"
    back = "give the value that it had to resume this run" + (f" ({_flag(first)})" if _flag(first) else "")
    if len(onward) == len(refused):
        stage = onward[0].stage or ""
        left = now.stages[now.stages.index(stage) :]
        why = f"{first}{others}; stage {stage} is done, and the state of its optimizer "
        why += "is not kept" if begun[stage] == "done" else "is kept for more steps alone"
        model = folder / "stages" / stage / "model"
        listed = ", ".join(f'"{name}"' for name in left)
        back = (
            f"to train its model further, start a new run from it: --folder ANOTHER --model.path {model} "
            f"--stages '[{listed}]' (a fresh optimizer and schedule); or {back}"
        )
    return UserError(
        f"{folder} holds a run with other settings: {why}",
        remedy=f"{back}, or another --folder for a run with the new one; `thence run --fields` lists what may change",
        field=first.field,
    )


def _flag(change: Change) -> str:
    value = change.before
    if isinstance(value, bool):
        return f"--{change.field} {str(value).lower()}"
    return f"--{change.field} {value}" if isinstance(value, (int, float)) else ""


def _shown(value: Any) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def say_onward(change: Change, now: Recipe) -> str:
    """What a change of a resumed stage means for its numbers, for the log and the history."""
    stage = now.stage(change.stage) if change.stage in now.stages and change.stage else None
    if change.rule.key == "length" and isinstance(stage, Optimization):
        if stage.schedule != "constant" or stage.warmup:
            return "the learning rates of the steps to come follow from the new length; those taken stand"
        return "the steps taken stand"
    return change.rule.says


def describe_rules() -> str:
    """The rules as text, for the command line."""
    lines = ["what may change when a run is resumed (a stage that has not begun takes any settings)"]
    for rule in (FREE, ONWARD, LENGTH, CONTENT, REPEAT, STAGES, FIXED):
        names = [
            f"--{table}.{name}".replace("_", "-") if table else f"--{name}"
            for table, fields in RULES.items()
            for name, own in fields.items()
            if own is rule
        ]
        lines += [f"\n  {rule.says}:", *_wrapped(names)]
    return "\n".join(lines)


def _wrapped(names: list[str]) -> list[str]:
    import textwrap

    return textwrap.wrap(" ".join(names), 110, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
