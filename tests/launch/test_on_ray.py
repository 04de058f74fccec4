"""A real Ray cluster of two nodes on this machine: comparisons and ranks, killed nodes, what is refused."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.clusters import VARIABLE, Command, TwoNodes, differences, environment
from thence.locks import is_held

pytestmark = [pytest.mark.slow, pytest.mark.ray]

EVERYTHING = "THENCE_RAY_EVERYTHING"

COMPARISON = """
name = "small"
reference = "sft"
seeds = [0]
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
        pytest.skip(f"set {VARIABLE} to the Python of an environment with Ray (docs/ray.md)")
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


def test_a_comparison_that_loses_a_node_has_the_numbers_of_local_processes(
    python: str, cluster: TwoNodes, folder: Path
) -> None:
    arguments = ["compare", "c.toml", "--folder", "ray", "--on", f"ray:{cluster.address}", "--memory-gb", "0.5"]
    command, node = Command(python, arguments, folder), cluster.nodes[1]
    placed = command.until(lambda: command.line_with("on node", node[:6]))
    arm = placed.split(" ")[0]
    checkpoints = f"ray/runs/rich/seed0/{arm}-*/stages/sft/checkpoints/step-*"
    command.until(lambda: list(folder.glob(checkpoints)))
    cluster.kill(node)
    lost = command.until(lambda: command.line_with(f"{arm} from rich, seed 0", "was lost"))
    assert "resumes from its last checkpoint (sft, step-" in lost
    cluster.add()
    assert command.wait() == 0, command.text
    assert not any(is_held(lock.parent) for lock in folder.rglob(".lock"))
    assert not list(folder.rglob(".thence-probe*"))

    local = Command(python, ["compare", "c.toml", "--folder", "local", "--jobs", "2"], folder)
    assert local.wait() == 0, local.text
    assert differences(folder / "local", folder / "ray") == []


@pytest.mark.skipif(EVERYTHING not in os.environ, reason=f"a second cluster that loses a node: set {EVERYTHING}=1")
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


REFUSED = {
    "compare c.toml --memory-gb 9000": "needs 1 core, 9000.0 GB of memory, and no node of the Ray cluster has",
    "compare c.toml --cores 64": "the largest is",
    "run r.toml --ranks 9 --memory-gb 0": "9 ranks that each need 1 core do not fit the Ray cluster: its 2 nodes",
    "run r.toml --gpus 0.5": "--gpus: a rank computes on one GPU or on none",
    "run r.toml --on ray:127.0.0.1:9": "nobody answers at 127.0.0.1:9",
}
REFUSALS = """
import sys
from thence.cli import main
for line in sys.stdin.read().splitlines():
    own = line.split() + ([] if "--on" in line else ["--on", "ray:" + sys.argv[1]])
    print("exit code", main([*own, "--folder", "refused"]), flush=True)
"""


def test_what_can_never_be_placed_is_refused_at_once(python: str, cluster: TwoNodes, folder: Path) -> None:
    done = subprocess.run(
        [python, "-c", REFUSALS, cluster.address], input="\n".join(REFUSED),
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = [part for part in done.stderr.split("thence: ")[1:] if "remedy: " in part]
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit code")]
    assert codes == ["exit code 2"] * len(REFUSED), done.stderr
    assert len(said) == len(REFUSED)
    for words, told in zip(REFUSED.values(), said, strict=True):
        assert words in told
