"""How threads wait is settled before torch is loaded and changes no number; how many there are is the user's to say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from thence import cores
from thence.cli import main
from thence.cores import SPINCOUNT, Usage, crowded, free_cores, settle_waiting, take_free_cores, taken_by_others, usage
from thence.errors import UserError

CLEAR = {name: value for name, value in os.environ.items() if name not in (*cores.WAITING, *cores.THREADS, cores.ASKED)}
ONE = {"OMP_NUM_THREADS": "1"}  # which waits for nobody, however busy the machine is
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libgomp's and Linux's own")


def python(code: str, **environment: str) -> tuple[str, str]:
    """What a fresh interpreter prints and complains of."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=CLEAR | environment, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, done.stderr


def taken(monkeypatch: pytest.MonkeyPatch, share: float, usable: int = 4) -> None:
    """Let other programs take so many of the cores from now on."""
    clock = iter(range(100))
    monkeypatch.setattr(cores, "WINDOW", 0.0)
    monkeypatch.setattr(cores, "usable_cores", lambda: usable)
    monkeypatch.setattr(cores, "usage", lambda: Usage(100 + next(clock) * share, 5.0, float(next(clock) // 2)))


def runnable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processes: int) -> None:
    """Let so many processes run or want to run, this one among them."""
    monkeypatch.setattr(cores, "STAT", tmp_path / "stat")
    cores.STAT.write_text(f"ctxt 7\nprocs_running {processes}\nprocs_blocked 3\n")


@LINUX
def test_torch_is_loaded_with_short_waits_by_whatever_comes_through_thence() -> None:
    told = python("from thence.rollout.native import Sampling\nimport torch", OMP_DISPLAY_ENV="VERBOSE", **ONE)[1]
    assert f"GOMP_SPINCOUNT = '{SPINCOUNT}'" in told


@LINUX
def test_a_child_process_waits_briefly_too() -> None:
    code = "import thence, subprocess, sys; subprocess.run([sys.executable, '-c', {!r}])"
    printed, _ = python(code.format("import os; print(os.environ['GOMP_SPINCOUNT'])"), **ONE)
    assert printed.strip() == SPINCOUNT


@LINUX
def test_threads_sleep_at_once_on_a_machine_whose_cores_are_all_busy() -> None:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        code = "import os, thence; print(*(os.environ.get(name) for name in thence.cores.WAITING))"
        assert python(code, OMP_NUM_THREADS="2")[0].split() == ["PASSIVE", "None", "None"]
        # a number of threads that the user has set comes before THENCE_THREADS
        assert python(code, OMP_NUM_THREADS="2", THENCE_THREADS="auto")[0].split() == ["PASSIVE", "None", "None"]
        assert python(code, OMP_NUM_THREADS="2", THENCE_THREADS="")[0].split() == ["PASSIVE", "None", "None"]
        assert python(code, THENCE_THREADS="auto")[0].split() == ["None", SPINCOUNT, "None"]
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@LINUX
@pytest.mark.parametrize(
    "others, usable, threads, passive",
    [
        (0.6, 2, "2", False),  # a neighbour that rests often
        (0.9, 2, "2", True),
        (0.9, 2, "1", False),  # one thread waits for nobody
        (0.9, 4, "2", False),  # and two find two free cores
        (2.8, 4, "2", True),
        (0.9, 4, "4, 1", True),
    ],
)
def test_threads_sleep_at_once_where_others_compete_with_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, others: float, usable: int, threads: str, passive: bool
) -> None:
    runnable(monkeypatch, tmp_path, 2)
    monkeypatch.setattr(cores, "WINDOW", 0.0)
    monkeypatch.setattr(cores, "usable_cores", lambda: usable)
    moments = iter([Usage(50.0, 3.0, 10.0), Usage(50.0 + 2 * others + 0.5, 3.5, 12.0)])
    monkeypatch.setattr(cores, "usage", lambda: next(moments, None))
    monkeypatch.setattr(cores, "_physical_cores", lambda: 8)
    environment = {"OMP_NUM_THREADS": threads}
    assert settle_waiting(environment, loaded=False)
    assert environment.pop("OMP_NUM_THREADS") == threads
    assert environment == ({"OMP_WAIT_POLICY": "PASSIVE"} if passive else {"GOMP_SPINCOUNT": SPINCOUNT})


@LINUX
def test_an_idle_machine_is_not_watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runnable(monkeypatch, tmp_path, 1)
    monkeypatch.setattr(cores, "usage", lambda: pytest.fail("it was watched"))
    environment = {"OMP_NUM_THREADS": "2"}
    assert settle_waiting(environment, loaded=False)
    assert environment["GOMP_SPINCOUNT"] == SPINCOUNT


@LINUX
def test_a_thread_is_expected_for_each_physical_core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5})
    monkeypatch.setattr(cores, "TOPOLOGY", str(tmp_path / "{}"))
    assert cores.threads_expected({}) == 4  # where the system says nothing of it
    for core in range(8):
        (tmp_path / str(core)).write_text(f"{core % 4},{core % 4 + 4}\n")
    assert cores.threads_expected({}) == 2
    assert cores.threads_expected({"OMP_NUM_THREADS": "many"}) == 2
    assert cores.threads_expected({"OMP_NUM_THREADS": "3"}) == 2


@LINUX
@pytest.mark.parametrize(
    "told",
    [
        {},
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "2,1"},
        {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "2"},
        {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "1"},
        {"MKL_NUM_THREADS": "1"},
    ],
)
def test_the_threads_that_are_expected_are_those_that_torch_starts(told: dict[str, str]) -> None:
    import torch

    code = "import os, thence; print(thence.cores.threads_expected(os.environ)); import torch"
    expected, started = python(code + "; print(torch.get_num_threads())", **told)[0].split()
    if not torch.backends.mkl.is_available() and "MKL_NUM_THREADS" in told:
        pytest.skip("a torch without MKL")
    assert expected == started


@LINUX
@pytest.mark.parametrize("told", ["procs_running", "procs_running many", "procs_running 3\ncpu0 1 2 3"])
def test_a_system_that_says_nonsense_of_its_cores_is_taken_for_idle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: str
) -> None:
    monkeypatch.setattr(cores, "STAT", tmp_path / "stat")
    monkeypatch.setattr(cores.time, "sleep", lambda _: pytest.fail("it was watched"))
    cores.STAT.write_text(told + "\n")
    environment = {"OMP_NUM_THREADS": "2"}
    assert settle_waiting(environment, loaded=False)
    assert environment["GOMP_SPINCOUNT"] == SPINCOUNT


@LINUX
@pytest.mark.parametrize(
    "name, value", [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7"), ("KMP_BLOCKTIME", "0")]
)
def test_what_the_user_says_of_waiting_stays(name: str, value: str) -> None:
    code = f"import os, thence; print([os.environ.get(name) for name in {cores.WAITING}])"
    expected = [value if other == name else None for other in cores.WAITING]
    assert python(code, **{name: value})[0].strip() == str(expected)


@LINUX
def test_nothing_is_set_that_torch_could_not_read_any_more() -> None:
    environment = dict(ONE)
    assert not settle_waiting(environment, loaded=True)
    assert environment == ONE
    assert settle_waiting(environment, loaded=False)
    assert environment == ONE | {"GOMP_SPINCOUNT": SPINCOUNT}


def test_the_number_of_threads_does_not_follow_from_what_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    taken(monkeypatch, 3.0)
    environment: dict[str, str] = {}
    take_free_cores(environment)
    settle_waiting(environment, loaded=False)
    assert not set(cores.THREADS) & set(environment)


@pytest.mark.parametrize("others, threads", [(0.0, 4), (0.4, 4), (0.9, 3), (2.6, 1), (4.0, 1)])
def test_free_cores_are_taken_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, others: float, threads: int
) -> None:
    monkeypatch.setattr(cores, "WINDOW", 0.0)
    monkeypatch.setattr(cores, "usable_cores", lambda: 4)
    moments = iter([Usage(50.0, 3.0, 10.0), Usage(50.0 + 2 * others + 0.5, 3.5, 12.0)])
    monkeypatch.setattr(cores, "usage", lambda: next(moments))
    environment = {cores.ASKED: "auto"}
    take_free_cores(environment)
    assert environment == {cores.ASKED: cores.CHOSEN, "OMP_NUM_THREADS": str(threads)}
    assert cores.were_chosen(environment)
    take_free_cores(environment)  # a child process inherits both, and chooses nothing
    assert environment["OMP_NUM_THREADS"] == str(threads)


@pytest.mark.parametrize("name", cores.THREADS)
def test_a_number_of_threads_that_the_user_has_set_stays(name: str) -> None:
    environment = {cores.ASKED: "auto", name: "7"}
    take_free_cores(environment)
    assert environment == {cores.ASKED: "auto", name: "7"}
    assert not cores.were_chosen(environment)


def test_another_value_is_refused_with_what_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(cores.ASKED, "3")
    assert main(["methods"]) == 2
    told = capsys.readouterr().err
    assert "THENCE_THREADS is auto or not set, not '3'" in told and "OMP_NUM_THREADS=2 takes two threads" in told


def test_a_system_that_does_not_say_how_busy_it_is_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cores, "STAT", tmp_path / "none")
    assert usage() is None and taken_by_others(None, None) is None
    with pytest.raises(UserError, match="does not say how busy"):
        take_free_cores({cores.ASKED: "auto"})


@LINUX
def test_usage_counts_the_usable_cores_without_idle_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cores, "STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2})
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    row = "cpu{} 100 20 30 900 500 4 5 41 7 8\n"  # user, nice, system, idle, iowait, irq, softirq, steal, guests
    cores.STAT.write_text("cpu 9 9 9 9 9 9 9 9 9 9\n" + "".join(row.format(core) for core in range(12)) + "intr 1\n")
    found = usage()
    assert found is not None and found.cores == 4.0
    cores.STAT.write_text(row.format(0))
    assert usage() is None  # a core is missing


@LINUX
def test_others_are_what_this_process_did_not_take() -> None:
    since, until = Usage(10.0, 2.0, 100.0), Usage(15.0, 4.0, 102.0)
    assert taken_by_others(since, until) == pytest.approx(1.5)
    assert taken_by_others(until, Usage(15.0, 4.5, 104.0)) == 0.0  # ticks are coarse: never less than none
    assert taken_by_others(since, Usage(15.0, 4.0, 100.1)) is None  # too short to tell


def test_a_run_whose_threads_compete_is_told_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 2)
    monkeypatch.setattr(cores, "_begun", Usage(0.0, 0.0, 0.0))
    monkeypatch.setattr(cores, "usage", lambda: Usage(15.0, 5.0, 10.0))
    said = crowded({}, 2)
    assert said is not None and "1.0 of 2 cores busy" in said and "THENCE_THREADS=auto" in said
    assert crowded({}, 1) is None
    assert crowded({"OMP_NUM_THREADS": "2"}, 2) is None
    assert crowded({cores.ASKED: "auto"}, 2) is None
    monkeypatch.setattr(cores, "usage", lambda: Usage(8.0, 5.0, 10.0))
    assert crowded({}, 2) is None
    assert free_cores(0.3) == 2


TRAINED = """
import hashlib, torch, thence
from tests.tiny_model import make_tiny_model
from thence.data.trajectory import Prompt, Trajectory
from thence.methods.base import make_batch
from thence.methods.sft import SftMethod
from thence.train.step import StepSettings

model = make_tiny_model(torch.float32)
rows = [Trajectory(Prompt(i, tuple(1 + (i + j) % 9 for j in range(40))), (3, 1, 4, 1, 5) * 9) for i in range(64)]
trainer = thence.Trainer(model, 1e-3, StepSettings(1024))
for _ in range(4):
    trainer.step(make_batch(SftMethod(), rows))
a = torch.sin(torch.arange(2048 * 2048.0)).reshape(2048, 2048)  # large enough that its bits follow from the threads
bits = [*model.parameters(), a @ a[:, :128]]
digest = hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in bits))
print(torch.get_num_threads(), digest.hexdigest())
"""


@pytest.mark.everything
@LINUX
@pytest.mark.slow
def test_bits_follow_from_the_number_of_threads_and_not_from_how_they_wait() -> None:
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    runs = [
        {"OMP_NUM_THREADS": "2"},
        {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "300000"},
        {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
        {"OMP_NUM_THREADS": "1"},
    ]
    briefly, spinning, asleep, one = (python(TRAINED, PYTHONPATH=path, **run)[0] for run in runs)
    assert briefly.startswith("2 ") and one.startswith("1 ")
    assert briefly == spinning == asleep
    assert one.split()[1] != briefly.split()[1]  # so the digest would show another order of sums
