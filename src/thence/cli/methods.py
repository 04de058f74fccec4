"""``thence methods``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence

from thence.cli.arguments import only, take_apart
from thence.errors import UserError
from thence.methods.registry import methods


def methods_command(argv: Sequence[str]) -> int:
    """List the methods, or explain one."""
    found = take_apart(argv, {})
    if found.help:
        print("thence methods [NAME]\n\nList the training methods, or explain one.")
        return 0
    known = methods()
    if not found.positional:
        for name, method in known.items():
            print(f"{name:<14} {method.stage:<4} {method.exactness:<15} {method.formula}\n{'':<34} {method.source}")
        return 0
    name = only(found.positional, "thence methods explains one method", "`thence methods` lists them")
    if name not in known:
        raise UserError(f"unknown method {name!r}", remedy=f"use one of {', '.join(known)}")
    method = known[name]
    print(inspect.cleandoc(sys.modules[method.__module__].__doc__ or ""))
    print(f"\nsource: {method.source}\nexactness: {method.exactness}\n\noptions:")
    for name, field in method.Options.model_fields.items():
        print(f"  {name:<18} {field.default!r:<14} {' '.join((field.description or '').split())}")
    return 0
