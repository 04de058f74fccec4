"""Models, run folders, checkpoints, evaluations and comparisons that are damaged, foreign or in use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import thence.pipeline.folder as folders
from thence.compare.design import Registrar
from thence.compare.folder import mark
from thence.compare.plan import Planner
from thence.compare.recipe import load_comparison
from thence.locks import held

from .case import Case, added, cut, edit, flipped, marked, remove, swap, write

RUN = "run short.toml"
MODEL = "run/stages/sft/model"
COMPARE = "compare c.toml --folder c --dry-run"
PATH = 'path = "world:chain/rich"'
CHECKPOINT = "run/stages/sft/checkpoints/*"
EVAL = f"eval {MODEL} --suite sums.jsonl --grader exact --max-tokens 8 --samples 2 --folder e"
CONTRAST = """
[[contrasts]]
name = "rl-first"
arm = "rl"
other = "sft"
expect = "higher"
"""


def not_a_number(here: Path) -> None:
    """One weight of the model is NaN, and the model is nobody's: it has no manifest."""
    (here / MODEL).rename(here / "m")
    (here / "m" / "manifest.json").unlink()
    weights = load_file(here / "m" / "model.safetensors")
    weights[sorted(weights)[0]].view(-1)[0] = torch.nan
    save_file(weights, here / "m" / "model.safetensors", {"format": "pt"})


def other_architecture(here: Path) -> None:
    (here / "m").mkdir()
    (here / "m" / "config.json").write_text(json.dumps({"model_type": "gpt9"}))


@contextmanager
def in_use(here: Path) -> Iterator[None]:
    """Another writer holds the run; nobody waits for it."""
    before, folders.LOCK_SECONDS = folders.LOCK_SECONDS, 0.0
    try:
        with held(here / "run", "runs this recipe"):
            yield
    finally:
        folders.LOCK_SECONDS = before


def marked_early(content: bytes) -> bytes:
    """A mark of an unresolved merge in the second line; where the middle is depends on the machine."""
    return content.replace(b"\n", b"\n<<<<<<< HEAD\n", 1)


MODELS = [
    Case("A model that is not there", "check mdoel", code=1),
    Case("A package without a model", "check package:no.such", code=1),
    Case("A world that is not there", "check world:chian/rich", code=1),
    Case("An empty folder in place of a model", "check m", lambda here: (here / "m").mkdir(), code=1),
    Case("An architecture that transformers lacks", "check m", other_architecture, code=1),
    Case(
        "A model with NaN in its weights",
        "eval m --suite sums.jsonl --grader exact",
        not_a_number,
        base="evaluation",
        writes=True,
    ),
    Case("A GGUF file that is none", "check m.gguf", write("m.gguf", "GGML"), code=1),
    Case("Weights cut in half", "check run", edit(f"{MODEL}/model.safetensors", cut), code=1, base="run"),
    Case(
        "One bit of a model's weights flipped",
        f"check {MODEL}",
        edit(f"{MODEL}/model.safetensors", flipped),
        code=1,
        base="run",
    ),
    Case("A tokenizer that is gone", f"check {MODEL}", remove(f"{MODEL}/tokenizer.json"), code=1, base="run"),
]

RUNS = [
    Case(
        "A run folder with other things in it",
        "run short.toml --folder p",
        write("p/thesis.txt", "my thesis"),
        base="data",
    ),
    Case("Beginning anew where other things lie", f"{RUN} --restart", write("run/thesis.txt", "my thesis"), base="run"),
    Case("A run that another process writes", RUN, base="begun", around=in_use),
    Case("Another batch on resume", f"{RUN} --sft.batch 2", base="begun"),
    Case("Fewer steps than were taken", f"{RUN} --sft.steps 1", base="run"),
    Case("A stage left out that has begun", f"{RUN} --stages eval", base="run"),
    Case("Other data under the same name", RUN, swap("train.jsonl", "3+3", "3-3"), base="begun"),
    Case("Samples of a folder that is no run", "sample ."),
    Case("A report of a folder that is not there", "report rnu"),
]

OWN_FILES = [
    Case("A merge mark in a run's recipe", RUN, edit("run/recipe.toml", marked), base="begun"),
    Case("A merge mark in a run's environment", RUN, edit("run/environment.json", marked_early), base="begun"),
    Case("A stage's record that is a number", RUN, write("run/stages/sft/done.json", "3"), base="run"),
    Case(
        "One bit of a finished stage's model flipped",
        f"{RUN} --repeat eval",
        edit(f"{MODEL}/model.safetensors", flipped),
        base="run",
    ),
    Case(
        "One bit of the only checkpoint flipped",
        RUN,
        edit(f"{CHECKPOINT}/*.safetensors", flipped),
        code=0,
        base="begun",
        writes=True,
        remedy=False,
    ),
    Case(
        "A merge mark in a comparison's results",
        "compare c.toml --folder c --report",
        edit("c/results.json", marked),
        base="comparison",
    ),
    Case(
        "A comparison's results cut in half",
        "compare c.toml --folder c --dry-run",
        edit("c/results.json", cut),
        base="comparison",
    ),
    Case("An evaluation's settings cut in half", EVAL, edit("e/evaluation.toml", cut), base="evaluation"),
    Case(
        "A damaged line in an evaluation's samples",
        "eval --regrade e --grader math",
        edit("e/samples/sums.jsonl", marked),
        code=0,
        base="evaluation",
        writes=True,
        remedy=False,
    ),
]

EVALUATIONS = [
    Case("A suite that is not there", f"eval {MODEL} --suite gsm8kk", base="run"),
    Case("A task that is not there", f"eval {MODEL} --suite embedded --tasks sums", base="run"),
    Case("A grader that is not there", "eval --regrade e --grader mth", base="evaluation"),
    Case("Another temperature in the same folder", f"{EVAL} --temperature 0.5", base="evaluation"),
    Case(
        "Problems without answers",
        f"eval {MODEL} --suite p.jsonl",
        write("p.jsonl", '{"question": "1+1?"}\n'),
        base="run",
    ),
    Case("A comparison of an evaluation with nothing", "eval --compare e absent", base="evaluation"),
    Case("A field of a task that is not there", f"{EVAL} --set tempreature=1", base="evaluation"),
]


def registered(here: Path) -> None:
    """The design of c.toml is registered in its folder, before any run."""
    (here / "c" / "results.json").unlink()
    recipe = load_comparison(str(here / "c.toml")).model_copy(update={"folder": str(here / "c")})
    Registrar(Planner(recipe, here / "c")).register()
    mark(here / "c")


def redesigned(here: Path) -> None:
    registered(here)
    swap("c.toml", "    2,\n", "    2,\n    3,\n")(here)


def rewritten(here: Path) -> None:
    registered(here)
    swap("c/results.json", '"reference":"sft"', '"reference":"rl"')(here)


COMPARISONS = [
    Case(
        "A base that is tuned on none", COMPARE, swap("c.toml", PATH, f'{PATH}\ntuned_on = "rihc"'), base="comparison"
    ),
    Case("Another design than the registered one", COMPARE, redesigned, base="comparison"),
    Case("A registration that was changed by hand", COMPARE, rewritten, base="comparison"),
    Case("An arm that is not there", "compare c.toml --folder c --only sft,dpo", base="comparison"),
    Case("A seed that is not there", "compare c.toml --folder c --seeds 7", base="comparison"),
    Case(
        "A reference that is no arm",
        "compare c.toml --folder c --dry-run",
        swap("c.toml", 'reference = "sft"', 'reference = "stf"'),
        base="comparison",
    ),
    Case(
        "An arm without a kind",
        "compare c.toml --folder c --dry-run",
        swap("c.toml", 'kind = "rl"', 'knid = "rl"'),
        base="comparison",
    ),
    Case(
        "A contrast with an arm that is not there",
        "compare c.toml --folder c --report",
        added("c.toml", CONTRAST.replace('other = "sft"', 'other = "stf"')),
        base="comparison",
    ),
    Case(
        "A contrast that expects equality without a bound",
        "compare c.toml --folder c --report",
        added("c.toml", CONTRAST.replace("higher", "equal")),
        base="comparison",
    ),
    Case(
        "A slope without a covariate",
        "compare c.toml --folder c --report",
        added("c.toml", f'{CONTRAST}kind = "slope"\n'),
        base="comparison",
    ),
    Case(
        "The power of contrasts whose spread nothing tells",
        "compare c.toml --folder c --power",
        added("c.toml", CONTRAST),
        base="comparison",
    ),
]
