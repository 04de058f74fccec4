"""``thence methods``."""

from __future__ import annotations

import inspect
import sys
from typing import Annotated

from cyclopts import Parameter

from thence.errors import UserError
from thence.methods.registry import methods


def methods_command(name: Annotated[str | None, Parameter(completer=lambda _: [*methods()])] = None, /) -> int:
    """List the training methods, or explain one.

    Examples:

      thence methods
      thence methods dapo

    Args:
        name: The method to explain.
    """
    known = methods()
    if name is None:
        for name, method in known.items():
            print(f"{name:<14} {method.stage:<4} {method.exactness:<15} {method.formula}\n{'':<34} {method.source}")
        return 0
    if name not in known:
        raise UserError(f"unknown method {name!r}", remedy=f"use one of {', '.join(known)}")
    method = known[name]
    print(inspect.cleandoc(sys.modules[method.__module__].__doc__ or ""))
    print(f"\nsource: {method.source}\nexactness: {method.exactness}\n\noptions:")
    for name, field in method.Options.model_fields.items():
        print(f"  {name:<18} {field.default!r:<14} {' '.join((field.description or '').split())}")
    return 0
