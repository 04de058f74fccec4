"""``thence completion``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from thence.cli.app import WITH_FIELDS, make_app
from thence.cli.fields import field_flags
from thence.errors import UserError

# In the order of cyclopts' own: Python keeps one of two optional types that differ in the order of choices alone.
Shell = Literal["zsh", "bash", "fish", "powershell"]


def completion_command(shell: Shell | None = None, /, *, install: bool = False) -> int:
    """Print the completion of commands, flags and values for your shell, or install it.

    Examples:

      thence completion --install
      thence completion bash > ~/.local/share/bash-completion/completions/thence

    Args:
        shell: Your shell. Default: the one that runs.
        install: Write it where the shell looks for it, and name it in the shell's startup file.
    """
    from cyclopts.completion import ShellDetectionError

    app = _with_fields(make_app())
    try:
        if install:
            print(f"installed: {app.install_completion(shell=shell)}; open a new shell to use it")
        else:
            print(app.generate_completion(shell=shell))
    except ShellDetectionError:
        raise UserError("your shell is not known", remedy="name it, for example: thence completion bash") from None
    return 0


def _with_fields(app: App) -> App:
    """The app, with the fields of a recipe among the flags of the commands that take them."""
    fields = [
        inspect.Parameter(
            f"field_{place}",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[str | None, Parameter(name=flag)],
        )
        for place, flag in enumerate(field_flags())
    ]
    for name in WITH_FIELDS:
        app[name].default_command = _taking(app[name].default_command, fields)
    return app


def _taking(command: Callable[..., Any] | None, more: list[inspect.Parameter]) -> Callable[..., Any]:
    """A function with the parameters of a command and some more."""
    assert command is not None
    signature = inspect.signature(command, eval_str=True)

    def taking(*_: Any, **__: Any) -> None: ...

    known = [parameter for parameter in signature.parameters.values() if parameter.name != "overrides"]
    taking.__signature__ = signature.replace(parameters=[*known, *more])  # type: ignore[attr-defined]
    taking.__doc__ = command.__doc__
    return taking
