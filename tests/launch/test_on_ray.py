"""A real Ray cluster of two nodes on this machine: comparisons and ranks, killed nodes, what is refused."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.clusters import VARIABLE, Command, TwoNodes, differences, environment
from thence.locks import is_held

pytestmark = [pytest.mark.slow, pytest.mark.ray]

COMPARISON = """
name = "small"
reference = "sft"
seeds = [0, 1]
bases.rich.path = "world:chain/rich"
data.source = ["world:chain"]
sft = { lr = 1e-3, batch = 4, steps = 30, checkpoint_every = 1, data = { limit = 128 } }
eval = { samples = 1, max_tokens = 32, reward = "exact", data = { split = "test", limit = 8 } }
arms.sft.kind = "sft"
arms.lower = { kind = "sft", settings = { lr = 1e-4 } }
"""
RECIPE = """
name = "small"
stages = ["sft", "rl"]
model.path = "world:chain/rich"
data = { source = ["world:chain"], limit = 64 }
sft = { lr = 1e-3, batch = 8, steps = 2 }
rl = { lr = 1e-4, prompts = 4, rollouts = 2, max_tokens = 24, reward = "exact", steps = 24, checkpoint_every = 1 }
"""


@pytest.fixture(scope="module")
def python() -> str:
    """The Python of the environment with Ray."""
    if VARIABLE not in os.environ:
        pytest.skip(f"set {VARIABLE} to the Python of an environment with Ray; `make test` does")
    return os.environ[VARIABLE]


@pytest.fixture(scope="module")
def cluster(python: str) -> Iterator[TwoNodes]:
    with TwoNodes(python) as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "c.toml").write_text(COMPARISON)
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path


def compared(where: str, *more: str) -> list[str]:
    return ["compare", "c.toml", "--folder", where, *more]


def test_a_comparison_that_is_interrupted_and_loses_a_node_has_the_numbers_of_local_processes(
    python: str, cluster: TwoNodes, folder: Path
) -> None:
    on = ("--on", f"ray:{cluster.address}", "--memory-gb", "0.5")
    first = Command(python, compared("ray", *on), folder)
    first.until(lambda: list(folder.glob("ray/runs/*/*/*/stages/*/checkpoints/step-*")))
    first.process.send_signal(signal.SIGINT)
    assert first.wait() == 130 and "run the same command again to resume" in first.text
    assert not list(folder.glob("ray/.thence-probe*"))

    second, node = Command(python, compared("ray", *on), folder), cluster.nodes[1]
    placed = second.until(lambda: second.line_with("on node", node[:6]))
    arm, seed = re.findall(r"(\S+) from rich, seed (\d):", placed)[0]
    begun = folder / f"ray/runs/rich/seed{seed}"
    second.until(lambda: list(begun.glob(f"{arm}-*/stages/sft/checkpoints/step-00001*")))
    cluster.kill(node)
    lost = second.until(lambda: second.line_with(f"{arm} from rich, seed {seed}", "was lost"))
    assert "resumes from its last checkpoint (sft, step-" in lost
    cluster.add()
    assert second.wait() == 0, second.text
    assert not any(is_held(lock.parent) for lock in folder.rglob(".lock"))

    local = Command(python, compared("local", "--jobs", "2"), folder)
    assert local.wait() == 0, local.text
    assert differences(folder / "local", folder / "ray") == []


def test_ranks_that_lose_a_node_end_with_the_bits_of_torchrun(python: str, cluster: TwoNodes, folder: Path) -> None:
    on = ["--on", f"ray:{cluster.address}", "--ranks", "2", "--memory-gb", "0.5", "--restarts", "1"]
    ranks = Command(python, ["run", "r.toml", "--folder", "ray", *on], folder)
    ranks.until(lambda: list(folder.glob("ray/stages/rl/checkpoints/step-000002")))
    assert all(node[:6] in ranks.line_with("ranks: 0 on") for node in cluster.nodes)
    cluster.kill(cluster.nodes[1])
    ranks.until(lambda: ranks.line_with("restart 1 of 1"))
    cluster.add()
    assert ranks.wait() == 0, ranks.text
    assert ranks.line_with("rl 24/24") and ranks.line_with("report: ")

    torchrun = [python, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*torchrun, "thence", "run", "r.toml", "--folder", "torchrun"],
        cwd=folder, env=environment(), capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    for stage in ("sft", "rl"):
        models = [folder / where / "stages" / stage / "model" / "model.safetensors" for where in ("ray", "torchrun")]
        assert models[0].read_bytes() == models[1].read_bytes()


def test_an_error_of_the_ranks_is_the_command_s(python: str, cluster: TwoNodes, folder: Path) -> None:
    wrong = ["run", "r.toml", "--folder", "wrong", "--rl.reward", "absent.py:f"]
    alone = Command(python, wrong, folder)
    code = alone.wait()
    said = [line for line in alone.lines if line.startswith(("thence: ", "  remedy"))]
    on = ["--on", f"ray:{cluster.address}", "--ranks", "2", "--memory-gb", "0.5"]
    ranks = Command(python, [*wrong, *on], folder)
    assert ranks.wait() == code == 2
    assert [line for line in ranks.lines if line in said] == said and len(said) >= 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "c.toml", "--memory-gb", "9000"], "needs 1 core, 9000.0 GB of memory, and no node"),
        (["compare", "c.toml", "--cores", "64"], "the largest is"),
        (["run", "r.toml", "--ranks", "9"], "9 ranks that each need 1 core"),
        (["run", "r.toml", "--gpus", "0.5"], "--gpus: a rank computes on one GPU or on none"),
    ],
)
def test_what_can_never_be_placed_is_refused_at_once(
    arguments: list[str], said: str, python: str, cluster: TwoNodes, folder: Path
) -> None:
    command = Command(python, [*arguments, "--folder", "f", "--on", f"ray:{cluster.address}"], folder)
    assert command.wait() == 2
    assert said in command.text and "remedy: " in command.text


def test_an_address_where_nobody_answers_is_refused(python: str, folder: Path) -> None:
    command = Command(python, compared("f", "--on", "ray:127.0.0.1:9"), folder)
    assert command.wait() == 2
    assert "nobody answers at 127.0.0.1:9" in command.text and "ray start --head" in command.text
