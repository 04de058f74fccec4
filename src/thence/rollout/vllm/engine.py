"""Sampling with vLLM in a separate process: the interface of the native sampler, and weights that can be replaced.

Every response carries a stamp, the version and digest of the weights that it was sampled with; one of other weights is
refused. Log-probabilities are those of the whole softmax at the sampling temperature, as the trainer computes them.
"""

from __future__ import annotations

import logging
import math
import secrets
import shutil
import time
import weakref
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from thence.errors import UserError
from thence.foreign_text import one_line
from thence.rollout.native import Response, Sampling
from thence.rollout.vllm.chunks import check_names, send_tensors
from thence.rollout.vllm.link import SEND_SECONDS, Door, Link, connect, enter, greet, start
from thence.rollout.vllm.replies import checked_probe, checked_response
from thence.rollout.vllm.request import check_room, generate_request
from thence.rollout.vllm.settings import VllmSettings, shared_token
from thence.rollout.vllm.weights import (
    Probe,
    Push,
    folder_for,
    probe_ids,
    probe_logps,
    scratch_folders,
    tensors_in,
    write_weights,
)

log = logging.getLogger(__name__)
CANCEL_SECONDS = 30.0


class VllmEngine:
    """A running vLLM with one model. A context manager; `close` ends the process that was started.

    Args:
        settings: where vLLM runs and what it may use.
        model: Hugging Face folder with safetensors; None: the server's model, to which weights must then be pushed.
        run: what the ranks of one run have in common: a server serves them side by side. None: no other client.
        shared: let other ranks of this machine in, through `door`.
        door: of a vLLM that another rank has started, which is used instead of a new one.
        orphans: the caller's folders, which the new process removes if it outlives this one.

    Raises:
        UserError: vLLM is missing, does not start, is out of memory or too slow; the server does not answer, wants
            another token, has another model or another client.
    """

    def __init__(
        self,
        settings: VllmSettings,
        model: Path | None,
        *,
        run: str | None = None,
        shared: bool = False,
        door: Door | None = None,
        orphans: Sequence[Path] = (),
    ):
        self.settings, self._orphans = settings, orphans
        self.version = 0
        self.last_push: Push | None = None
        self._digest: str | None = None
        self._asked = 0
        self._scratch = scratch_folders()
        self._removed = weakref.finalize(self, _remove, self._scratch)
        try:
            self.door = door or (Door(str(self._scratch[0] / "door"), secrets.token_hex(16)) if shared else None)
            self._link, token = self._open(model, door)
            run = self.door.token if self.door is not None else run
            self._about, self._digest = greet(self._link, token, settings, model, run)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its response together."""
        return int(self._about["max_model_len"])

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        limits: Sequence[int] | None = None,
    ) -> list[Response]:
        """Sample one response for every prompt, as `thence.rollout.native.sample` does.

        Args:
            prompts: token ids, at least one token each.
            seeds: one a prompt; the same seed gives the same tokens (up to the last bits of floating-point sums),
                but not those of the native sampler.
            sampling: `rows` is not used; vLLM was told at its start how many run in parallel.
            limits: longest response of each prompt, instead of `sampling.max_tokens` for all.

        Returns:
            The responses in the order of the prompts. Those that reach the end of the model's context end there with
            `finish` "length".

        Raises:
            UserError: a prompt that is longer than the context; vLLM died, hangs, failed or has other weights than
                were pushed. The engine is closed then.
        """
        found = dict(self.stream(prompts, seeds, sampling, limits=limits))
        return [found[i] for i in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        limits: Sequence[int] | None = None,
        logps: bool = True,
    ) -> Generator[tuple[int, Response]]:
        """As `sample`, but every response with its place as soon as it ends; leaving the loop early stops the rest.

        Args:
            limits: longest response of each prompt, instead of `sampling.max_tokens` for all.
            logps: False: responses without log-probabilities, which is faster.

        Raises:
            ValueError: not one seed, or one limit, a prompt.
            UserError: a prompt has no room, or vLLM ended or failed.
        """
        if len(seeds) != len(prompts) or (limits is not None and len(limits) != len(prompts)):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        if not prompts:
            return
        check_room(prompts, self.max_model_len)
        self._asked += 1
        asked = self._asked
        most = [sampling.max_tokens] * len(prompts) if limits is None else limits
        self._link.ask(generate_request(asked, prompts, seeds, most, sampling, logps), SEND_SECONDS)
        left, ended = set(range(len(prompts))), False
        steps, moved = -1, time.monotonic()
        try:
            while True:
                message = self._link.answer(self.settings.silence_seconds, "sampling")
                if "end" in message:
                    ended = True
                    break
                if "done" in message:
                    place, response = _response(self._link, [self.version, self._digest], message, logps, left, most)
                    left.remove(place)
                    yield place, response
                    moved = time.monotonic()
                elif message.get("alive") != steps:
                    steps, moved = message.get("alive"), time.monotonic()
                elif time.monotonic() - moved > self.settings.silence_seconds:
                    raise self._link.failed(f"vLLM made no token for {self.settings.silence_seconds:g} s")
        finally:
            if not ended:
                self._cancel(asked)
        if left:
            raise self._link.failed(f"vLLM left out {len(left)} of {len(prompts)} responses")

    def push_weights(self, model: Any, version: int) -> None:
        """Give the running vLLM the weights of a model of this process. It drops all that it cached with the old ones.

        Both sides then read the same short text with them: if their log-probabilities differ by more than rounding,
        the weights did not arrive. `last_push` tells by how much they differ.

        Args:
            model: a Hugging Face causal language model of the architecture and sizes that vLLM was started with.
            version: of the weights, 0 or more; what the trainer calls them, for example the number of the update.

        Raises:
            UserError: no room for the weights, vLLM refused them or ended, or the log-probabilities differ.
            ValueError: a negative version.
        """
        _check_version(version)
        begin = time.monotonic()
        ids = probe_ids(model.config.get_text_config().vocab_size)
        if self.settings.transfer == "ipc":
            check_names(model)
            kept = model.state_dict(keep_vars=True)  # with every buffer that files hold, and tied weights once
            buffers = ((name, value) for name, value in model.named_buffers() if name in kept)
            tensors = self.send_weights([*model.named_parameters(), *buffers])
            self.load_weights(None, tensors, Probe(ids, probe_logps(model, ids)), version, begin)
            return
        folder = folder_for(sum(p.numel() * p.element_size() for p in model.parameters()), self._scratch)
        try:
            write_weights(model, folder)
            self.load_weights(folder, tensors_in(folder), Probe(ids, probe_logps(model, ids)), version, begin)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def send_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> int:
        """Give vLLM tensors in chunks, which it loads as they come; :meth:`load_weights` without a folder follows.

        Args:
            tensors: under the names that a Hugging Face folder has. All of them are iterated, whatever fails.

        Returns:
            How many there are.

        Raises:
            UserError: no room for a chunk; vLLM refused one or ended; it is on another GPU than the tensors.
        """
        sent = 0

        def give(chunk: dict[str, Any], count: int) -> None:
            nonlocal sent
            self._link.ask({"op": "take", "first": sent == 0, "chunk": chunk}, SEND_SECONDS)
            reply = self._link.answer(self.settings.silence_seconds, "taking weights")
            sent += count
            if reply.get("taken") != sent:
                raise self._link.failed(f"vLLM has taken {one_line(str(reply.get('taken')), 20)} of {sent} tensors")

        return send_tensors(
            tensors, give, lambda size: folder_for(size, self._scratch), self._about.get("device", "cpu")
        )

    def load_weights(
        self, folder: Path | None, tensors: int, probe: Probe, version: int, begin: float | None = None
    ) -> None:
        """As :meth:`push_weights`, with weights that lie in a folder already.

        Args:
            folder: safetensors files, under the names that a Hugging Face folder has. None: they were sent.
            tensors: how many there are.
            probe: what the trainer says with these weights.
            begin: when handing them over began, by `time.monotonic`; default: now.
        """
        _check_version(version)
        begin = time.monotonic() if begin is None else begin
        stamp = [version, probe.digest(version, tensors)]
        request = {"op": "load", "path": str(folder or ""), "version": version, "digest": stamp[1], "tensors": tensors}
        self._link.ask({**request, "probe": probe.token_ids}, SEND_SECONDS)
        reply = self._link.answer(self.settings.silence_seconds, "taking weights")
        try:
            theirs = checked_probe(reply, len(probe.logps))
        except ValueError as error:
            raise self._link.not_understood(error) from None
        if reply["stamp"] != stamp:
            raise self._link.failed(f"vLLM says it has weights {reply['stamp']}, sent were {stamp}")
        difference = max(abs(a - b) for a, b in zip(probe.logps, theirs, strict=True))
        tolerance = probe.tolerance(self._about["dtype"])
        if not difference <= tolerance:
            raise self._link.failed(
                f"the weights of version {version} did not take effect in vLLM: it reads a short text with "
                f"log-probabilities up to {difference:.3g} nats away from the trainer's, {tolerance:g} are allowed"
            )
        self.version, self._digest = version, stamp[1]
        self.last_push = Push(version, stamp[1], time.monotonic() - begin, difference)

    def facts(self) -> dict[str, Any]:
        """Plain values that numbers depend on: versions, dtype, sizes, and the stamp of the weights."""
        about = {name: value for name, value in self._about.items() if name not in ("stamp", "protocol", "pid")}
        return {
            "engine": "vllm",
            **about,
            "server": self.settings.server or None,
            "weights_version": self.version,
            "weights": self._digest,
            "logprobs": "whole softmax at the sampling temperature",
        }

    def close(self) -> None:
        """End what was started here and remove temporary files. May be called twice."""
        link: Link | None = getattr(self, "_link", None)
        if link is not None:
            link.close()
        self._removed()

    def _open(self, model: Path | None, door: Door | None) -> tuple[Link, str]:
        """A conversation with a server, with another rank's process or with a new one; and the token to greet it."""
        if door is not None:
            return enter(door), door.token
        if self.settings.server:
            return connect(self.settings), shared_token()
        if model is None:
            raise UserError("vLLM needs a model to start with", remedy="give a Hugging Face folder")
        if not (model / "config.json").is_file() or not list(model.glob("*.safetensors")):
            raise UserError(
                "no Hugging Face folder with config.json and safetensors, which vLLM needs",
                remedy="save the model with thence.train.model.save_model, or give its folder",
                file=model,
            )
        log = Path(self.settings.log).expanduser() if self.settings.log else self._scratch[-1] / "vllm.log"
        return start(self.settings, model.resolve(), [*self._scratch, *self._orphans], log, self.door), ""

    def _cancel(self, number: int) -> None:
        """Stop sampling and read what was already on its way, so that the next request gets its own answers."""
        if not self._link.open:
            return
        try:
            self._link.ask({"op": "cancel", "id": number}, CANCEL_SECONDS)
            deadline = time.monotonic() + CANCEL_SECONDS
            while "end" not in self._link.answer(max(0.0, deadline - time.monotonic()), "stopping"):
                pass
        except UserError as error:
            log.warning("vLLM was ended: %s", error.problem)


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _check_version(version: int) -> None:
    if version < 0:
        raise ValueError(f"version {version} is negative")


def _response(
    link: Link, stamp: list[Any], message: dict[str, Any], logps: bool, left: set[int], limits: Sequence[int]
) -> tuple[int, Response]:
    try:
        place, response = checked_response(message, left, limits)
    except ValueError as error:
        raise link.not_understood(error) from None
    if message["stamp"] != stamp:
        raise link.failed(f"a response was sampled with weights {message['stamp']}, not with {stamp}", "other weights")
    if response.finish not in ("stop", "length"):
        raise link.failed(f"vLLM ended a response for another reason: {response.finish}")
    if logps and (len(response.logps) != len(response.token_ids) or not all(map(math.isfinite, response.logps))):
        raise link.failed("vLLM gave a response without a finite log-probability for every token")
    return place, response
