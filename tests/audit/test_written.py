"""Every set of weights that a program wrote: those that claim to be the trained model are compared, both ways."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.audit.test_ways import WORDS
from thence.audit.judge.copies import WholeModel, compare_sets, merged_state
from thence.audit.result import SavedSets
from thence.audit.run.program import audit_program
from thence.audit.run.written import files_before, find_written

State = dict[str, Tensor]


class Tiny(nn.Module):
    """Names as a language model has them; the head may be tied."""

    def __init__(self, *, is_tied: bool = False):
        super().__init__()
        self.model = nn.ModuleDict(
            {"embed_tokens": nn.Embedding(11, 8), "up": nn.Linear(8, 16), "norm": nn.LayerNorm(8)}
        )
        self.lm_head = nn.Linear(8, 11, bias=False)
        if is_tied:
            self.lm_head.weight = self.model["embed_tokens"].weight  # pyright: ignore


def whole(*, is_tied: bool = False) -> WholeModel:
    torch.manual_seed(0)
    model = Tiny(is_tied=is_tied)
    return WholeModel.of(model, {name: p.detach().clone() for name, p in model.named_parameters()})


def moved(start: WholeModel, by: float = 1e-3, seed: int = 1) -> State:
    """The model after a step; all parameters moved."""
    generator = torch.Generator().manual_seed(seed)
    return {n: start.state[n] + by * torch.randn(start.state[n].shape, generator=generator) for n in start.expected}


def put(path: Path, state: State, *, dtype: torch.dtype = torch.float32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cast = {name: value.to(dtype).contiguous() for name, value in state.items()}
    save_file(cast, str(path)) if path.suffix == ".safetensors" else torch.save(cast, path)


def shards(folder: Path, state: State, *, lost: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names, where = list(state), {}
    for number, part in enumerate((names[:2], names[2:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        where |= dict.fromkeys(part, file)
        if number != lost:
            put(folder / file, {name: state[name] for name in part})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def compared(out: Path, start: WholeModel, before: Any = None, frozen: Any = ()) -> tuple[dict[str, str], SavedSets]:
    written = find_written(out, start.state, len(start.expected), before or {})
    found, sets = compare_sets(written, start, start.named_once(written.sets[0].state), frozen)
    return {finding.id: finding.detail for finding in found}, sets


def half(start: WholeModel, after: State) -> State:
    """One tensor as before the training."""
    return after | {"model.up.weight": start.state["model.up.weight"]}


def half_rows(start: WholeModel, after: State) -> State:
    """The rows of one rank as before the training."""
    rows = torch.cat([after["model.up.weight"][:8], start.state["model.up.weight"][8:]])
    return after | {"model.up.weight": rows}


def between(start: WholeModel, after: State, share: float) -> State:
    return {n: start.state[n] + share * (after[n] - start.state[n]) for n in after}


RIGHT: dict[str, Callable[[Path, WholeModel, State], Any]] = {
    "pytorch_model.bin": lambda out, start, after: put(out / "pytorch_model.bin", after),
    "bfloat16": lambda out, start, after: put(out / "bf16" / "model.safetensors", after, dtype=torch.bfloat16),
    "float16": lambda out, start, after: put(out / "half" / "model.safetensors", after, dtype=torch.float16),
    "truncated": lambda out, start, after: put(
        out / "cut" / "model.safetensors",
        {n: (v.view(torch.int32) & -0x10000).view(torch.float32).bfloat16() for n, v in after.items()},
        dtype=torch.bfloat16,
    ),
    "checkpoint of the step": lambda out, start, after: put(out / "checkpoint-1" / "model.safetensors", after),
    "sharded": lambda out, start, after: shards(out / "sharded", after),
    "wrapped": lambda out, start, after: put(out / "ddp.pt", {f"module._orig_mod.{n}": v for n, v in after.items()}),
    "within a checkpoint": lambda out, start, after: torch.save(
        {
            "model": after,
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "exp_avg": {n: v * 0 for n, v in after.items()}},
        },
        out / "state.pt",
    ),
    "one part": lambda out, start, after: put(out / "head.pt", {"lm_head.weight": after["lm_head.weight"]}),
    "parts of pipeline stages": lambda out, start, after: [
        put(out / f"stage{i}.pt", dict(list(after.items())[i::2])) for i in (0, 1)
    ],
}


@pytest.mark.parametrize("name", RIGHT)
def test_the_same_weights_elsewhere_are_no_finding_and_are_listed(name: str, tmp_path: Path) -> None:
    start = whole()
    after = moved(start)
    put(tmp_path / "model.safetensors", after)
    RIGHT[name](tmp_path, start, after)
    found, sets = compared(tmp_path, start)
    assert found == {} and len(sets.same) == 1, (found, sets)
    assert not any(name in sets.judged for name in ("bf16", "cut", "half")), sets


WRONG: dict[str, tuple[str, str, Callable[[Path, WholeModel, State], Any]]] = {
    "untrained": ("saved-stale", "before the training", lambda out, start, after: put(
        out / "final" / "model.safetensors", {n: start.state[n] for n in start.expected})),
    "untrained, bfloat16": ("saved-stale", "before the training", lambda out, start, after: put(
        out / "final.pt", {n: start.state[n] for n in start.expected}, dtype=torch.bfloat16)),
    "one tensor untrained": ("saved-stale", "model.up.weight", lambda out, start, after: put(
        out / "pytorch_model.bin", half(start, after))),
    "a rank untrained": ("saved-stale", "model.up.weight", lambda out, start, after: put(
        out / "pytorch_model.bin", half_rows(start, after))),
    "a rank untrained, bfloat16": ("saved-stale", "model.up.weight", lambda out, start, after: put(
        out / "pytorch_model.bin", half_rows(start, after), dtype=torch.bfloat16)),
    "an average": ("saved-average", "1.00% of the way from the start", lambda out, start, after: put(
        out / "final" / "model.safetensors", between(start, after, 0.01))),
    "an average, in the checkpoint": ("saved-average", "10.00% of the way", lambda out, start, after: torch.save(
        {"state_dict": between(start, after, 0.1)}, out / "last.ckpt")),
    "another step": ("saved-differs", "not those of", lambda out, start, after: put(
        out / "checkpoint-1" / "model.safetensors", moved(start, seed=2))),
    "a shard that is not there": ("saved-missing", "files are not there", lambda out, start, after: shards(
        out / "sharded", after, lost=2)),
    "no head": ("saved-missing", "lm_head.weight", lambda out, start, after: put(
        out / "hf" / "model.safetensors", {n: v for n, v in after.items() if n != "lm_head.weight"})),
    "a rank's own copy": ("saved-stale", "rank1.pt", lambda out, start, after: (
        put(out / "rank0.pt", after), put(out / "rank1.pt", half(start, after)))),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_set_that_claims_to_be_the_trained_model_and_is_not_has_its_name(name: str, tmp_path: Path) -> None:
    start = whole()
    after = moved(start)
    put(tmp_path / "model.safetensors", after)
    id_, said, write = WRONG[name]
    write(tmp_path, start, after)
    found, sets = compared(tmp_path, start)
    assert list(found) == [id_] and said in found[id_], (found, sets)


def test_a_stale_copy_hides_in_bfloat16_even_where_no_number_is_farther_off_than_rounding(tmp_path: Path) -> None:
    start = whole()
    after = {name: value * 1.001 for name, value in moved(start, by=0.0).items()}
    put(tmp_path / "model.safetensors", after)
    put(tmp_path / "bf16.pt", {n: start.state[n] for n in start.expected}, dtype=torch.bfloat16)
    found, _ = compared(tmp_path, start)
    assert list(found) == ["saved-stale"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("ema/model.safetensors", "an average, by its name"),
        ("model_ema.pt", "an average, by its name"),
        ("init/model.safetensors", "another model, by its name"),
        ("checkpoint-8/model.safetensors", "not that of the only step"),
        ("step_00004.pt", "not that of the only step"),
    ],
)
def test_sets_that_are_something_else_by_name_are_listed_and_not_accused(path: str, said: str, tmp_path: Path) -> None:
    start = whole()
    put(tmp_path / path, moved(start, seed=3))
    put(tmp_path / "model.safetensors", moved(start))
    put(tmp_path / path, moved(start, seed=3))  # written last, and still not judged
    found, sets = compared(tmp_path, start)
    assert found == {} and sets.judged.startswith("model.safetensors ("), sets
    assert [line for line in sets.left if line.startswith(path) and said in line], sets


def test_earlier_checkpoints_are_no_finding(tmp_path: Path) -> None:
    start = whole()
    for step in (1, 2, 3):
        path = tmp_path / f"checkpoint-{step}" / "model.safetensors"
        put(path, moved(start, seed=step))
        os.utime(path, (step, step))
    put(tmp_path / "model.safetensors", moved(start, seed=3))
    found, sets = compared(tmp_path, start)
    assert (found, sets.same) == ({}, ("checkpoint-3/model.safetensors",))
    assert [line.split(":")[0].split("/")[0] for line in sets.left] == ["checkpoint-1", "checkpoint-2"]


def test_checkpoints_with_two_numbers_are_told_apart_by_the_last(tmp_path: Path) -> None:
    start = whole()
    for epoch, step in ((0, 1), (1, 2)):
        put(tmp_path / f"epoch={epoch}-step={step}.ckpt", moved(start, seed=step))
    put(tmp_path / "model.safetensors", moved(start, seed=2))
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    found, sets = compared(tmp_path, start)
    assert (found, sets.same) == ({}, ("epoch=1-step=2.ckpt",))
    assert [line.split(": ")[1] for line in sets.left] == [
        "the audit does not read *.distcp", "a checkpoint before the last, by its number",
    ]  # fmt: skip
    put(tmp_path / "only" / "epoch=0-step=1.ckpt", moved(start, seed=9))
    assert list(compared(tmp_path, start)[0]) == ["saved-differs"]


def test_an_untrained_final_model_is_not_judged_in_place_of_the_trained_checkpoint(tmp_path: Path) -> None:
    start = whole()
    put(tmp_path / "checkpoint-1" / "model.safetensors", moved(start))
    put(tmp_path / "model.safetensors", {n: start.state[n] for n in start.expected})
    found, sets = compared(tmp_path, start)
    assert sets.judged.startswith("checkpoint-1/model.safetensors") and list(found) == ["saved-stale"]


def test_tied_weights_are_one_however_they_are_named(tmp_path: Path) -> None:
    start = whole(is_tied=True)
    after = moved(start)
    name, alias = "model.embed_tokens.weight", "lm_head.weight"
    put(tmp_path / "model.safetensors", after)
    put(tmp_path / "pytorch_model.bin", after | {alias: after[name]})
    put(tmp_path / "other" / "model.safetensors", {alias if n == name else n: v for n, v in after.items()})
    found, sets = compared(tmp_path, start)
    assert found == {} and len(sets.same) == 2
    put(tmp_path / "pytorch_model.bin", after | {alias: start.state[name]})
    assert list(compared(tmp_path, start)[0]) == ["saved-untied"]


def test_files_of_earlier_runs_and_of_optimizers_are_not_judged(tmp_path: Path) -> None:
    start = whole()
    put(tmp_path / "model-00001-of-00002.safetensors", moved(start, seed=5))
    put(tmp_path / "final.pt", moved(start, seed=5))
    before = files_before(tmp_path)
    put(tmp_path / "model.safetensors", moved(start))
    put(tmp_path / "optimizer.pt", moved(start, seed=6))
    (tmp_path / "run.pt").write_bytes(b"no file of torch")
    os.utime(tmp_path / "model.safetensors", (1, 1))
    found, sets = compared(tmp_path, start, before)
    assert found == {} and sets.judged == "model.safetensors (the only set of weights)"
    said = dict(line.split(": ", 1) for line in sets.left)
    assert said["final.pt"] == "it was there before the program ran"
    assert said["optimizer.pt"] == "no weights, by its name" and "cannot be read" in said["run.pt"]


def test_what_is_frozen_need_not_be_saved(tmp_path: Path) -> None:
    start = whole()
    put(tmp_path / "model.safetensors", {n: v for n, v in moved(start).items() if "embed" not in n})
    assert list(compared(tmp_path, start)[0]) == ["saved-missing"]
    assert compared(tmp_path, start, frozen=["embed_tokens"])[0] == {}


ADAPTERS: dict[str, tuple[float, str]] = {
    "merged": (1.0, ""),
    "unmerged": (0.0, "saved-merge"),
    "twice": (2.0, "saved-merge"),
}


@pytest.mark.parametrize("name", [*ADAPTERS, "half", "bfloat16"])
def test_a_merged_model_beside_its_adapter(name: str, tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model(torch.float32)
    start = WholeModel.of(model, {n: p.detach().clone() for n, p in model.named_parameters()})
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.normal_(std=1e-2)
    adapted.save_pretrained(tmp_path)
    trained = merged_state(adapted)
    trained = {n: trained[n] for n in start.expected}
    if name in ADAPTERS:
        copy, id_ = between(start, trained, ADAPTERS[name][0]), ADAPTERS[name][1]
    else:
        copy, id_ = dict(trained), "saved-merge" if name == "half" else ""
    if name == "half":
        copy |= {n: start.state[n] for n in copy if "v_proj" in n}
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    put(tmp_path / "merged" / "model.safetensors", copy, dtype=dtype)
    written = find_written(tmp_path, start.state, len(start.expected), {})
    assert [one.form for one in written.sets] == ["adapter", "model"]
    found, sets = compare_sets(written, start, trained, ())
    assert [finding.id for finding in found] == [id_] * bool(id_), found
    assert len(sets.same) == (not id_)


@pytest.mark.everything
@pytest.mark.slow
def test_a_program_that_saves_more_than_one_set_is_told_which_was_judged() -> None:
    only = ["micro 2 x 4"]
    right = audit_program([*WORDS, "--also", "copies"], only=only)
    assert right.ok, str(right)
    line = next(line for line in right.verified if line.startswith("what is saved"))
    assert "judged was model.safetensors" in line and "checkpoint-1/state.pt [model]" in line
    assert "what is saved, model_ema.pt: an average, by its name" in right.not_verified
    wrong = audit_program([*WORDS, "--also", "average"], only=only)
    assert wrong.verdict.exit_code == 1 and {f.id for f in wrong.cases[0].faults} == {"saved-average"}, str(wrong)
    assert "final.pt" in wrong.verdict.sentences[0] and "The weights amount to: token mean" in str(wrong)
    assert any("a fault was found" in line and "judged was model" in line for line in wrong.not_verified), str(wrong)


@pytest.mark.parametrize("wrong", ["", "stale", "alpha", "parts"])
def test_copies_of_an_adapter(wrong: str, tmp_path: Path) -> None:
    start = whole()
    generator = torch.Generator().manual_seed(0)
    name = "base_model.model.model.up.lora_{}.weight"
    first = {name.format("A"): torch.randn(2, 8, generator=generator)}
    after = first | {name.format("B"): torch.randn(16, 2, generator=generator)}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    for folder, state in (("", after), ("checkpoint-1", after if wrong != "stale" else first | {
        name.format("B"): torch.zeros(16, 2)})):  # fmt: skip
        put(tmp_path / folder / "adapter_model.safetensors", state)
        other = {"lora_alpha": 8} if folder and wrong == "alpha" else {}
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps(settings | other))
    if wrong == "parts":
        put(tmp_path / "adapter.pt", {n.replace(".weight", ".default.weight"): v * 1.5 for n, v in after.items()})
    written = find_written(tmp_path, start.state, len(start.expected), {})
    found, sets = compare_sets(written, start, start.state, ())
    expected = {"": [], "stale": ["saved-stale"], "alpha": ["saved-differs"], "parts": ["saved-average"]}[wrong]
    assert [finding.id for finding in found] == expected, (found, sets)
    if wrong == "stale":
        assert (
            "checkpoint-1/adapter_model.safetensors hold numbers of before"
            in (found[0].detail.split(" tensors of ")[1])
        )
