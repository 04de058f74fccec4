"""Checkpoints are whole or not there, and a trainer that takes one up goes on bit for bit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.oracle import VARIANTS, make_batch, make_case
from tests.train.writing import FakeTokenizer, write
from thence.errors import CheckpointError
from thence.train import checkpoint
from thence.train.checkpoint import newest_checkpoint, remove_checkpoints, write_checkpoint
from thence.train.state import load_weights
from thence.train.step import StepSettings
from thence.train.trainer import Trainer

LENGTHS = [(3, 7), (3, 12), (2, 4), (4, 1)]


@pytest.fixture
def model(tiny_model):
    return tiny_model(torch.float32)


def trainer_of(model) -> Trainer:
    dtype = next(model.parameters()).dtype
    return Trainer(model, lambda step: 0.01 / (step + 1), StepSettings(60, compute_dtype=dtype), weight_decay=0.1)


def train(trainer, plain_model, seeds):
    for seed in seeds:
        batch = make_batch(make_case(plain_model, VARIANTS[0], LENGTHS, 2, seed), VARIANTS[0])
        trainer.step(batch, optimizer="main" if seed % 2 else "demonstrations")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tiny_model, tmp_path, kind, dtype):
    data, model, other = tiny_model(kind=kind), tiny_model(dtype, kind), tiny_model(dtype, kind, seed=5)
    trainer, resumed = trainer_of(model), trainer_of(other)
    train(trainer, data, [0, 1, 2])
    plain, tensors = trainer.state()
    write_checkpoint(tmp_path, 3, model, FakeTokenizer(), {"trainer": plain, "stage": {"drawn": [7]}}, tensors)
    train(trainer, data, [3, 4, 5])
    found = newest_checkpoint(tmp_path)
    assert found is not None
    load_weights(other, found.folder)
    resumed.restore(found.plain["trainer"], found.tensors)
    assert (found.step, found.plain["stage"]) == (3, {"drawn": [7]})
    assert resumed.steps_taken == 1, "of the three steps one was of the kind that moves the schedule on"
    train(resumed, data, [3, 4, 5])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    expected, got = trainer.state(), resumed.state()
    assert got[0] == expected[0]
    assert got[1].keys() == expected[1].keys()
    assert all(torch.equal(got[1][name], expected[1][name]) for name in got[1])


def test_a_checkpoint_opens_with_transformers_and_holds_nothing_pickled(model, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = write(tmp_path, 1, model)
    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), opened.parameters(), strict=True))
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors"}


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(folder):
    path = folder / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "truncated file": truncate,
    "flipped bit": flip_a_bit,
    "missing file": lambda folder: (folder / "state.json").unlink(),
    "missing manifest": lambda folder: (folder / "manifest.json").unlink(),
    "truncated manifest": lambda folder: (folder / "manifest.json").write_text('{"state.json": "'),
    "other state": lambda folder: (folder / "state.json").write_text('{"step": 9}'),
    "half-written folder": lambda folder: folder.rename(folder.with_name(".writing-000002")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(model, tmp_path, damage):
    write(tmp_path, 1, model, keep=2)
    damage(write(tmp_path, 2, model, keep=2))
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.plain) == (1, {"note": 1})
    assert found.tensors["main/a"].tolist() == [1.0] * 3


def test_no_whole_checkpoint_is_none(model, tmp_path):
    assert newest_checkpoint(tmp_path / "never written") is None
    truncate(write(tmp_path, 1, model))
    assert newest_checkpoint(tmp_path) is None


class Killed(BaseException):
    """Nothing in the code under test may catch it."""


@pytest.mark.parametrize("moment", ["save_file", "publish", "flush", "_sha256"])
def test_killed_while_writing_the_earlier_checkpoint_stands_and_the_next_try_succeeds(
    model, tmp_path, monkeypatch, moment
):
    def die(*_, **__):
        raise Killed

    write(tmp_path, 1, model)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, moment, die)
        with pytest.raises(Killed):
            write(tmp_path, 2, model)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    write(tmp_path, 2, model)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_killed_while_writing_a_step_again_leaves_one_whole_checkpoint(model, tmp_path, monkeypatch):
    def die(*_):
        raise Killed

    write(tmp_path, 1, model)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        patch.setattr(Path, "replace", die)
        patch.setattr(os, "rename", die)
        patch.setattr(os, "replace", die)
        with pytest.raises(Killed):
            write(tmp_path, 1, model)
    assert newest_checkpoint(tmp_path) is not None


def test_only_the_newest_are_kept(model, tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step, model, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000004"]


def test_a_damaged_later_checkpoint_does_not_cost_the_one_just_written(model, tmp_path):
    """A run that had to start over from before a damaged checkpoint must not lose its new ones to it."""
    truncate(write(tmp_path, 30, model))
    written = write(tmp_path, 10, model)
    found = newest_checkpoint(tmp_path)
    assert written.is_dir()
    assert found is not None
    assert found.step == 10


def test_weights_of_another_model_are_refused(tiny_model, model, tmp_path):
    folder = write(tmp_path, 1, model)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(tiny_model(torch.float32, "qwen3"), folder)


def test_the_manifest_names_every_file(model, tmp_path):
    folder = write(tmp_path, 1, model)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert {"model.safetensors", "config.json", "tokenizer.json", "optimizer.safetensors", "state.json"} <= set(
        manifest
    )


def test_a_state_read_from_disk_is_taken_up_on_the_device_of_the_weights(tiny_model):
    """A file is read on the CPU; a GPU's fused AdamW wants the count of steps beside the weights, as torch puts it."""
    trainer, model = trainer_of(tiny_model(torch.float32)), tiny_model(torch.float32)
    trainer.step(make_batch(make_case(tiny_model(), VARIANTS[0], LENGTHS, 3, 0), VARIANTS[0]))
    elsewhere = trainer_of(model)
    model.to("meta")  # stands in for a GPU: a device that is not the CPU
    elsewhere.restore(*trainer.state())
    found = elsewhere.optimizer("main").state
    assert {key for state in found.values() for key in state} == {"step", "exp_avg", "exp_avg_sq"}
    assert {value.device.type for state in found.values() for value in state.values()} == {"meta"}


def test_of_the_checkpoints_of_a_finished_stage_the_newest_alone_is_kept(model, tmp_path):
    """A process that is killed after its last checkpoint leaves the one before beside it."""
    for step in (1, 2):
        write(tmp_path, step, model, keep=2)
    (tmp_path / ".writing-000003").mkdir()
    remove_checkpoints(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
    remove_checkpoints(tmp_path)
    assert not tmp_path.exists()
