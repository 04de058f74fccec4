"""A campaign of kills: commands are killed with SIGKILL, run again until they end, and compared with undisturbed ones.

    python -m tests.chaos.campaign --kills 200 --out benchmarks/results/chaos-kills.json

Half of the kills fall on a change of a file, one kind after the other (each temporary file, rename, flush, torn line
that an undisturbed run was seen to make); the other half at random moments. What a killed command left is what the
next one finds. A case holds if the last command exits with 0 and weights, metrics, samples and results are those of a
command that nobody killed. Exit code 1 if any case does not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos import deadly
from tests.chaos.deadly import Plan
from tests.chaos.results import differences, left_over, results_of
from tests.chaos.scenarios import SCENARIOS, Scenario

LIMIT = 300.0  # seconds that one command may take
ROUNDS = 5
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Kill:
    """When an attempt is killed: at a change of a file, or (``after``) so many seconds after its start."""

    kind: str | None = None
    count: int = 0
    torn: bool = False
    worker: bool = False
    after: float | None = None


@dataclass
class Case:
    """One command, killed one or several times, and how it ended."""

    scenario: str
    kills: list[Kill]
    deaths: list[int] = field(default_factory=list)
    worker_deaths: int = 0
    """Processes of the command that died while the command went on: it starts others in their place."""
    exit_code: int | None = None
    differences: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    output: str = ""

    @property
    def holds(self) -> bool:
        return self.exit_code == 0 and not self.differences and not self.left_over


class Command:
    """Runs a scenario's command in a process that can be killed: forked where nothing needs a process of its own."""

    def __init__(self, scenario: Scenario, inputs: Path):
        self.scenario, self.inputs = scenario, inputs

    def attempt(self, folder: Path, kill: Kill | None, log: Path, record: Path | None = None) -> int:
        """Run it once. Returns the exit code, negative for a signal."""
        arguments = self.scenario.make(self.inputs, folder)
        plan = Plan(str(folder), record=None if record is None else str(record))
        if kill is not None and kill.after is None:
            plan = Plan(str(folder), kill.kind, kill.count, kill.torn)
        start = self._spawn if self.scenario.side_by_side else self._fork
        process = start(arguments, plan, log, kill is not None and kill.worker)
        return _wait(process, kill.after if kill is not None else None)

    def _fork(self, arguments: Sequence[str], plan: Plan, log: Path, worker: bool) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            os.setpgid(0, 0)
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            deadly.arm(plan)
            from thence.cli import main

            code = main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _spawn(self, arguments: Sequence[str], plan: Plan, log: Path, worker: bool) -> int:
        whose = "thence.compare.worker" if worker else "-m thence compare"
        paths = [str(HERE / "armed"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            deadly.VARIABLE: deadly.plan_to_text(plan, whose),
            "PYTHONPATH": os.pathsep.join(paths),
        }
        with log.open("ab") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", "thence", *arguments],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        child.returncode = 0  # waited for below, by its number
        return child.pid


def _wait(process: int, kill_after: float | None) -> int:
    """Wait for a process, and kill it (and only it) when its time has come."""
    began = time.monotonic()
    killed = False
    while True:
        pid, status = os.waitpid(process, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - began
        if not killed and ((kill_after is not None and passed >= kill_after) or passed > LIMIT):
            os.kill(process, signal.SIGKILL)
            killed = True
        time.sleep(0.002)


@dataclass
class Undisturbed:
    """What a command does when nobody kills it."""

    results: dict[str, Any]
    kinds: Counter[str]
    worker_kinds: Counter[str]
    seconds: float


def survey(command: Command, place: Path) -> Undisturbed:
    """Run the command once, undisturbed; keep its results and the kinds of its changes. Raises RuntimeError."""
    log, record = place / "undisturbed.log", place / "kinds"
    folder = place / "undisturbed"
    began = time.monotonic()
    code = command.attempt(folder, None, log, record)
    if code != 0:
        raise RuntimeError(f"{command.scenario.name} fails undisturbed:\n{log.read_text(errors='replace')[-3000:]}")
    kinds = Counter(record.read_text().splitlines())
    # the changes inside of runs are made by the comparison's workers, and they are those of any run
    worker_kinds = Counter({"rename .writing-N": 3, "open .done.json.writing": 1})
    return Undisturbed(results_of(folder), kinds, worker_kinds, time.monotonic() - began)


def choose(scenario: Scenario, calm: Undisturbed, kills: int, rng: random.Random) -> list[list[Kill]]:
    """So many kills, in cases of one to three: every kind of change in turn, and as many random moments."""
    kinds = sorted(calm.kinds)
    rng.shuffle(kinds)
    chosen: list[Kill] = []
    for number in range(kills):
        if number % 2 == 0 and kinds:
            workers = scenario.side_by_side and number % 4 == 2
            among = sorted(calm.worker_kinds) if workers else kinds
            kind = among[(number // 2) % len(among)]
            count = rng.randint(1, (calm.worker_kinds if workers else calm.kinds)[kind])
            torn = kind.startswith("open") and rng.random() < 0.5
            chosen.append(Kill(kind, count, torn, workers))
        else:
            chosen.append(Kill(after=round(rng.uniform(0.05, 0.95) * calm.seconds, 3)))
    cases = []
    while chosen:
        size = min(len(chosen), rng.choice((1, 1, 2, 3)))
        cases.append([chosen.pop(0) for _ in range(size)])
    return cases


def try_case(command: Command, calm: Undisturbed, kills: list[Kill], place: Path) -> Case:
    """Kill the command at each point in turn, run it to its end, compare."""
    case = Case(command.scenario.name, kills)
    folder, log = place / "killed", place / "killed.log"
    shutil.rmtree(folder, ignore_errors=True)
    log.write_bytes(b"")
    said = Path(deadly.deaths(str(folder)))
    for kill in kills:
        said.unlink(missing_ok=True)
        case.deaths.append(command.attempt(folder, kill, log))
        if kill.worker and said.exists():
            case.worker_deaths += len(said.read_text(encoding="utf-8").splitlines())
        if case.deaths[-1] == 0:  # what was left to do never came to that point: the command has ended
            break
    case.exit_code = command.attempt(folder, None, log)
    if case.exit_code == 0:
        case.differences = differences(calm.results, results_of(folder))
        case.left_over = left_over(folder)
    if not case.holds:
        case.output = log.read_text(encoding="utf-8", errors="replace")[-4000:]
    return case


def campaign(names: Sequence[str], kills: int, seed: int, place: Path) -> dict[str, Any]:
    """Kill every scenario its share of times. Returns the facts of all cases, for JSON."""
    rng = random.Random(seed)
    cases: list[Case] = []
    kinds: dict[str, dict[str, int]] = {}
    began = time.monotonic()
    for name in names:
        own = place / name
        own.mkdir(parents=True, exist_ok=True)
        command = Command(SCENARIOS[name], own / "inputs")
        calm = survey(command, own)
        kinds[name] = dict(sorted(calm.kinds.items()))
        wanted, landed = kills_of(name, names, kills), 0
        for _ in range(ROUNDS):  # a moment may come after the command's end: others are drawn for it
            for planned in choose(SCENARIOS[name], calm, wanted - landed, rng):
                case = try_case(command, calm, planned, own)
                cases.append(case)
                landed += case.deaths.count(-signal.SIGKILL) + case.worker_deaths
                print(f"{'ok  ' if case.holds else 'FAIL'} {name} {case.deaths} {_told(planned)}", flush=True)
            if landed >= wanted:
                break
    return facts(cases, kinds, seed, time.monotonic() - began)


def kills_of(name: str, names: Sequence[str], kills: int) -> int:
    """A scenario's share of the kills, at least one."""
    return max(1, round(kills * SCENARIOS[name].share / sum(SCENARIOS[other].share for other in names)))


def facts(cases: Sequence[Case], kinds: Mapping[str, Mapping[str, int]], seed: int, seconds: float) -> dict[str, Any]:
    """The campaign as plain values."""
    return {
        "seed": seed,
        "kills": sum(case.deaths.count(-signal.SIGKILL) + case.worker_deaths for case in cases),
        "planned": sum(len(case.kills) for case in cases),
        "cases": len(cases),
        "failures": sum(not case.holds for case in cases),
        "seconds": round(seconds, 1),
        "kinds_of_changes": kinds,
        "tried": [_plain(case) for case in cases],
    }


def _plain(case: Case) -> dict[str, Any]:
    kept = {key: value for key, value in asdict(case).items() if value or key in ("deaths", "exit_code")}
    return {**kept, "kills": _told(case.kills), "holds": case.holds}


def _told(kills: Sequence[Kill]) -> str:
    return "; ".join(map(_told_of_one, kills))


def _told_of_one(kill: Kill) -> str:
    if kill.after is not None:
        return f"after {kill.after} s"
    return f"{kill.kind} #{kill.count}{' torn' if kill.torn else ''}{' in a worker' if kill.worker else ''}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a campaign and keep its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=list(SCENARIOS), help="these scenarios")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args(argv)
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  imported once, before the processes are forked

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="thence-chaos-") as place:
        told = campaign(args.only or list(SCENARIOS), args.kills, args.seed, Path(place))
    print(f"{told['kills']} kills in {told['cases']} cases, {told['failures']} failures, {told['seconds']} s")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 1 if told["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
