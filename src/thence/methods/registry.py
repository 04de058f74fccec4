"""Finding methods by name: thence's own, and those that other packages register."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from thence.errors import RecipeError, UserError
from thence.methods.asft import Asft
from thence.methods.base import Method
from thence.methods.bread import Bread
from thence.methods.chord import ChordMu, ChordPhi
from thence.methods.cispo import Cispo
from thence.methods.dapo import Dapo
from thence.methods.dft import Dft
from thence.methods.dppo import Dppo, Ipo
from thence.methods.dr_grpo import DrGrpo
from thence.methods.exgrpo import ExGrpo
from thence.methods.gift import Gift
from thence.methods.grpo import Grpo
from thence.methods.gspo import Gspo
from thence.methods.hpt import Hpt
from thence.methods.luffy import Luffy
from thence.methods.mixed_policy import MixedPolicy
from thence.methods.on_policy import OnPolicy
from thence.methods.prefix_rft import PrefixRft
from thence.methods.red import Red
from thence.methods.relift import Relift
from thence.methods.rl_sft_loss import RlSftLoss
from thence.methods.sasr import Sasr
from thence.methods.self_distillation import Sdft, Sdpo
from thence.methods.sft import SftMethod
from thence.methods.srft import Srft
from thence.methods.superrl import SuperRl
from thence.methods.trapo import Trapo
from thence.methods.uft import Uft
from thence.recipe import Rl, Sft, kind_of

OWN: tuple[type[Method], ...] = (
    SftMethod, Dft, Asft, Gift,
    Grpo, DrGrpo, Dapo, Gspo,
    Cispo, Dppo, Ipo,
    OnPolicy, RlSftLoss, MixedPolicy, Luffy, Relift, Srft, PrefixRft, Hpt,
    ChordMu, ChordPhi, Uft, SuperRl, Sasr, ExGrpo, Red, Bread,
    Trapo, Sdft, Sdpo,
)  # fmt: skip
ENTRY_POINT_GROUP = "thence.methods"


def methods() -> dict[str, type[Method]]:
    """Every method by name; an installed package adds its own under the entry point group ``thence.methods``.

    Raises:
        UserError: two methods have one name; or see :func:`checked_method`.
    """
    found = {method.name: method for method in OWN}
    others: dict[str, EntryPoint] = {}
    for entry in _registered(entry_points, tuple(map(_changed, sys.path))):
        if entry.name in found:
            raise _one_name(entry, others.get(entry.name))
        found[entry.name] = checked_method(entry.name, entry.load())
        others[entry.name] = entry
    return found


@lru_cache(maxsize=8)
def _registered(find: Callable[..., Iterable[EntryPoint]], path: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    """Entry points of the packages in folders, each with the time of its last change: installing one changes it.

    Finding them reads a file of every installed package, some 40 ms each time.
    """
    return tuple(find(group=ENTRY_POINT_GROUP))


def _changed(folder: str) -> tuple[str, int]:
    try:
        return folder, Path(folder).stat().st_mtime_ns
    except OSError:
        return folder, 0


def _one_name(entry: EntryPoint, other: EntryPoint | None) -> UserError:
    """The refusal of an entry point with the name of another one, or of a method of thence (None)."""
    whose = "one of thence's own" if other is None else f"{other.value} of {_package(other)}"
    change = f"rename the entry point in {_package(entry)}, or uninstall that package"
    return UserError(
        f"two methods are called {entry.name!r}: {entry.value} of {_package(entry)}, and {whose}",
        remedy=change if other is None else f"{change} or {_package(other)}",
    )


def _package(entry: EntryPoint) -> str:
    return f"the package {entry.dist.name}" if entry.dist is not None else "an installed package"


def checked_method(name: str, method: Any) -> type[Method]:
    """A method of another package, if it says what it is.

    Raises:
        UserError: it is no :class:`Method`, or does not state its exactness in its own class.
    """
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise UserError(
            f"the entry point {name!r} of an installed package is not a method",
            remedy="let it name a subclass of thence.methods.base.Method, or uninstall the package",
        )
    if vars(method).get("exactness") not in ("exact", "reconstruction"):
        raise UserError(
            f"method {name!r} of an installed package does not state its exactness ({method.__module__}."
            f"{method.__qualname__})",
            remedy='add exactness = "exact" to its class if formula and mechanics are all public, else '
            'exactness = "reconstruction"; or uninstall the package',
        )
    return method


def stage_method(stage: Sft | Rl, where: str, max_tokens: int | None = None) -> Method:
    """The method of a stage, made ready for the stage's settings.

    Args:
        where: the stage's name, for errors.
        max_tokens: the longest response where the model's context cuts it; default: the stage's.

    Raises:
        RecipeError: as :func:`make_method`, or settings with which the method would learn nothing.
    """
    method = make_method(stage.method, stage.options, kind_of(where), where)
    if isinstance(stage, Rl):
        check_turns(stage, method, where)
        try:
            method.prepare(stage.rollouts, max_tokens or stage.max_tokens)
        except RecipeError as error:
            raise RecipeError(error.problem, remedy=error.remedy, field=f"{where}.{error.field}") from None
    return method


def check_turns(stage: Rl, method: Method, where: str) -> None:
    """Refuse an environment to a method that cannot train several turns. Raises RecipeError."""
    if stage.environment is None:
        return
    why = method.single_turn
    if not why and method.teacher is not None:
        why = "its teacher reads a response behind another prompt, without what an environment said between"
    if why:
        raise RecipeError(
            f"{method.name} cannot train rollouts of several turns: {why}",
            remedy="take a method of rewards, such as grpo, or leave the environment out",
            field=f"{where}.environment",
        )


def make_method(name: str, options: Mapping[str, Any], stage: str, where: str = "") -> Method:
    """The method of a recipe.

    Args:
        stage: kind of the stage, sft or rl.
        where: name of the stage, for errors; default: its kind.

    Raises:
        RecipeError: an unknown method, one for another kind of stage, or an option that it does not have.
    """
    known, where = methods(), where or stage
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise RecipeError(
            f"unknown method {name!r}",
            remedy=f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(known)}",
            field=f"{where}.method",
        )
    if known[name].stage != stage:
        raise RecipeError(
            f"method {name!r} belongs into a stage of kind {known[name].stage}",
            remedy=f"use one of {', '.join(n for n, m in known.items() if m.stage == stage)}",
            field=f"{where}.method",
        )
    try:
        return known[name](options)
    except RecipeError as error:
        raise RecipeError(error.problem, remedy=error.remedy, field=f"{where}.{error.field}") from None
