"""Hours of work in one process, watched from outside: does its memory grow, does it keep files open, does it slow down?

    python benchmarks/soak.py rl --minutes 60 --out benchmarks/results/soak-rl.json
    python benchmarks/soak.py grading --minutes 60 --out benchmarks/results/soak-grading.json

`rl` trains the embedded world's base, a step a second or so, with checkpoints. `grading` grades with `math`,
`math-boxed` and a reward function of your own; one answer in 200 hits the time limit or exhausts memory.
The work runs in a child with one thread; this process reads /proc (Linux). The exit code is 0 where the verdict is
"level".
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MOST_SAMPLES = 200  # kept in the file; the verdict is computed from all of them
MOST_GROWTH = 20.0  # MB an hour
MOST_SLOWER = 10.0  # percent, either way
COUNTED = ("fds", "threads", "children")
START_SECONDS, END_SECONDS = 180.0, 60.0
PAGE = os.sysconf("SC_PAGE_SIZE")
MB = 1e6

# --- The work, in the child -------------------------------------------------------------------------------------------


class Progress:
    """The number of things done, in a file that the parent reads. One write each, nothing kept."""

    def __init__(self, file: Path):
        self._file, self._parent, self.done = os.open(file, os.O_WRONLY | os.O_CREAT), os.getppid(), 0

    def add(self, count: int) -> None:
        self.done += count
        os.pwrite(self._file, b"%020d" % self.done, 0)
        if os.getppid() != self._parent:  # the parent was killed: nobody watches
            raise KeyboardInterrupt


def work_rl(folder: Path, progress: Progress) -> dict[str, Any]:
    """Train until interrupted. Returns nothing to report."""
    from thence.pipeline.progress import NullWatcher
    from thence.pipeline.run import run

    class Count(NullWatcher):
        def step(self, facts: Any) -> None:
            progress.add(1)

    # A learning rate so small that responses keep their length: speed may not change because the model does.
    rl = {"prompts": 16, "rollouts": 8, "max_tokens": 96, "reward": "exact", "steps": 10**6, "lr": 1e-9}
    rl |= {"weight_decay": 0.0, "micro_batch_tokens": 2048, "packing": True, "checkpoint_every": 10}
    recipe = {"name": "soak", "stages": ["rl"], "model": {"path": "world:chain/rich"}, "rl": rl}
    with contextlib.suppress(KeyboardInterrupt):
        run(
            recipe | {"data": {"source": ["world:chain"], "limit": 512}, "folder": str(folder / "run")}, watcher=Count()
        )
    return {}


OWN = """import time

def reward(prompt, response, answer):
    if response == "slow":
        time.sleep(1000)
    return float(response == answer)
"""
EVERY = 200  # of so many answers one is hostile
TOWER = "The answer is $9^{9^{9^{9}}}$"  # one multiplication in C that no exception can interrupt
BIG = r"\boxed{(x+y+z+w)^{2000}}"  # a billion terms: fills the least memory that a pool takes before its time is up
HOSTILE = {"math": (TOWER, BIG), "math-boxed": (TOWER.replace("$9", r"$\boxed{9").replace("}$", "}}$"), BIG)}
ROUND = 50


def work_grading(folder: Path, progress: Progress) -> dict[str, Any]:
    """Grade until interrupted. Returns how often each verdict was given, and those that were not the expected ones."""
    from thence.verify import load_reward

    own = folder / "own.py"
    own.write_text(OWN, encoding="utf-8")
    limits = {"seconds": 10.0, "workers": 1, "memory_mb": 192}
    verdicts: Counter[str] = Counter()
    unexpected: Counter[str] = Counter()
    with contextlib.ExitStack() as held, contextlib.suppress(KeyboardInterrupt):
        graders = {name: held.enter_context(load_reward(name, **limits)) for name in HOSTILE}
        graders["own"] = held.enter_context(load_reward(f"{own}:reward", seconds=2.0))
        given = dict.fromkeys(graders, 0)
        while True:
            for name, grader in graders.items():
                answers, responses, wanted = _round(name, given[name])
                given[name] += ROUND
                grades = grader.grade_many(["?"] * ROUND, responses, answers)
                for grade, want in zip(grades, wanted, strict=True):
                    found = f"{name}: {grade.verdict.value}" + (f", {grade.reason}" if want == "unknown" else "")
                    verdicts[found] += 1
                    if grade.verdict.value != want:
                        unexpected[f"{found} in place of {want}"] += 1
                progress.add(ROUND)
    return {"verdicts": dict(sorted(verdicts.items())), "unexpected": dict(sorted(unexpected.items()))}


def _round(name: str, given: int) -> tuple[list[str], list[str], list[str]]:
    """Gold answers, responses and expected verdicts, the same for a grader whatever the others do."""
    answers, responses, wanted = [], [], []
    for number in range(given, given + ROUND):
        answer, right = str(number % 1000), number % 3 > 0
        shown = answer if right else "-1"
        response, want = (rf"so \boxed{{{shown}}}" if name != "own" else shown), "right" if right else "wrong"
        if number % EVERY == EVERY // 2:
            kinds = HOSTILE.get(name, ("slow",))
            response, want = kinds[number // EVERY % len(kinds)], "unknown"
        answers.append(answer)
        responses.append(response)
        wanted.append(want)
    return answers, responses, wanted


WORK: dict[str, Callable[[Path, Progress], dict[str, Any]]] = {"rl": work_rl, "grading": work_grading}


def child(kind: str, folder: Path) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with SIGINT ignored
    facts = WORK[kind](folder, Progress(folder / "progress"))
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    return 0


# --- The watching, in the parent --------------------------------------------------------------------------------------


def done_so_far(folder: Path) -> int:
    try:
        return int((folder / "progress").read_text() or 0)
    except FileNotFoundError:
        return 0


def below(pid: int) -> dict[int, str]:
    """All processes under this one, by number, with their state; zombies ("Z") too."""
    parents: dict[int, list[tuple[int, str]]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                parents.setdefault(int(parent), []).append((int(entry.name), state))
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        for number, state in parents.get(waiting.pop(), []):
            found[number] = state
            waiting.append(number)
    return found


def rss_mb(pid: int) -> float:
    """Resident memory; 0 for a process that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / MB
    except (OSError, IndexError):
        return 0.0


def cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time of these processes and of the children that they have waited for."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError):  # it has ended meanwhile
            total += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return total / os.sysconf("SC_CLK_TCK")


def folder_mb(folder: Path) -> float:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # a checkpoint may be removed meanwhile
            total += file.lstat().st_size
    return total / MB


def sample(pid: int, folder: Path, start: float) -> dict[str, Any]:
    """What the process holds now. Raises OSError when it is gone."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    threads = next(int(line.split()[1]) for line in status if line.startswith("Threads:"))
    children = below(pid)
    return {
        "seconds": round(time.monotonic() - start, 2),
        "done": done_so_far(folder),
        "cpu_seconds": round(cpu_seconds([pid, *children]), 2),
        "rss_mb": round(rss_mb(pid), 2),
        "children_rss_mb": round(sum(rss_mb(number) for number in children), 2),
        "fds": len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208 - no Path: numbers are wanted, not links
        "threads": threads,
        "children": len(children),
        "zombies": sum(state == "Z" for state in children.values()),
        "folder_mb": round(folder_mb(folder), 3),
        "load": round(os.getloadavg()[0], 2),
    }


def watch(process: subprocess.Popen[bytes], folder: Path, minutes: float, every: float) -> tuple[list[Any], str]:
    """Samples from the first thing done on, and what ended them: "time", "interrupted" or "the work ended"."""
    samples: list[dict[str, Any]] = []
    with contextlib.suppress(KeyboardInterrupt):
        limit = time.monotonic() + START_SECONDS
        while not done_so_far(folder) and process.poll() is None:
            if time.monotonic() > limit:
                return samples, f"nothing was done in {START_SECONDS:g} s"
            time.sleep(0.2)
        start = time.monotonic()
        while process.poll() is None:
            with contextlib.suppress(OSError, StopIteration):
                samples.append(sample(process.pid, folder, start))
            left = start + minutes * 60 - time.monotonic()
            if left <= 0:
                return samples, "time"
            time.sleep(min(left, max(0.0, start + len(samples) * every - time.monotonic())))
        return samples, "the work ended"
    return samples, "interrupted"


def stop(process: subprocess.Popen[bytes]) -> int | None:
    """Interrupt the work as Ctrl-C does. Returns its exit code; None: it had to be killed."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        return process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


# --- The verdict ------------------------------------------------------------------------------------------------------


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope of the line of least squares, and its standard error."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    gradient = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    left = sum((y - mean_y - gradient * (x - mean_x)) ** 2 for x, y in points)
    return gradient, (left / max(len(points) - 2, 1) / spread) ** 0.5


def verdict(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The second half held against the second quarter.

    Memory is the slope over the second half. Files, threads and children are medians, and the last quarter's must not
    be above the second's either: a leak that comes late. Memory of the children (workers come and go) counts as growth
    where its slope is above the limit by two standard errors.

    Raises:
        ValueError: too few samples.
    """
    end = samples[-1]["seconds"] if samples else 0.0
    quarter = [s for s in samples if end / 4 <= s["seconds"] < end / 2]
    half = [s for s in samples if s["seconds"] >= end / 2]
    last = [s for s in samples if s["seconds"] >= end * 3 / 4]
    if len(quarter) < 2 or len(half) < 3:
        raise ValueError(f"{len(samples)} samples are too few for a verdict: 8 are enough")
    own, own_error = slope([(s["seconds"] / 3600, s["rss_mb"]) for s in half])
    others, others_error = slope([(s["seconds"] / 3600, s["children_rss_mb"]) for s in half])
    # The quarter reaches to the first sample of the half, so that no work is left out.
    before, after = _speed([*quarter, half[0]]), _speed(half)
    lone = [_speed([*quarter, half[0]], "cpu_seconds"), _speed(half, "cpu_seconds")]
    change = 100 * (after / before - 1) if before else -100.0
    found: dict[str, Any] = {
        "memory_growth_mb_per_hour": round(own, 2),
        "memory_growth_error": round(own_error, 2),
        "children_memory_growth_mb_per_hour": round(others, 2),
        "children_memory_growth_error": round(others_error, 2),
        "speed_per_s": [round(before, 3), round(after, 3)],
        "speed_change_percent": round(change, 2),
        "speed_per_cpu_second": [round(speed, 3) for speed in lone],
    }
    wrong = [f"memory grows by {own:.1f} MB an hour"] if own >= MOST_GROWTH else []
    if others - 2 * others_error >= MOST_GROWTH:
        wrong.append(f"memory of the children grows by {others:.1f} ± {2 * others_error:.1f} MB an hour")
    for name in COUNTED:
        medians = [statistics.median(s[name] for s in part) for part in (quarter, half, last)]
        found[name] = medians
        if max(medians) > medians[0]:
            wrong.append(f"{name} grow from {medians[0]:g} to {max(medians):g}")
    # Other work on the machine slows the clock, but hardly the processor time: the second figure says which it was.
    by_cpu = 100 * (lone[1] / lone[0] - 1) if lone[0] else -100.0
    if max(abs(change), abs(by_cpu)) > MOST_SLOWER:
        wrong.append(f"speed changes by {change:+.1f}%, by {by_cpu:+.1f}% for a second of processor time")
    return {"verdict": "not level" if wrong else "level", "wrong": wrong, **found}


def _speed(samples: Sequence[dict[str, Any]], clock: str = "seconds") -> float:
    return (samples[-1]["done"] - samples[0]["done"]) / max(samples[-1][clock] - samples[0][clock], 1e-9)


def thinned(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most 200 of them, evenly, the last among them; each with the speed since the one before it in this list."""
    step = max(1, -(-len(samples) // MOST_SAMPLES))
    kept = list(samples[::-1][::step][::-1])
    speeds = [None, *(round(_speed(pair), 3) for pair in itertools.pairwise(kept))]
    return [{**row, "per_s": speed} for row, speed in zip(kept, speeds, strict=True)]


# --- The command ------------------------------------------------------------------------------------------------------


def soak(kind: str, minutes: float, every: float) -> dict[str, Any]:
    """Run the work and watch it. Returns the record."""
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join(part for part in (str(root / "src"), os.environ.get("PYTHONPATH", "")) if part)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with tempfile.TemporaryDirectory(prefix="thence-soak-") as temporary:
        folder = Path(temporary)
        command = [sys.executable, str(Path(__file__).resolve()), "child", kind, temporary]
        with (folder / "stderr").open("wb") as errors:
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
            )
        family: dict[int, str] = {}
        try:
            samples, ended = watch(process, folder, minutes, every)
        finally:
            if process.poll() is None:
                family = below(process.pid)
            code = stop(process)
        time.sleep(1.0)
        left = [pid for pid in family if Path(f"/proc/{pid}").exists()]
        facts = json.loads((folder / "facts.json").read_text()) if (folder / "facts.json").exists() else {}
        said = (folder / "stderr").read_text(errors="replace")[-2000:]
    try:
        judged = verdict(samples)
    except ValueError as error:
        judged = {"verdict": "none", "wrong": [str(error)]}
    more = [] if ended == "time" else [f"ended by: {ended}"]
    more += [] if code == 0 else ["it had to be killed" if code is None else f"exit code {code}"]
    more += [f"processes left behind: {left}"] if left else []
    more += [f"{n} times {what}" for what, n in facts.get("unexpected", {}).items()]
    if more:
        judged["verdict"] = "not level" if judged["verdict"] == "level" else judged["verdict"]
        judged["wrong"] += more
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python benchmarks/soak.py {kind} --minutes {minutes:g}",
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()},
        **judged,
        "facts": facts,
        "said": said if code else "",
        "samples_taken": len(samples),
        "samples": thinned(samples),
    }


def main() -> int:
    if sys.argv[1:2] == ["child"]:
        return child(sys.argv[2], Path(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=list(WORK))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between samples")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    record = soak(arguments.work, arguments.minutes, arguments.every)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, value in record.items():
        if name not in ("samples", "machine", "said") or (name == "said" and value):
            print(f"{name}: {value}")
    return 0 if record["verdict"] == "level" else 1


if __name__ == "__main__":
    sys.exit(main())
