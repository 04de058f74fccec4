"""thence's own files: one file of a finished run, evaluation or comparison damaged, removed or replaced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

from thence.toml import to_toml

from .damage import damaged
from .ground import Ground, evaluation_of
from .harness import Case


def bad_run(ground: Ground, folder: Path, rng: Random) -> Case:
    """A file of a finished run."""
    copy = folder / "run"
    shutil.copytree(ground.path("run"), copy)
    (folder / "recipe.toml").write_text(to_toml({**ground.tables, "folder": str(copy)}))
    file, how = _harm(copy, rng)
    command = rng.choice(["run", "run", "more", "report", "sample", "eval"])
    argv = {
        "run": ["run", "recipe.toml"],
        "more": ["run", "recipe.toml", "--rl.steps", "2"],
        "report": ["report", "run"],
        "sample": ["sample", "run"],
        "eval": ["eval", "run:sft", *evaluation_of(ground.folder, folder / "eval")[2:]],
    }[command]
    trusted = file.startswith("stages/sft/model/") and file.endswith(("model.safetensors", "config.json"))
    nonsense = command == "eval" and trusted
    return Case(argv, f"{command}: run/{file}: {how}", nonsense)


def bad_evaluation(ground: Ground, folder: Path, rng: Random) -> Case:
    """A file of a finished evaluation."""
    copy = folder / "eval"
    shutil.copytree(ground.path("eval"), copy)
    file, how = _harm(copy, rng)
    argv = rng.choice(
        [
            evaluation_of(ground.folder, copy),
            ["eval", "--regrade", "eval"],
            ["eval", "--compare", "eval", str(ground.path("eval"))],
            ["sample", "eval"],
        ]
    )
    return Case(argv, f"{' '.join(argv[:2])[:20]}: eval/{file}: {how}", False)


def bad_comparison(ground: Ground, folder: Path, rng: Random) -> Case:
    """A file of a finished comparison; its report is written again."""
    copy = folder / "comparison"
    shutil.copytree(ground.path("comparison"), copy)
    (folder / "comparison.toml").write_text(to_toml({**ground.comparison, "folder": str(copy)}))
    file, how = _harm(copy, rng)
    nonsense = file == "results.json" and (copy / file).exists() and not _is_json(copy / file)
    return Case(["compare", "comparison.toml", "--report"], f"comparison/{file}: {how}", nonsense)


def _harm(folder: Path, rng: Random) -> tuple[str, str]:
    """Damage one file of a folder; small ones that carry state as often as all others. Returns its name and how."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    read = [path for path in files if path.suffix in (".json", ".jsonl", ".toml", ".safetensors")]
    path = rng.choice(read if rng.random() < 0.9 else files)
    name, way = str(path.relative_to(folder)), rng.random()
    if way < 0.08:
        path.unlink()
        return name, "removed"
    if way < 0.13:
        path.unlink()
        path.mkdir()
        return name, "a folder instead"
    if way < 0.2:
        other = rng.choice([one for one in files if one != path])
        shutil.copyfile(other, path)
        return name, f"replaced by {other.relative_to(folder)}"
    how, left = damaged(path.read_bytes(), rng)
    path.write_bytes(left)
    return name, how


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True
