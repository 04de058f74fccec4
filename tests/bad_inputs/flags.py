"""Command lines: flags forgotten, doubled, empty, unknown, with the wrong dashes or a value that makes no sense."""

from __future__ import annotations

from pathlib import Path
from random import Random

from thence.toml import to_toml

from .ground import Ground, evaluation_of
from .harness import Case
from .recipes import fields

DASHES = "‐‑‒–—―−"
NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "1e300",
    "true",
    "",
    " ",
    "x",
    "[1]",
    "{}",
    "0xzz",
    "١",
    "1__0",
    "9" * 400,
    "\udc80",
)
FLAGS: dict[str, tuple[list[str], list[str], list[str]]] = {
    # numbers, texts, switches
    "eval": (
        ["--limit", "--samples", "--temperature", "--top-p", "--max-tokens", "--seed", "--rows", "--timeout"],
        ["--folder", "--tasks", "--grader", "--template", "--suite", "--set"],
        [],
    ),
    "compare": (["--jobs", "--threads", "--seeds"], ["--only", "--bases", "--folder"], ["--dry-run"]),
    "sample": (["--n"], ["--verdict", "--task", "--problem", "--grader"], []),
    "report": ([], [], []),
    "audit": (["--seed", "--time-limit", "--lr"], ["--python", "--only", "--json", "--html"], ["--quick", "--all"]),
}
for _command in ("run", "check"):
    _of_recipe = [f"--{table}.{name}".replace("--.", "--").replace("_", "-") for table, name, _ in fields()]
    FLAGS[_command] = (
        ["--sft.lr", "--sft.steps", "--rl.steps", "--rl.temperature", "--data.limit", "--seed", "--eval.top-p"],
        [name for name in _of_recipe if not name.endswith(("skip-bad", "code", "packing", "checkpointing"))],
        [],
    )
WAYS = ("forgotten", "doubled", "empty", "unknown", "dash", "one dash", "number", "extra", "surrogate")


def bad_flags(ground: Ground, folder: Path, rng: Random) -> Case:
    """A command that works, with one flag that is wrong."""
    command = rng.choice(list(FLAGS))
    numbers, texts, switches = FLAGS[command]
    known = numbers + texts
    base, way = _base(command, ground, folder), rng.choice(WAYS)
    base = [one for one in base if one not in switches or command == "compare"]
    if not known or way in ("unknown", "dash", "one dash", "extra"):
        name = rng.choice([*known, *switches, "--report"])
        wrong = {
            "dash": [rng.choice(DASHES) * rng.randint(1, 2) + name.lstrip("-"), "1"],
            "one dash": [name[1:], "1"],
            "extra": [rng.choice(["", " ", "a b", "\x1b[2J", "zzz", "--", "---", "-"])],
        }.get(way, [f"--zz{rng.randint(0, 9)}{name[2:]}", "1"])
    elif way == "number" and numbers:
        name = rng.choice(numbers)
        base = _without(base, name)
        wrong = [f"{name}={rng.choice(NUMBERS)}"]
    elif way == "forgotten":
        name = rng.choice(known)
        base, wrong = _without(base, name), [name]
    elif way == "doubled":
        name = rng.choice(numbers or texts)
        base, wrong = _without(base, name), [name, "1", name, "1"]
    elif way == "surrogate":
        base, wrong = [*base], ["\udcff\ud800"]
    else:
        name = rng.choice(numbers or texts)
        base, wrong = _without(base, name), [f"{name}="]
    at = rng.choice([1, len(base)]) if way in ("unknown", "dash", "one dash") else len(base)
    return Case([*base[:at], *wrong, *base[at:]], f"{command}: {way}: {wrong}", True)


def _base(command: str, ground: Ground, folder: Path) -> list[str]:
    if command == "run":
        (folder / "recipe.toml").write_text(to_toml({**ground.tables, "folder": str(folder / "run")}))
        return ["run", "recipe.toml", "--dry-run"]
    if command == "eval":
        return evaluation_of(ground.folder, folder / "eval")
    if command == "compare":
        (folder / "comparison.toml").write_text(to_toml({**ground.comparison, "folder": str(folder / "comparison")}))
        return ["compare", "comparison.toml", "--dry-run"]
    return {
        "check": ["check", str(ground.path("tokenizer"))],
        "sample": ["sample", str(ground.path("eval"))],
        "report": ["report", str(ground.path("run"))],
        "audit": ["audit", "list"],
    }[command]


def _without(argv: list[str], name: str) -> list[str]:
    """The command without a flag and its value."""
    if name not in argv:
        return argv
    at = argv.index(name)
    return argv[:at] + argv[at + 2 :]
