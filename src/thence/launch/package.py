"""The package ray, which is installed on request."""

from __future__ import annotations

from typing import Any

from thence.errors import UserError


def ray_module() -> Any:
    """The package. Raises UserError where it is not installed."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "the package ray is not installed", remedy='install it: pip install "thence[ray]"', field="--on"
        ) from None
    return ray


def raised_there(ray: Any, error: BaseException) -> BaseException | None:
    """What code of thence raised on a node, where an error of Ray says so; None: the node or the process is gone."""
    return getattr(error, "cause", None) or error if isinstance(error, ray.exceptions.RayTaskError) else None
