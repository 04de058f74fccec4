"""How a command ends: its exit code and its last words, with a full disk, a closed pipe, a signal, no memory."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time

import pytest

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def python(code: str, *arguments: str, **options) -> subprocess.CompletedProcess[bytes]:
    whole = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(whole, env=ENVIRONMENT, timeout=120, **{"capture_output": True, **options})


def shell(line: str) -> subprocess.CompletedProcess[str]:
    line = line.replace("thence", f"{sys.executable} -m thence")
    whole = ["bash", "-c", f"set -o pipefail; {line}"]
    return subprocess.run(whole, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "line", ["thence recipes > /dev/full", "thence methods > /dev/full", "thence --help > /dev/full"]
)
def test_output_to_a_full_disk_is_not_done(line):
    done = shell(line)
    assert done.returncode == 1
    assert "standard output cannot be written: No space left on device" in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_ends_a_list_quietly_and_work_with_a_word():
    done = shell("(sleep 1; thence methods) | true")
    assert done.returncode == 1
    assert done.stderr == ""
    code = """
        import sys, thence.cli as c
        def act(rest):
            for _ in range(100000): print("step")
            return 0
        c._command = lambda name: act
        sys.exit(c.main(["run", "x"]))
    """
    read, write = os.pipe()
    os.close(read)
    done = python(code, stdout=write, stderr=subprocess.PIPE, capture_output=False)
    os.close(write)
    assert done.returncode == 1
    assert b"nobody reads standard output any more: stopped; run the same command again" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_table_drawn_into_a_closed_pipe_is_no_foreign_exit():
    done = shell("thence doctor | true")
    assert done.returncode in (0, 1)
    assert done.stderr == ""


@pytest.mark.parametrize("line", ["thence nosuch 2> /dev/full", "thence nosuch 2>&-", "thence nosuch >&- 2>&-"])
def test_where_nothing_can_be_said_the_code_says_it(line):
    assert shell(line).returncode == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_with_their_codes_and_clean_up(number, code, tmp_path):
    waiting = """
        import sys, time, pathlib, thence.cli as c
        def act(rest):
            try:
                pathlib.Path(sys.argv[1]).touch()
                time.sleep(60)
            finally:
                print("cleaned up")
        c._command = lambda name: act
        sys.exit(c.main(["run", "x"]))
    """
    there = tmp_path / "there"
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(waiting), str(there)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        while not there.exists():
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert b"cleaned up" in out
    assert b"run the same command again to resume" in err
    assert b"Traceback" not in err


def test_memory_that_the_system_refuses_is_no_traceback():
    code = """
        import resource, sys, thence.cli as c
        def act(rest):
            import torch
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
            torch.ones(2**30) if sys.argv[1] == "torch" else bytearray(2**32)
            return 0
        c._command = lambda name: act
        sys.exit(c.main(["run", "x"]))
    """
    for way in ("torch", "python"):
        done = python(code, way)
        assert done.returncode == 1
        assert b"out of memory" in done.stderr
        assert b"micro-batch-tokens" in done.stderr
        assert b"Traceback" not in done.stderr


RECIPE = """
name = "small"
stages = ["sft"]
[model]
path = "world:chain/rich"
[data]
limit = 8
[sft]
lr = 1e-4
batch = 4
epochs = 1
checkpoint_every = 1
"""


@pytest.mark.slow
def test_a_run_that_meets_a_limit_of_the_disk_says_so_and_is_resumed(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    run = [sys.executable, "-m", "thence", "run", "recipe.toml", "--folder", "r"]

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, resource.RLIM_INFINITY))

    options = {"cwd": tmp_path, "env": ENVIRONMENT, "capture_output": True, "timeout": 170}
    done = subprocess.run(run, preexec_fn=limited, **options)
    assert done.returncode in (1, 2)
    assert b"Traceback" not in done.stderr
    assert b"remedy" in done.stderr
    assert b"fault of thence" not in done.stderr
    assert not list((tmp_path / "r").rglob(".writing-*"))
    assert subprocess.run(run, **options).returncode == 0
    assert (tmp_path / "r" / "stages" / "sft" / "done.json").exists()


def test_ranks_that_fail_end_torchrun_with_a_message():
    whole = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "thence", "run", "nosuch"]
    done = subprocess.run(whole, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "thence: no recipe 'nosuch'" in done.stderr
