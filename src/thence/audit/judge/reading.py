"""What the gradient of a step is read from: the update, its signs alone, or what the optimizer was given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from thence.audit.judge.evidence import Evidence, NotJudged, OptimizerStep
from thence.audit.judge.forms import form_of
from thence.audit.judge.weights import FLOORS
from thence.audit.result import Case
from thence.audit.solve.recover import LeastSquares, gradient_of_update, rounding_noise, spacing_of
from thence.audit.solve.signs import FLOOR as SIGN_FLOOR
from thence.audit.solve.signs import SHORT, WRONG, SignRegression, looks_like_signs, step_size, wrong_share

RESIDUALS = {"float32": 1e-4, "bfloat16": 8e-2, "autocast": 8e-2}
"""Residuals that arithmetic alone may leave, by precision; rounding of the stored parameters comes on top."""
DROWNED = 0.3
"""An update whose rounding noise is a larger share than this cannot be judged."""

Source = Literal["update", "signs", "gradient"]
Makes = Literal["multiple", "signs", "sizes", "other"]


@dataclass(frozen=True)
class Reading:
    """A gradient up to a factor, or its signs, and how exactly it is known.

    Args:
        source: what it was read from.
        gradient: shape (coordinates,); of ``signs`` -1, 1, and 0 where the change says nothing.
        regression: what finds its weights.
        floor: relative error of weights that does not come from the residual.
        tolerance: largest residual of a fit.
        relation: of the update to the gradient that the optimizer was given; None: nobody saw it.
    """

    source: Source
    gradient: np.ndarray
    regression: type[LeastSquares] | type[SignRegression]
    floor: float
    tolerance: float
    relation: Relation | None = None


@dataclass(frozen=True)
class Relation:
    """What the optimizer made of the gradient that it was given.

    Args:
        makes: ``multiple``: the update is the gradient times a number, and the parameters times one; ``signs``: steps
            of one size with the gradient's signs; ``sizes``: the signs are the gradient's, the sizes its own;
            ``other``: nothing of these.
        decay: factor of the parameters over that of the gradient, of ``multiple``.
        down: False where the update goes against the descent of this gradient.
    """

    makes: Makes
    decay: float = 0.0
    down: bool = True


def of_signs(change: np.ndarray, spacing: np.ndarray, precision: str) -> Reading:
    """The signs of an update whose steps are all of one size."""
    used = np.where(np.abs(change) > SHORT * step_size(change, spacing), np.sign(change), 0.0)
    return Reading("signs", used, SignRegression, SIGN_FLOOR, WRONG[precision])


def of_any_signs(change: np.ndarray, precision: str) -> Reading:
    """The signs of an update whose sizes say nothing; what moved least may have been moved by rounding or decay."""
    size = np.sqrt((change**2).mean())
    signs = np.where(np.abs(change) > 1e-2 * size, np.sign(change), 0.0)
    return Reading("signs", signs, SignRegression, SIGN_FLOOR, WRONG[precision])


def of_gradient(gradient: np.ndarray, relation: Relation, precision: str) -> Reading:
    """The gradient that the optimizer was given."""
    gradient = gradient if relation.down else -gradient
    return Reading("gradient", gradient, LeastSquares, FLOORS[precision], RESIDUALS[precision], relation)


def relate(gradient: np.ndarray, before: np.ndarray, after: np.ndarray, bits: int, precision: str) -> Relation:
    """What an optimizer made of a gradient.

    Args:
        gradient, before, after: shape (coordinates,).
        bits: mantissa of the stored parameters.
    """
    change, spacing, noise = before - after, spacing_of(after, bits), rounding_noise(before, after, bits)
    columns = np.stack([gradient, before], axis=1)
    scale = np.linalg.norm(columns, axis=0)
    scale[scale == 0] = 1.0
    factors = np.linalg.lstsq(columns / scale, change, rcond=None)[0] / scale
    rest = np.linalg.norm(change - columns @ factors) / np.linalg.norm(change)
    if rest <= max(RESIDUALS[precision], 4 * noise) and factors[0]:
        decays = abs(factors[1]) * scale[1] > 10 * max(RESIDUALS[precision], noise) * np.linalg.norm(change)
        return Relation("multiple", factors[1] / factors[0] if decays else 0.0, bool(factors[0] > 0))
    if looks_like_signs(change, spacing):
        turned = wrong_share(gradient, of_signs(change, spacing, precision).gradient, precision)
        if min(turned, 1 - turned) <= WRONG[precision]:
            return Relation("signs", down=turned < 0.5)
    turned = wrong_share(gradient, of_any_signs(change, precision).gradient, precision)
    if min(turned, 1 - turned) <= WRONG[precision]:
        return Relation("sizes", down=turned < 0.5)
    return Relation("other", down=bool(gradient @ change >= 0))


def read_step(
    case: Case,
    evidence: Evidence,
    step: int,
    flat: tuple[np.ndarray, np.ndarray],
    bits: int,
    precision: str,
    seen: np.ndarray | None,
) -> Reading:
    """What the gradient of a step is read from first.

    Args:
        flat: parameters before and after the step, each of shape (coordinates,).
        bits: mantissa of the stored parameters.
        seen: the gradient that the optimizer was given, shape (coordinates,); None: nobody saw it.

    Raises:
        NotJudged: the step holds several, is a later one of Adam, or drowns in rounding.
    """
    before, after = flat
    unknown = case.optimizer == "unknown"
    if evidence.seen is not None and evidence.seen.calls > 1:
        raise NotJudged(
            f"the optimizer ({evidence.seen.name}) was called {evidence.seen.calls} times in one step; only a step "
            "with one call for all its rows can be judged"
        )
    if unknown and seen is not None:
        return of_gradient(seen, relate(seen, before, after, bits, precision), precision)
    spacing = spacing_of(after, bits)
    # A step in which every token is clipped moves nothing, and nothing is lost in rounding.
    noise = rounding_noise(before, after, bits) if np.any(before - after) else 0.0
    if unknown and noise and looks_like_signs(before - after, spacing):
        if step > 1:
            raise NotJudged("of Adam as it is, only the first step can be judged")
        return of_signs(before - after, spacing, precision)
    if noise > DROWNED:
        raise NotJudged(f"the update drowns in the rounding of the parameters ({noise:.0%}); raise the learning rate")
    lr = case.lr if evidence.lr is None else evidence.lr
    gradient = gradient_of_update(before, after, case.optimizer, lr, case.eps)
    return Reading("update", gradient, LeastSquares, FLOORS[precision], max(RESIDUALS[precision], 4 * noise))


def unverified(reading: Reading, seen: OptimizerStep | None) -> tuple[str, ...]:
    """What was not verified of an optimizer, a line each."""
    if reading.source == "signs":
        return ("the sizes of the update: its signs alone were looked at, since Adam and its kin choose the sizes",)
    if reading.relation is None or seen is None or reading.relation.makes == "multiple":
        return ()
    what = {
        "signs": "of its first update the signs are those of the gradient, and the sizes were not looked at",
        "sizes": "its update has the signs of the gradient, and the sizes were not looked at",
    }.get(reading.relation.makes, "its own arithmetic was not looked at")
    return (
        f"what the optimizer ({seen.name}) makes of the gradient: the weights are those of the gradients that it was "
        f"given, and nothing else moved the parameters; {what}",
    )


def what_made_it(case: Case, evidence: Evidence, reading: Reading) -> str:
    """What is known of an update that nothing explains: the optimizer's class, or the form of the update."""
    if evidence.seen is not None:
        alone = "" if evidence.seen.alone else ", and parameters move outside of its step as well"
        return f"the optimizer is {evidence.seen.name}{alone}"
    blind = case.optimizer == "unknown" and reading.source == "update"
    return form_of(evidence.states[0], evidence.states[1]) if blind else ""
