"""What one busy process beside it costs: SFT, a GRPO step and sampling, alone and beside a plain Python loop.

    python benchmarks/neighbour.py DATA --peer PEERS/bin/python --out benchmarks/results/neighbour.json

DATA is the folder of `workloads.py`. One process for each arm stays loaded; short bursts take turns, arm by arm, alone
and beside the neighbour, so that a machine that slows down slows all. `others_cores` is what the rest of the machine
took meanwhile (from /proc/stat). A burst beside more than `--quiet` is repeated while there is time. `one core` is one
thread alone. The peer is TRL's SFTTrainer; without TRL transformers' Trainer. Linux only; three minutes when idle.

Arms: thence started on the idle machine; `started beside` a neighbour, so that its threads sleep at once; `spinning`,
as it would be without its choice; `free cores`, started beside a neighbour with THENCE_THREADS=auto; the peer.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common

TICK = os.sysconf("SC_CLK_TCK")
SPINS = {"GOMP_SPINCOUNT": "300000"}
"""What libgomp does if nothing is said: the value of its own."""
OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "THENCE_THREADS")
"""Not taken over from whoever starts the benchmark."""
WORK = ("sft", "grpo", "sampling")


# --- The workers: each does bursts of work when it is told to -------------------------------------------------------


def thence_steps(data: Path, work: str) -> Iterator[int]:
    """Endless steps of thence on the 1.07M model; each gives the tokens that it trained on or sampled."""
    import torch

    import thence
    from thence.data.example import Example
    from thence.data.trajectory import Trajectory
    from thence.methods.base import make_batch
    from thence.methods.grpo import Grpo
    from thence.methods.sft import SftMethod
    from thence.pipeline.prompts import to_prompts
    from thence.pipeline.sft_stage import trajectories_of
    from thence.recipe import Data, Model
    from thence.train.model import load_model
    from thence.train.step import StepSettings

    loaded = load_model(Model(path=str(data / "small"), compute_dtype="float32"), torch.device("cpu"))
    trainer = thence.Trainer(loaded.model, 1e-5, StepSettings(2048, True), weight_decay=0.0)
    if work == "sft":
        rows = common.read_jsonl(data / "small-sft.jsonl")
        examples = [Example(prompt=r["prompt"], demonstration=r["completion"]) for r in rows]
        prompts = to_prompts(Data(template="none"), examples, loaded.tokenizer)
        order = itertools.cycle(prompts)
        while True:
            chosen = list(itertools.islice(order, common.SFT_BATCH))
            yield trainer.step(make_batch(SftMethod(), trajectories_of(chosen, "response"))).tokens
    rows = common.read_jsonl(data / "small-prompts.jsonl")
    prompts = to_prompts(Data(template="none"), [Example(prompt=r["prompt"]) for r in rows], loaded.tokenizer)
    repeated = [prompt for prompt in prompts for _ in range(common.GENERATIONS)]
    sampling = thence.Sampling(max_tokens=common.NEW_TOKENS, stop_ids=(), rows=len(repeated))
    for step in itertools.count():
        seeds = [common.SEED + step * len(repeated) + i for i in range(len(repeated))]
        responses = thence.sample(loaded.model, [prompt.token_ids for prompt in repeated], seeds, sampling)
        if work == "grpo":
            texts = loaded.tokenizer.batch_decode([r.token_ids for r in responses], skip_special_tokens=True)
            trajectories = [
                Trajectory(prompt, tuple(response.token_ids), score=common.reward(text), finish=response.finish)
                for prompt, response, text in zip(repeated, responses, texts, strict=True)
            ]
            trainer.step(make_batch(Grpo(), trajectories))
        yield sum(len(response.token_ids) for response in responses)


class Bursts:
    """Answers commands of the parent: `WORK SECONDS` does whole steps of that work until the seconds are over."""

    def __init__(self, tool: str) -> None:
        self.answer, sys.stdout = sys.stdout, sys.stderr  # nothing else may speak to the parent
        import torch

        waiting = {name: os.environ[name] for name in OWN[:3] if name in os.environ}
        self._say({"tool": tool, "threads": torch.get_num_threads(), "waiting": waiting})

    def serve(self, steps: Callable[[str], Iterator[int]]) -> None:
        """Take commands until the parent has no more."""
        started: dict[str, Iterator[int]] = {}
        while command := self.next():
            work, seconds = command
            if work not in started:
                started[work] = steps(work)
                next(started[work])  # the first one loads and warms up
            begin, cpu = time.perf_counter(), time.process_time()
            tokens, count = 0, 0
            while time.perf_counter() - begin < seconds:
                tokens, count = tokens + next(started[work]), count + 1
            self.tell(tokens, count, time.perf_counter() - begin, time.process_time() - cpu)

    def next(self) -> tuple[str, float] | None:
        """The next command; None at the end."""
        words = sys.stdin.readline().split()
        return (words[0], float(words[1])) if words else None

    def tell(self, tokens: int, steps: int, seconds: float, cpu: float) -> None:
        """What a burst has done, in tokens, steps, wall seconds and seconds of processor time."""
        self._say({"tokens": tokens, "steps": steps, "seconds": seconds, "cpu_seconds": cpu})

    def _say(self, message: dict[str, Any]) -> None:
        print(json.dumps(message), file=self.answer, flush=True)


def serve_peer(data: Path) -> None:
    """TRL's SFTTrainer, or else transformers' Trainer, which stops after a step whenever a burst is over."""
    import peer_transformers_sft as plain
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    try:
        import trl  # pyright: ignore[reportMissingImports]
    except ImportError:
        trl = None
    args = argparse.Namespace(steps=10**6, warmup=0, micro_batch=8, accumulation=common.SFT_BATCH // 8, seed=1)
    clock = common.StepClock()
    bursts = Bursts("trl.SFTTrainer" if trl else "transformers.Trainer")

    class Commands(TrainerCallback):
        def __init__(self) -> None:
            self.until = self.cpu = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.end_step()
            if self.until and time.perf_counter() < self.until:
                return
            if self.until:
                bursts.tell(sum(clock.tokens), len(clock.tokens), sum(clock.seconds), time.process_time() - self.cpu)
            command = bursts.next()  # the first step is the warm-up: it comes here without a command
            if command is None:
                raise KeyboardInterrupt
            clock.start()
            clock.tokens, clock.seconds, self.cpu = [], [], time.process_time()
            self.until = time.perf_counter() + command[1]

    model = AutoModelForCausalLM.from_pretrained(data / "small", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(data / "small")
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        settings = common.trainer_settings(args, folder) | {"learning_rate": 1e-5}
        if trl:
            from datasets import Dataset

            trainer = common.counting(trl.SFTTrainer, clock)(
                model=model,
                args=trl.SFTConfig(**settings, completion_only_loss=True, packing=False, max_length=None),
                train_dataset=Dataset.from_list(common.read_jsonl(data / "small-sft.jsonl")),
                processing_class=tokenizer,
                callbacks=[Commands()],
            )
        else:
            trainer = common.counting(Trainer, clock)(
                model=model,
                args=TrainingArguments(**settings, remove_unused_columns=False),
                train_dataset=plain.tokenised(data / "small-sft.jsonl", tokenizer),
                data_collator=lambda rows: plain.collate(rows, tokenizer.pad_token_id),
                callbacks=[Commands()],
            )
        trainer.train()


def work(args: argparse.Namespace) -> None:
    """Be the process of one arm."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if args.worker == "peer":
        serve_peer(args.data)
        return
    import thence
    from thence.cores import take_free_cores

    take_free_cores(os.environ)
    Bursts(f"thence {thence.__version__}").serve(lambda name: thence_steps(args.data, name))


# --- The parent: bursts in turn, alone and beside the neighbour -----------------------------------------------------


class Arm:
    """A worker process with its threads and its way of waiting."""

    def __init__(self, python: str, data: Path, side: str, settings: dict[str, str]) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in OWN} | settings
        words = [python, __file__, str(data), "--worker", side]
        self.work = WORK if side == "thence" else WORK[:1]
        self.settings, self.bursts = settings, []
        self.tool, self.threads, self.waiting = side, 0, {}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, env=environment, stdin=pipe, stdout=pipe, text=True)

    def begin(self) -> None:
        """Wait until it is loaded, and warm every kind of work up."""
        told = self._read()
        self.tool, self.threads, self.waiting = told["tool"], told["threads"], told["waiting"]
        for work in self.work:
            self.burst(work, 0.0)

    def burst(self, work: str, seconds: float) -> dict[str, Any]:
        """What the worker did in this time. Raises SystemExit where it has died."""
        assert self.process.stdin is not None
        print(work, seconds, file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"no measurement: the process of {self.settings or 'the defaults'} ended")
        return json.loads(line)


def busy_seconds(pid: int | None = None) -> float:
    """Processor time since the start of a process with all of its threads, or of the whole machine."""
    if pid is None:
        user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
        return (user + nice + system + irq + softirq) / TICK
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


@contextlib.contextmanager
def neighbour(wanted: bool) -> Iterator[list[int]]:
    """A process that counts and never waits, pinned to nothing; gives the ids of the processes that were started."""
    if not wanted:
        yield []
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        yield [process.pid]
    finally:
        process.kill()
        process.wait()


def measure(arm: Arm, work: str, beside: bool, seconds: float) -> dict[str, Any]:
    """One burst: tokens and steps per second, and what others took of the machine meanwhile, in cores."""
    with neighbour(beside) as pids:
        own = [arm.process.pid, os.getpid(), *pids]
        begin, all_before, own_before = time.perf_counter(), busy_seconds(), sum(map(busy_seconds, own))
        told = arm.burst(work, seconds)
        whole, ours = busy_seconds() - all_before, sum(map(busy_seconds, own)) - own_before
        others = max(0.0, whole - ours) / (time.perf_counter() - begin)
    return {
        "work": work,
        "beside": beside,
        "tokens_per_s": round(told["tokens"] / told["seconds"], 1),
        "cpu_seconds_per_1000_tokens": round(1000 * told["cpu_seconds"] / told["tokens"], 4),
        "step_seconds": round(told["seconds"] / told["steps"], 4),
        "others_cores": round(others, 3),
    }


def start(args: argparse.Namespace) -> dict[str, Arm]:
    """All workers. Those that look at how busy the machine is load one after the other."""
    own = sys.executable
    arms = {"thence": Arm(own, args.data, "thence", {})}
    arms["thence"].begin()
    with neighbour(True):  # it is there when they look
        for name, settings in (("started beside", {}), ("free cores", {"THENCE_THREADS": "auto"})):
            arms[name] = Arm(own, args.data, "thence", settings)
            arms[name].begin()
    arms["spinning"] = Arm(own, args.data, "thence", SPINS)
    if arms["free cores"].threads > 1:
        arms["one thread"] = Arm(own, args.data, "thence", {"OMP_NUM_THREADS": "1"})
    for more in args.arm:
        name, _, words = more.partition(":")
        arms[name] = Arm(own, args.data, "thence", dict(word.split("=", 1) for word in words.split(",") if word))
    return arms | {"peer": Arm(args.peer, args.data, "peer", {})}


def run(arms: dict[str, Arm], args: argparse.Namespace) -> None:
    """Take turns; a burst beside others is done again, as long as there is time for it."""
    end = time.monotonic() + args.limit
    for arm in arms.values():
        if not arm.threads:
            arm.begin()
    plan = [
        (arm, work, beside) for work in WORK for arm in arms.values() if work in arm.work for beside in (False, True)
    ]
    for done in range(args.rounds):
        if done and time.monotonic() > end:
            return
        for arm, work, beside in plan:
            tries = [measure(arm, work, beside, args.seconds)]
            while tries[-1]["others_cores"] > args.quiet and len(tries) < args.tries and time.monotonic() < end:
                tries.append(measure(arm, work, beside, args.seconds))
            arm.bursts.append(min(tries, key=lambda burst: burst["others_cores"]))


def summary(arms: dict[str, Arm]) -> list[dict[str, Any]]:
    """Medians of the rounds by work and arm, and what is left beside the neighbour of one core's rate alone."""

    def median(arm: Arm, work: str, beside: bool, field: str) -> float:
        chosen = [burst[field] for burst in arm.bursts if burst["work"] == work and burst["beside"] == beside]
        return statistics.median(chosen)

    rows = []
    for work in WORK:
        one = median(arms.get("one thread", arms["free cores"]), work, False, "tokens_per_s")
        for name, arm in arms.items():
            if work in arm.work:
                alone, beside = (median(arm, work, side, "tokens_per_s") for side in (False, True))
                rows.append(
                    {
                        "work": work,
                        "arm": name,
                        "alone_tokens_per_s": alone,
                        "beside_tokens_per_s": beside,
                        "beside_of_one_core": round(beside / one, 3) if arm.tool.startswith("thence") else None,
                        "beside_of_alone": round(beside / alone, 3),
                        "alone_step_seconds": median(arm, work, False, "step_seconds"),
                        "beside_step_seconds": median(arm, work, True, "step_seconds"),
                        "cpu_seconds_per_1000_tokens": median(arm, work, True, "cpu_seconds_per_1000_tokens"),
                        "others_cores": max(median(arm, work, side, "others_cores") for side in (False, True)),
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of workloads.py")
    parser.add_argument("--peer", default=sys.executable, help="Python with TRL or transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a burst; whole steps")
    parser.add_argument("--quiet", type=float, default=0.1, help="cores that others may take during a burst")
    parser.add_argument("--tries", type=int, default=3, help="of a burst beside others")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds after which no burst is repeated")
    parser.add_argument("--arm", action="append", default=[], metavar="NAME:KEY=VALUE,...", help="one more of thence")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=("thence", "peer"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    started, load = datetime.datetime.now(datetime.UTC), os.getloadavg()[0]
    names = {str(args.data): "DATA", args.peer: "PEERS/bin/python"}
    arms = start(args)
    try:
        run(arms, args)
    finally:
        for arm in arms.values():
            arm.process.kill()
    record = {
        "what": __doc__.splitlines()[0],
        "command": ["python", *(names.get(word, word) for word in sys.argv)],
        "date": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.datetime.now(datetime.UTC) - started).total_seconds(), 1),
        "load_average_before": load,
        "machine": common.machine(),
        "summary": summary(arms),
        "arms": {
            name: {
                "tool": arm.tool,
                "threads": arm.threads,
                "environment": arm.settings,
                "waiting": arm.waiting,
                "bursts": arm.bursts,
            }
            for name, arm in arms.items()
        },
    }
    print(f"{'work':9} {'arm':14} {'alone':>8} {'beside':>8}  of one core  of alone  others (cores)")
    for row in record["summary"]:
        share = "" if row["beside_of_one_core"] is None else f"{row['beside_of_one_core']:.2f}"
        figures = f"{row['alone_tokens_per_s']:8.0f} {row['beside_tokens_per_s']:8.0f}  {share:>11}"
        print(f"{row['work']:9} {row['arm']:14} {figures}  {row['beside_of_alone']:8.2f}  {row['others_cores']:.2f}")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
