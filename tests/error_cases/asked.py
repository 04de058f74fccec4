"""Recipes and command lines that cannot be understood, names that name nothing, text that would act on a terminal."""

from __future__ import annotations

import json
from pathlib import Path

from .case import Case, Prepare, edit, remove, swap, write

RUN = "run recipe.toml"
RL_ALONE = " --stages '[\"rl\"]'"


def recipe_as(encoding: str) -> Prepare:
    return edit(
        "recipe.toml", lambda content: b"# caf\xc3\xa9\n".decode().encode(encoding) + encoded(content, encoding)
    )


def encoded(content: bytes, encoding: str) -> bytes:
    return content.decode().encode(encoding.replace("utf-16", "utf-16-le"))


def link_of_itself(here: Path) -> None:
    (here / "recipe.toml").symlink_to("recipe.toml")


def folder_as_recipe(here: Path) -> None:
    (here / "recipe.toml").mkdir()


RECIPES = [
    Case("A recipe that is not there", "run recpie.toml"),
    Case("A shipped recipe with a letter wrong", "run quickstrat"),
    Case("A folder in place of a recipe", RUN, folder_as_recipe),
    Case("A link that leads to itself", RUN, link_of_itself),
    Case("A recipe in UTF-16", RUN, recipe_as("utf-16"), base="data"),
    Case("A recipe in Latin-1", RUN, recipe_as("latin-1"), base="data"),
    Case("A picture in place of a recipe", RUN, write("recipe.toml", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")),
    Case("A line that is not TOML", RUN, swap("recipe.toml", "[rl]", "[rl"), base="data"),
    Case("A field given twice", RUN, swap("recipe.toml", "[sft]\n", "[sft]\nlr = 1e-3\n"), base="data"),
    Case("A field that is not there", RUN, swap("recipe.toml", "rollouts", "rolouts"), base="data"),
    Case("A rate that is not a number", RUN, swap("recipe.toml", "lr = 0.001", "lr = nan"), base="data"),
    Case("A rate that is true", RUN, swap("recipe.toml", "lr = 0.001", "lr = true"), base="data"),
    Case("Steps in words", RUN, swap("recipe.toml", "steps = 1", 'steps = "ten"'), base="data"),
    Case("A number as a model", RUN, write("recipe.toml", "[model]\npath = 3\n")),
    Case("A model twice", RUN, swap("recipe.toml", "[model]", '[model]\npath = "world:chain/rich"'), base="data"),
    Case("No model", RUN, write("recipe.toml", '[data]\nsource = ["a.jsonl"]\n')),
    Case("A stage of no kind", RUN + """ --stages '["sft", "dpo"]'""", base="data"),
    Case("A method that is not there", f"{RUN} --rl.method grpoo", base="data"),
    Case("A list without its brackets", f"{RUN} --stages sft,eval", base="data"),
    Case("Betas out of range", f"{RUN} --sft.betas 0.9,1.5", base="data"),
]

FLAGS = [
    Case("A command that is not there", "trian recipe.toml"),
    Case("A value forgotten", f"{RUN} --sft.lr --sft.steps 8", base="data"),
    Case("A value that is empty", f"{RUN} --sft.lr ''", base="data"),
    Case("A flag given twice", f"{RUN} --sft.lr 1e-4 --sft.lr 1e-5", base="data"),
    Case("A flag without its dashes", f"{RUN} sft.lr=1e-4", base="data"),
    Case("One dash in place of two", f"{RUN} -sft.lr 1e-4", base="data"),
    Case("A dash that a word processor changed", f"{RUN} –sft.lr 1e-4", base="data"),
    Case("Steps below zero", f"{RUN} --rl.steps -1", base="data"),
    Case("A temperature that is infinite", "eval world:chain/rich --suite embedded --temperature inf"),
    Case("More tokens than any model has", f"{RUN} --eval.max-tokens 1e8", base="data"),
    Case("An evaluation without a suite", "eval world:chain/rich"),
]

NAMES = [
    Case("A name that leads out of the folder", f"{RUN} --name ../../x", base="data"),
    Case("A name with a slash", f"{RUN} --name a/b", base="data"),
    Case(
        "A test set whose name is a path",
        RUN,
        edit("recipe.toml", lambda c: c + b'[eval.splits."../up"]\nlimit = 3\n'),
        base="data",
    ),
    Case("A stage whose name is too long", f"{RUN} --stages sft-{'x' * 300}", base="data"),
    Case("A folder that is a file", f"{RUN} --folder train.jsonl", base="data"),
    Case("A recipe whose name clears the screen", "run 'x\x1b[2Jy.toml'"),
    Case("A method whose name turns the line round", f"{RUN} --rl.method 'gr\u202epo'", base="data"),
]


def rows(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


ROW = {"prompt": "1+1?", "completion": "2", "answer": "2"}

DATA = [
    Case("A data file that is not there", RUN, remove("train.jsonl"), base="data"),
    Case("An empty data file", RUN, write("train.jsonl", ""), base="data"),
    Case("A line that is not JSON", RUN, edit("train.jsonl", lambda c: c.replace(b"{", b"(", 3)), base="data"),
    Case("A line in Latin-1", RUN, edit("train.jsonl", lambda c: c.replace(b"3+3?", b"caf\xe9?")), base="data"),
    Case("Rows without a prompt", RUN, write("train.jsonl", rows({"text": "1+1=2"})), base="data"),
    Case("A prompt that is a number", RUN, write("train.jsonl", rows(ROW, {**ROW, "prompt": 3})), base="data"),
    Case(
        "RL on rows without answers",
        RUN + RL_ALONE + " --rl.reward exact",
        write("train.jsonl", rows({"prompt": "1+1?"})),
        base="data",
    ),
    Case("A Parquet file that is none", f"{RUN} --data.source a.parquet", write("a.parquet", "PAR1"), base="data"),
    Case("Columns that are not there", f"{RUN} --data.columns prompt=question", base="data"),
    Case("A parameter that the world does not have", f"{RUN} --data.source world:chain?slips=0.1", base="data"),
    Case("A parameter of the world that changes nothing", "data world:chain?question=0.6 --data.limit 5"),
    Case("Everything held out", f"{RUN} --sft.held-out 8", base="data"),
    Case(
        "A chat template that is broken",
        f"{RUN} --data.template t.jinja",
        write("t.jinja", "{% for m in messages %}{{ m.content }}"),
        base="data",
    ),
]
