"""The process that samples ahead: the same tokens as here, the newest weights or an error, and never a hang."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.recipes import model_table
from thence.errors import UserError
from thence.pipeline.engines_ahead import sampling_child
from thence.pipeline.sampling_process import load
from thence.recipe import Model
from thence.rollout import child as child_module
from thence.rollout.child import ALIVE_SECONDS, SamplingChild
from thence.rollout.native import Sampling, sample
from thence.train.model import load_model
from thence.train.parallel import SingleProcess
from thence.train.policy import Policy

PROMPTS = [[3, 4, 5], [3, 4, 5], [6, 7], [8, 9, 10, 11], [6, 7]]
SEEDS = [1, 2, 3, 4, 5]
SAMPLING = Sampling(12, stop_ids=(0,))


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model, as a stage has it."""
    settings = Model(**model_table(tmp_path_factory.mktemp("model")))
    loaded = load_model(settings, torch.device("cpu"))
    size = sum(p.numel() for p in loaded.model.parameters())
    return SimpleNamespace(
        policy=Policy(loaded.model), ranks=SingleProcess(), n_parameters=size, device=torch.device("cpu")
    )


@pytest.fixture(scope="module")
def child(context: Any) -> Iterator[SamplingChild]:
    with sampling_child(context, 1) as found:
        yield found


def moved(context: Any) -> None:
    """Other weights, as an optimizer step leaves them."""
    with torch.no_grad():
        for parameter in context.policy.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


def test_it_samples_the_tokens_and_log_probabilities_of_the_trainers_own_process(
    context: Any, child: SamplingChild
) -> None:
    found = []
    for version in (3, 4):
        child.take(child.prepare(version))
        assert child.version == version
        assert child.sample(PROMPTS, SEEDS, SAMPLING) == sample(context.policy.model, PROMPTS, SEEDS, SAMPLING)
        found.append(child.sample(PROMPTS, SEEDS, SAMPLING))
        moved(context)
    assert found[0] != found[1]
    for greedy in (Sampling(5, temperature=0.0), Sampling(7, top_p=0.6, top_k=3, temperature=1.7, rows=2)):
        child.take(child.prepare(9))
        assert child.sample(PROMPTS, SEEDS, greedy) == sample(context.policy.model, PROMPTS, SEEDS, greedy)
    assert child.sample([], [], SAMPLING) == []


def test_it_says_nothing_while_nobody_reads(child: SamplingChild) -> None:
    """What it said while the trainer takes a long step would fill the socket, and stop it."""
    assert child._wire is not None
    poll = select.poll()
    poll.register(child._wire._sock, select.POLLIN)
    time.sleep(ALIVE_SECONDS + 0.5)  # what it was about to say when the last answer came
    while poll.poll(0):
        child._wire.receive(1.0)
    assert not poll.poll(3000 * ALIVE_SECONDS)


def test_buffers_are_handed_over_too(context: Any, child: SamplingChild) -> None:
    buffer = next(b for n, b in context.policy.model.named_buffers() if n.endswith("inv_freq"))
    before = buffer.clone()
    with torch.no_grad():
        buffer.mul_(0.5)  # as a model's own code may, after it was made from its configuration
    try:
        child.take(child.prepare(5))
        assert child.sample(PROMPTS, SEEDS, SAMPLING) == sample(context.policy.model, PROMPTS, SEEDS, SAMPLING)
    finally:
        buffer.copy_(before)
    child.take(child.prepare(6))


def test_weights_are_those_at_the_time_of_the_copy_however_late_they_are_loaded(
    context: Any, child: SamplingChild
) -> None:
    before = sample(context.policy.model, PROMPTS, SEEDS, SAMPLING)
    handed = child.prepare(11)
    moved(context)
    later = child.prepare(12)
    child.take(handed)
    assert child.sample(PROMPTS, SEEDS, SAMPLING) == before
    child.take(later)
    assert child.sample(PROMPTS, SEEDS, SAMPLING) == sample(context.policy.model, PROMPTS, SEEDS, SAMPLING)
    assert not handed.folder.exists() and not later.folder.exists()


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_samples_is_an_error_that_says_so(context: Any) -> None:
    with sampling_child(context, 1) as child:
        child.take(child.prepare(0))
        pid = child.pid
        assert pid is not None
        long = Sampling(200, rows=1)
        threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
        with pytest.raises(UserError, match=r"ended unexpectedly while sampling \(SIGKILL\)[\s\S]*resumes from"):
            for _ in range(1000):
                child.sample(PROMPTS * 40, SEEDS * 40, long)
        with pytest.raises(UserError, match="has ended"):
            child.sample(PROMPTS, SEEDS, SAMPLING)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
def test_closing_it_ends_a_thread_that_waits_for_it_and_leaves_no_file(context: Any) -> None:
    held = sampling_child(context, 1)
    child = held.__enter__()
    child.take(child.prepare(0))
    child.prepare(1)  # never loaded
    folders, failed = list(child._scratch), []

    def ask() -> None:
        try:
            for _ in range(1000):
                child.sample(PROMPTS * 40, SEEDS * 40, Sampling(200, rows=1))
        except UserError as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.5)
    child.close()
    thread.join(20)
    assert not thread.is_alive() and len(failed) == 1
    assert not any(folder.exists() for folder in folders)
    child.close()


@pytest.mark.slow
def test_a_model_that_cannot_be_sampled_from_is_the_trainers_error(context: Any) -> None:
    with sampling_child(context, 1) as child:
        handed = child.prepare(0)
        for file in handed.folder.iterdir():
            file.rename(file.with_suffix(".gone"))
        with pytest.raises(UserError, match="was not handed over"):
            child.take(handed)


def test_weights_of_another_shape_or_a_weight_that_is_missing_are_refused(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    model = tiny_model()
    names = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for number, (name, value) in enumerate(names.items()):
        save_file({name: (value.detach() + 1).contiguous()}, tmp_path / f"{number:06d}.safetensors")
    load(model, tmp_path)
    first = next(iter(names))
    save_file({first: torch.zeros(2, 2)}, tmp_path / "000000.safetensors")
    with pytest.raises(UserError, match="none of its own"):
        load(model, tmp_path)
    (tmp_path / "000000.safetensors").unlink()
    with pytest.raises(UserError, match=f"{first} was not handed over"):
        load(model, tmp_path)


def test_a_process_that_says_that_it_is_alive_may_take_long_over_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        """Says six times that it is alive, and then that it has the weights."""

        def __init__(self) -> None:
            self.said = iter([*[{"alive": True}] * 6, {"loaded": 3}])

        def receive(self, seconds: float) -> dict[str, Any]:
            time.sleep(0.1)
            return next(self.said)

    monkeypatch.setattr(child_module, "SILENCE_SECONDS", 0.4)
    waiting: Any = object.__new__(child_module.SamplingChild)
    waiting._popen, waiting._wire = object(), Slow()
    assert waiting._answer("loaded", "taking weights") == 3
