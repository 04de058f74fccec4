"""Public functions that raise an error which their docstring does not announce.

    python tools/undocumented_raises.py [FOLDER]

Prints a line for each, and exits with 1 if there is any. A function is public if neither it nor its class begins with
an underscore. It counts if it raises a class by name and does not catch it itself; what it calls is not followed. The
docstring has to say "Raise" or "Raises", and the name of the class or, of thence's errors, one of its bases. A method
without a docstring has that of the method that it overrides. The docstring of a command (`cli/`, `..._command`) is its
help page, so commands are left out.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Function = ast.FunctionDef | ast.AsyncFunctionDef


def error_classes(file: Path) -> dict[str, set[str]]:
    """The classes of a module, each with the names that may announce it: its own and its bases'."""
    found: dict[str, set[str]] = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef):
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            found[node.name] = {node.name}.union(*(found.get(base, set()) for base in bases))
    return found


def public_functions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Public functions and methods with their dotted names; not those inside functions."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, f"{node.name}.")
        elif isinstance(node, Function) and not node.name.startswith("_"):
            yield prefix + node.name, node


def raised(node: ast.AST) -> set[str]:
    """Names of the classes that the code below a node raises and does not catch."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call) and isinstance(child.exc.func, ast.Name):
            found |= {child.exc.func.id} if child.exc.func.id[0].isupper() else set()
        elif isinstance(child, ast.Try):
            tried = set().union(*map(raised, [ast.Module(child.body, [])]))
            handled = {
                name.id for h in child.handlers if h.type for name in ast.walk(h.type) if isinstance(name, ast.Name)
            }
            found |= set() if handled & {"Exception", "BaseException"} and not _passes_on(child) else tried - handled
            found |= set().union(*map(raised, [*child.handlers, ast.Module([*child.orelse, *child.finalbody], [])]))
        else:
            found |= raised(child)
    return found


def _passes_on(node: ast.Try) -> bool:
    """Whether a handler raises again what it caught."""
    return any(isinstance(n, ast.Raise) and n.exc is None for handler in node.handlers for n in ast.walk(handler))


def undocumented(folder: Path) -> list[str]:
    """One line for each error that a public function raises and its docstring does not announce."""
    errors = error_classes(folder / "errors.py") if (folder / "errors.py").exists() else {}
    found = []
    for file in sorted(folder.rglob("*.py")):
        for name, function in public_functions(ast.parse(file.read_text()).body):
            text = ast.get_docstring(function)
            if file.parent.name == "cli" and name.endswith("_command"):
                continue
            for error in sorted(raised(function)) if text or "." not in name else ():
                announced = re.search(r"\bRaises?\b", text or "")
                if not announced or not any(known in (text or "") for known in errors.get(error, {error})):
                    found.append(f"{file.relative_to(folder)}:{function.lineno}: {name} raises {error}")
    return found


if __name__ == "__main__":
    lines = undocumented(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "src" / "thence")
    print("\n".join(lines) or "every public function announces the errors that it raises")
    sys.exit(bool(lines))
