"""Two ranks that share weights (fsdp2) are killed, and one process resumes: are the losses those of a run by itself?

    python benchmarks/kill_and_move.py --gsm8k FOLDER --out benchmarks/results/kill-and-move.json

The recipe is `gsm8k-smollm2`, a real model on real data, with few and short SFT steps. (In so few tokens the model
solves nothing, and RL would have no loss to compare.) It runs undisturbed on one process, and once for every `--kill
STAGE:STEP`: under torchrun on two ranks, whose processes get SIGKILL after the checkpoint of that step, and then with
`--parallel none` on one process to the end. Every line of metrics is compared with the undisturbed run's. Exit code 1
where a loss is further off than `--within`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SHORT: dict[str, Any] = {
    "stages": ["sft"],
    "data.limit": 64,
    "data.max_response_tokens": 96,
    "data.max_prompt_tokens": 96,
    "sft.steps": 4,
    "sft.batch": 5,
    "sft.micro_batch_tokens": 256,
    "sft.held_out": 3,
    "sft.held_out_every": 2,
    "sft.checkpoint_every": 2,
}
COMPARED = ("loss", "grad_norm", "entropy", "held_out_loss")
"""Figures of a line that rounding may change; `held_out_loss` is there where it was measured."""
EXACT = ("stage", "step", "lr", "sequences", "tokens", "trained_tokens", "reward", "response_tokens", "flops")
"""Those that it may not."""
PATIENCE_SECONDS = 900.0


class Run:
    """A recipe with flags, in a folder of its own.

    Args:
        recipe: the name of a shipped one, or a file.
        flags: dotted names and values.
    """

    def __init__(self, recipe: str, flags: Mapping[str, Any], folder: Path):
        self.recipe, self.flags, self.folder = recipe, flags, folder

    def command(self, parallel: str, ranks: int = 1, **sharding: Any) -> list[str]:
        """How a user starts it; ``sharding`` has settings of that table."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        settings = self.flags | {"folder": str(self.folder), "parallel": parallel}
        settings |= {f"sharding.{name}": value for name, value in sharding.items()}
        given = [part for name, value in settings.items() for part in (f"--{name}", _flag(value))]
        return [sys.executable, *torchrun, "-m", "thence", "run", self.recipe, *given]

    def to_the_end(self, parallel: str = "none") -> None:
        """Run or resume on one process. Raises RuntimeError where it fails."""
        done = subprocess.run(self.command(parallel), env=_environment(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])

    def killed_after(
        self, stage: str, step: int, parallel: str = "fsdp2", ranks: int = 2, **sharding: Any
    ) -> dict[str, Any]:
        """Start it on ranks and kill them, by SIGKILL, once the checkpoint of a step is there.

        Returns:
            The steps that had been logged then, and how torchrun ended.

        Raises:
            RuntimeError: the checkpoint did not come, or the run ended before it was killed.
        """
        place = self.folder / "stages" / stage / "checkpoints" / f"step-{step:06d}" / "manifest.json"
        with tempfile.TemporaryFile("w+") as said:
            command = self.command(parallel, ranks, **sharding)
            torchrun = subprocess.Popen(command, env=_environment(), stdout=said, stderr=said)
            end = time.monotonic() + PATIENCE_SECONDS
            try:
                while not place.exists():
                    if torchrun.poll() is not None or time.monotonic() > end:
                        said.seek(0)
                        raise RuntimeError(f"no checkpoint of step {step} of {stage}: {said.read()[-3000:]}")
                    time.sleep(0.02)
                workers = _children(torchrun.pid)
                for worker in workers:
                    os.kill(worker, signal.SIGKILL)
                code = torchrun.wait(timeout=120)
            finally:
                torchrun.kill()
                torchrun.wait()
        if len(workers) != ranks or code == 0:
            raise RuntimeError(f"the run ended before it was killed: {len(workers)} ranks, exit code {code}")
        return {"logged": [[line["stage"], line["step"]] for line in self.lines()], "exit_code": code}

    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics of training stages."""
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return [row for row in rows if "loss" in row]

    def responses(self) -> list[Any]:
        """The responses that RL stages kept, in order; those of the first rank."""
        files = sorted(self.folder.glob("stages/*/samples.jsonl"))
        rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        return [[row["step"], row["index"], row["response"], row["score"]] for row in rows]

    def weights(self) -> dict[str, Any]:
        """What the last training stage has published."""
        from safetensors.torch import load_file

        stages = [row["stage"] for row in self.lines()]
        return load_file(self.folder / "stages" / stages[-1] / "model" / "model.safetensors")


def differences(found: Run, alone: Run) -> dict[str, Any]:
    """How far a run is off an undisturbed one: the largest relative difference of each figure, and what is not equal.

    The weights' is that of their Euclidean norms, all tensors together.
    """
    worst, other = dict.fromkeys(COMPARED, 0.0), []
    lines, expected = found.lines(), alone.lines()
    if len(lines) != len(expected):
        other.append(f"{len(lines)} lines of metrics, not {len(expected)}")
    for line, right in zip(lines, expected, strict=False):
        where = f"step {right['step']} of {right['stage']}"
        other += [f"{name} of {where}" for name in EXACT if line.get(name) != right.get(name)]
        for name in COMPARED:
            if (name in line) != (name in right):
                other.append(f"{name} of {where}")
            elif name in right:
                worst[name] = max(worst[name], abs(line[name] - right[name]) / max(abs(right[name]), 1e-3))
    theirs = alone.responses()
    # two ranks each have half of a batch, and the first one keeps its own
    if any(row not in theirs for row in found.responses()):
        other.append("responses")
    weights, whole = found.weights(), alone.weights()
    if weights.keys() != whole.keys():
        other.append("names of weights")
        return {"relative": worst, "not_equal": other}
    squares = [float((weights[name].double() - whole[name].double()).square().sum()) for name in whole]
    size = sum(float(value.double().square().sum()) for value in whole.values())
    return {"relative": worst | {"weights": (sum(squares) / size) ** 0.5}, "not_equal": other}


def try_kill(recipe: str, flags: Mapping[str, Any], folder: Path, alone: Run, kill: str) -> dict[str, Any]:
    """One run that is killed at ``STAGE:STEP`` on two ranks and resumed on one process."""
    stage, _, step = kill.partition(":")
    run = Run(recipe, flags, folder / f"{stage}-{step}")
    killed = run.killed_after(stage, int(step))
    run.to_the_end()
    return {"kill": kill, **killed, **differences(run, alone), "losses": [row["loss"] for row in run.lines()]}


def _flag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _children(parent: int) -> list[int]:
    """The processes that a process has started (Linux)."""
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="utf-8")
    return [int(number) for number in found.split()]


def _environment() -> dict[str, str]:
    left = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return left | {"OMP_NUM_THREADS": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, required=True, help="the folder with train.jsonl")
    parser.add_argument("--kill", action="append", help="STAGE:STEP; may be given again")
    parser.add_argument("--within", type=float, default=1e-5, help="largest relative difference of a loss")
    parser.add_argument("--work", type=Path, help="where the runs go; default: a temporary folder")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    flags = SHORT | {"data.source": [str(given.gsm8k.absolute() / "train.jsonl")]}
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.work or Path(temporary)
        alone = Run("gsm8k-smollm2", flags, folder / "alone")
        alone.to_the_end()
        kills = [try_kill("gsm8k-smollm2", flags, folder, alone, kill) for kill in given.kill or ["sft:2"]]
        losses = [row["loss"] for row in alone.lines()]
    record = {"date": datetime.now(UTC).date().isoformat(), "recipe": "gsm8k-smollm2", "flags": SHORT}
    record |= {"versions": versions(), "within": given.within, "losses": losses, "kills": kills}
    holds = all(kill["relative"]["loss"] <= given.within and not kill["not_equal"] for kill in kills)
    text = json.dumps(record | {"holds": holds}, indent=1)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n", encoding="utf-8")
    return 0 if holds else 1


def versions() -> dict[str, str]:
    """Of what decides the figures."""
    from importlib.metadata import version

    return {name: version(name) for name in ("thence", "torch", "transformers")}


if __name__ == "__main__":
    raise SystemExit(main())
