"""The process that samples for a trainer: see :mod:`thence.rollout.child`, which starts it and which it ends with.

python -m thence.pipeline.sampling_process FD
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thence.errors import UserError, first_line
from thence.framed import Wire
from thence.rollout.child import ALIVE_SECONDS
from thence.train.model import fit_float64


class Voice:
    """Says things to the trainer from several threads, one message at a time; ends the process once nobody hears."""

    def __init__(self, wire: Wire, scratch: list[Path]):
        self.wire, self.scratch, self._lock = wire, scratch, threading.Lock()
        self.works = threading.Event()
        """Set while the trainer waits for something: nobody reads what is said at other times."""

    def say(self, message: dict[str, Any]) -> None:
        try:
            with self._lock:
                self.wire.send(message)  # for as long as it takes: a trainer may be stopped, and go on
        except OSError:  # the trainer is gone: what was written for this process is nobody's
            self.leave(1)

    def leave(self, code: int) -> None:
        """Remove what was written for this process, and end it, whatever its threads do."""
        for folder in self.scratch:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(code)


def serve(wire: Wire) -> None:
    """Answer until the trainer says stop, or is gone."""
    start = next_message(wire)
    if start is None:
        return
    voice = Voice(wire, [Path(folder) for folder in start["scratch"]])
    threading.Thread(target=_stay_alive, args=(voice,), daemon=True).start()
    try:
        voice.works.set()
        model = made(start["model"], start["device"])
        voice.say({"ready": True})
        voice.works.clear()
        version = -1
        while (asked := next_message(wire)) is not None and asked["op"] != "stop":
            voice.works.set()
            if asked["op"] == "load":
                load(model, Path(asked["folder"]))
                version = asked["version"]
                voice.say({"loaded": version})
            else:
                answer(voice, model, version, asked)
            voice.works.clear()
    except UserError as error:
        voice.say({"failed": error.problem, "remedy": error.remedy})
    except Exception as error:
        traceback.print_exc()
        voice.say({"failed": f"{type(error).__name__}: {first_line(error)}"})
    voice.leave(0)


def next_message(wire: Wire) -> dict[str, Any] | None:
    """The trainer's next message; None where it is gone."""
    while True:
        try:
            return wire.receive(3600.0)
        except TimeoutError:
            continue
        except OSError:
            return None


def made(model: dict[str, Any], device: str) -> Any:
    """The trainer's model without its weights: they are handed over before anything is sampled.

    Args:
        model: ``config``, ``class``, ``attention`` and ``dtype`` of the trainer's.

    Raises:
        UserError: transformers makes another class from this configuration.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[model["config"]["model_type"]].from_dict(model["config"])
    dtype = getattr(torch, model["dtype"])
    found: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=model["attention"])
    if type(found).__name__ != model["class"]:
        raise _misfit(f"its configuration makes {type(found).__name__}, and the trainer's is {model['class']}")
    fit_float64(found, dtype)
    return found.to(device).eval().requires_grad_(False)


def load(model: Any, folder: Path) -> None:
    """Copy weights into the model, one tensor at a time.

    Raises:
        UserError: a parameter or buffer of the model is not among them, or one of them is none of the model's.
    """
    import torch
    from safetensors.torch import load_file

    own = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    left = set(own)
    with torch.no_grad():
        for file in sorted(folder.glob("*.safetensors")):
            for name, value in load_file(file).items():
                if name not in own or own[name].shape != value.shape or own[name].dtype != value.dtype:
                    raise _misfit(f"{name} of shape {tuple(value.shape)} and type {value.dtype} is none of its own")
                own[name].copy_(value)
                left.discard(name)
    if left:
        raise _misfit(f"{min(left)} was not handed over")


def _misfit(why: str) -> UserError:
    return UserError(
        f"the trainer's model cannot be built from its configuration: {why}",
        remedy='set ahead = 0, or sample with engine = "vllm"',
    )


def answer(voice: Voice, model: Any, version: int, asked: dict[str, Any]) -> None:
    """Sample what is asked for; say every response as soon as it ends.

    Raises:
        UserError: other weights are asked for than were loaded, or the model cannot be sampled from.
    """
    from thence.rollout.native import Sampling, stream

    if asked["version"] != version:
        raise UserError(
            f"weights of version {asked['version']} are asked for, and it has version {version}",
            remedy="run the same command again",
        )
    sampling = Sampling(**{**asked["sampling"], "stop_ids": tuple(asked["sampling"]["stop_ids"])})
    prompts = [asked["prompts"][i] for i in asked["of"]]
    stamp = [asked["id"], version]
    for row, response in stream(model, prompts, asked["seeds"], sampling):
        said = {"token_ids": response.token_ids, "logps": response.logps, "finish": response.finish}
        voice.say({"done": True, "stamp": stamp, "row": row, **said})
    voice.say({"end": asked["id"]})


def _stay_alive(voice: Voice) -> None:
    while True:
        voice.works.wait()
        voice.say({"alive": True})
        time.sleep(ALIVE_SECONDS)


def main(arguments: Sequence[str]) -> None:
    """The command: the number of the socket to the trainer."""
    serve(Wire(socket.socket(fileno=int(arguments[0]))))


if __name__ == "__main__":
    main(sys.argv[1:])
