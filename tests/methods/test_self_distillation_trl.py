"""TRL's own SDFT and SDPO losses, by running them in TRL's environment, against ours: value and gradient of the logits.

TRL's mean is over the rows of one micro-batch. Here that micro-batch is the whole step, so that both divide alike.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.oracle import relative, weights_of
from thence.data.trajectory import Prompt, Trajectory
from thence.methods.base import TokenFacts
from thence.methods.registry import make_method
from thence.objective import Head, ReferenceStates, TokenInputs, divisors, local_counts, objective
from thence.objective.terms import Batch, Row

pytestmark = [pytest.mark.slow, pytest.mark.stacks]
LENGTHS, WORDS = (7, 1, 4, 5), 30
TAUGHT = (True, True, False, True)
"""Of the responses: the third has nobody to learn from."""
TRL = """
import json
import sys
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

from trl.experimental.sdft import sdft_trainer
from trl.experimental.sdpo import sdpo_trainer

given = load_file(sys.argv[1])
made = {}
for name, (kind, settings) in json.loads(sys.argv[2]).items():
    module = {"sdft": sdft_trainer, "sdpo": sdpo_trainer}[kind]
    trainer = {"sdft": "SDFTTrainer", "sdpo": "SDPOTrainer"}[kind]
    skip = settings.pop("skip")
    args = SimpleNamespace(**settings)
    own = SimpleNamespace(
        args=args,
        accelerator=SimpleNamespace(gather=lambda value: value),
        _log_self_distillation_metric=lambda *values: None,
    )
    mask = given["mask"].clone()
    mask[:, :skip] = 0
    if kind == "sdpo":
        mask = mask * given["taught"][:, None]
    student = given["student"].clone().requires_grad_()
    more = {"completion_mask": given["mask"]} if kind == "sdpo" else {}
    logits = module.DistillationLogits(
        completion_ids=given["ids"], loss_mask=mask, student_logits=student, teacher_logits=given["teacher"], **more
    )
    compute = getattr(module, trainer)._compute_self_distillation_loss
    loss = compute(own, SimpleNamespace(training=True), {"old_per_token_logps": given["old"]}, logits)
    loss.backward()
    made[name + "/loss"], made[name + "/gradient"] = loss.detach().reshape(1), student.grad
save_file(made, sys.argv[3])
"""
SAMPLED = {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}
FULL = {"distillation_mode": "full_logits"}
LIKELIEST = {"distillation_mode": "topk_logits", "distillation_topk": 8}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sampled": ({}, SAMPLED),
    "sampled, the ratio not held": ({"ratio_bound": float("inf")}, SAMPLED | {"distillation_is_clip": 1e9}),
    "sampled, tokens skipped": ({"skip_tokens": 2}, SAMPLED | {"skip": 2}),
    "reverse": ({"divergence": "reverse-kl"}, FULL | {"distillation_alpha": 1.0}),
    "forward": ({"divergence": "forward-kl"}, FULL | {"distillation_alpha": 0.0}),
    "mixture": ({"divergence": "jsd", "alpha": 0.3}, FULL | {"distillation_alpha": 0.3}),
    "the default of TRL's sdft": ({"divergence": "jsd", "top_k": 8}, LIKELIEST | {"distillation_alpha": 0.5}),
    "reverse of the likeliest": ({"divergence": "reverse-kl", "top_k": 8}, LIKELIEST | {"distillation_alpha": 1.0}),
    "forward of the likeliest and a tail": (
        {"divergence": "forward-kl", "top_k": 8, "tail": True},
        LIKELIEST | {"distillation_alpha": 0.0, "distillation_add_tail": True},
    ),
    "mixture of the likeliest and a tail": (
        {"divergence": "jsd", "alpha": 0.7, "top_k": 8, "tail": True, "skip_tokens": 1},
        LIKELIEST | {"distillation_alpha": 0.7, "distillation_add_tail": True, "skip": 1},
    ),
}
"""Our options, and TRL's settings. Where the sampler's policy is the present one a token's ratio is 1."""
USUAL = {"distillation_is_clip": 2.0, "distillation_topk": None, "distillation_add_tail": False, "skip": 0}


def drawn() -> dict[str, Tensor]:
    """Logits of student and teacher, and what was taken: (rows, longest response, words) and (rows, longest)."""
    generator = torch.Generator().manual_seed(11)
    shape = (len(LENGTHS), max(LENGTHS))
    student, teacher = (2 * torch.randn(*shape, WORDS, generator=generator, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(WORDS, shape, generator=generator)
    taken = student.log_softmax(-1).gather(2, ids[..., None])[..., 0]
    old = taken - torch.tensor([-0.7, 0.0, 0.4, 1.5], dtype=torch.float64)[torch.randint(4, shape, generator=generator)]
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return {
        "student": student,
        "teacher": teacher,
        "ids": ids,
        "old": old,
        "mask": mask,
        "taught": torch.tensor(TAUGHT).long(),
    }


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What TRL computes of every case, by ``METHOD, CASE/loss`` and ``/gradient``."""
    python = os.environ.get("THENCE_AUDIT_PYTHON")
    if not python:
        pytest.skip("TRL could not be installed; `make test` sets THENCE_AUDIT_PYTHON")
    folder = tmp_path_factory.mktemp("trl")
    save_file(drawn(), folder / "given.safetensors")
    asked = {f"{m}, {case}": (m, USUAL | theirs) for m in ("sdft", "sdpo") for case, (_, theirs) in CASES.items()}
    (folder / "run.py").write_text(TRL)
    command = [python, str(folder / "run.py"), str(folder / "given.safetensors"), json.dumps(asked)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*command, str(folder / "made.safetensors")],
        capture_output=True, text=True, cwd=folder, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "made.safetensors")


def ours(name: str, options: dict[str, Any], given: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Loss and gradient of the logits, shape (rows, longest, words), of thence's method, objective and normaliser."""
    method = make_method(name, options, "rl")
    student = given["student"].clone().requires_grad_()
    taught = TAUGHT if name == "sdpo" else (True,) * len(LENGTHS)
    rows, facts = [], []
    for i, n in enumerate(LENGTHS):
        logp, teacher = (
            given[who][i, :n].log_softmax(-1).gather(1, given["ids"][i, :n, None])[:, 0]
            for who in ("student", "teacher")
        )
        rows.append(Trajectory(Prompt(i, (1,)), tuple(given["ids"][i, :n].tolist())))
        facts.append(TokenFacts(logp, logp, given["old"][i, :n], teacher=teacher if taught[i] else None))
    weights = torch.cat(weights_of(method, rows, facts), 1)
    real = given["mask"].bool()
    head = Head(torch.eye(WORDS, dtype=torch.float64))
    teacher = ReferenceStates(given["teacher"][real], head)
    inputs = TokenInputs(given["ids"][real], weights)
    batch = Batch(method.terms, tuple(_row(t, len(method.terms)) for t in rows))
    counts = divisors(method.terms, local_counts(batch))
    loss, _ = objective(student[real], head, inputs, method.terms, counts, teacher=teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.item(), gradient


def _row(trajectory: Trajectory, terms: int) -> Row:
    ids = torch.tensor([1, *trajectory.response_ids])
    trained: Sequence[bool] = [False] + [True] * len(trajectory.response_ids)
    return Row(ids, torch.tensor(trained), torch.ones(terms, len(trajectory.response_ids)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["sdft", "sdpo"])
def test_loss_and_gradient_are_those_of_trl(name: str, case: str, theirs: dict[str, Tensor]) -> None:
    loss, gradient = ours(name, CASES[case][0], drawn())
    assert loss == pytest.approx(theirs[f"{name}, {case}/loss"].item(), rel=1e-12)
    assert relative(gradient, theirs[f"{name}, {case}/gradient"]) < 1e-12
    assert gradient.norm() > 0.01
