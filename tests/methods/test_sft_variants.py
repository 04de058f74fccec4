"""DFT, ASFT and GIFT: published numbers, gradients against their formulas written out, and what a stage logs."""

from __future__ import annotations

import copy
import json
import math
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tests.oracle import gradient, relative, row_statistics
from tests.recipes import world_recipe
from tests.tiny_model import make_tiny_model
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import RecipeError, UserError
from thence.methods.asft import Asft
from thence.methods.base import TokenFacts, make_batch
from thence.methods.dft import Dft
from thence.methods.gift import Gift, blend
from thence.objective import Head, ReferenceStates, TokenInputs, objective
from thence.pipeline.run import run
from thence.pipeline.sft_stage import demonstration_batch
from thence.train.step import StepSettings, train_step
from thence.train.trainer import Trainer

P, P_REF = (0.5, 0.3, 0.2), (0.6, 0.3, 0.1)
DEMONSTRATION = Trajectory(Prompt(0, (1,)), (2,), origin="demonstration")


def on_vector(method: Any) -> tuple[float, list[float]]:
    """Loss and logit gradient of the specification's token: the third of three words."""
    p, ref = (torch.tensor([values], dtype=torch.float64).log() for values in (P, P_REF))
    unknown = torch.full((1,), math.nan)
    facts = [TokenFacts(unknown, unknown, reference=ref[0, 2:], vocabulary=3)] if method.uses_reference else []
    batch = make_batch(method, [DEMONSTRATION], facts)
    p.requires_grad_()
    head = Head(torch.eye(3, dtype=torch.float64))
    inputs = TokenInputs(torch.tensor([2]), batch.rows[0].weights)
    loss, _ = objective(p, head, inputs, batch.terms, [1.0] * len(batch.terms), 1.0, ReferenceStates(ref, head))
    return loss.item(), torch.autograd.grad(loss, p)[0][0].tolist()


@pytest.mark.parametrize(
    ("method", "loss", "expected"),
    [
        (Dft(), 0.321888, [0.1, 0.06, -0.16]),
        (Asft({"kl": 0.05}), 0.323891, [0.095, 0.06, -0.155]),
        (Asft({"kl": 0.0}), 0.321888, [0.1, 0.06, -0.16]),
        (Gift({"beta": 2.0}), 1.199766, [0.133902, 0.116951, -0.250853]),
        (Gift(), 1.609438, [0.5, 0.3, -0.8]),
    ],
    ids=["dft", "asft", "asft without KL", "gift", "gift as published"],
)
def test_golden_vectors(method, loss, expected):
    found, logits = on_vector(method)
    assert found == pytest.approx(loss, abs=1e-6)
    assert logits == pytest.approx(expected, abs=1e-6)


def test_golden_blends_of_gift():
    def a(p: float, beta: float) -> float:
        return blend(torch.tensor([p], dtype=torch.float64).log(), beta).item()

    assert a(0.1, 2.0) == pytest.approx(0.610163, abs=1e-6)
    assert a(1e-6, 20.0) == pytest.approx(2e-3, rel=0.04)
    assert a(0.0, 20.0) == 1  # the target of a word that the base excludes is the base
    assert a(0.3, 0.0) == 1
    assert a(0.3, 700.0) == pytest.approx(0)


def test_a_reference_model_is_kept_only_where_it_is_read():
    passes = {Dft(): 0, Asft({"kl": 0.0}): 0, Asft(): 1, Gift(): 2}
    assert [method.reference_passes for method in passes] == list(passes.values())


@dataclass(frozen=True)
class Variant:
    """A method with its settings."""

    method: Any
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.method.name, *map(str, self.options.values())])


MEAN = {"aggregation": "sequence-mean"}
VARIANTS = [
    Variant(Dft),
    Variant(Dft, MEAN),
    Variant(Asft, {"kl": 0.7}),
    Variant(Asft, {"kl": 0.7, "direction": "reverse"} | MEAN),
    Variant(Gift, {"beta": 3.0}),
    Variant(Gift, {"beta": 3.0, "smoothing": 0.1, "floor": 1e-3} | MEAN),
    Variant(Gift),
]


def demonstrations(seed: int, count: int = 8) -> list[Trajectory]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        sizes = torch.randint(1, 12, (2,), generator=generator).tolist()
        prompt, response = (tuple(torch.randint(40, (n,), generator=generator).tolist()) for n in sizes)
        found.append(Trajectory(Prompt(index, prompt), response, origin="demonstration"))
    return found


def distributions(model: Any, trajectory: Trajectory) -> Tensor:
    """Log-probabilities of all words at every response token, shape (n, V)."""
    ids = torch.tensor([[*trajectory.prompt.token_ids, *trajectory.response_ids]])
    logits = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return logits[len(trajectory.prompt.token_ids) - 1 : -1]


def stated_loss(variant: Variant, model: Any, start: Any, chosen: list[Trajectory]) -> Tensor:
    """The formulas as they are printed: GIFT with its target distribution, not with two terms."""
    o = {"kl": 0.1, "direction": "forward", "beta": 20.0, "smoothing": 0.0, "floor": 0.0} | variant.options
    tokens, loss = sum(len(t.response_ids) for t in chosen), torch.zeros((), dtype=torch.float64)
    for trajectory in chosen:
        own, taken = distributions(model, trajectory), torch.tensor(trajectory.response_ids)[:, None]
        with torch.no_grad():
            ref = distributions(start, trajectory)
        logp = own.gather(1, taken)[:, 0]
        if variant.method is Gift:
            p_ref = (1 - o["smoothing"]) * ref.exp() + o["smoothing"] / ref.shape[1] + o["floor"]
            raised = p_ref.log().scatter_add(1, taken, torch.full_like(logp, o["beta"]).detach()[:, None])
            lost = -(raised.softmax(-1) * own).sum(-1)
        else:
            lost = -logp.detach().exp() * logp
        if variant.method is Asft:
            one, other = (own, ref) if o["direction"] == "reverse" else (ref, own)
            lost = lost + o["kl"] * (one.exp() * (one - other)).sum(-1)
        divisor = len(chosen) * len(logp) if o.get("aggregation") == "sequence-mean" else tokens
        loss = loss + lost.sum() / divisor
    return loss


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradients_of_both_optimizer_steps_are_those_of_the_formula(tiny_model, variant, packing):
    model, taken = tiny_model(), []
    start = copy.deepcopy(model)

    def step_and_tell(policy, optimizer, batch, *rest):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        report = train_step(policy, optimizer, batch, *rest)
        taken.append((before, report, torch.cat([p.grad.flatten() for p in model.parameters()])))
        return report

    chosen = demonstrations(3, 16)
    settings = StepSettings(64, packing, 0.0, torch.float64)
    trainer = Trainer(model, 2e-2, settings, take_step=step_and_tell, reference=copy.deepcopy(model))
    method = variant.method(variant.options)
    for part in (chosen[:8], chosen[8:]):
        trainer.step(demonstration_batch(trainer, method, part)[0])
    for part, (before, report, got) in zip((chosen[:8], chosen[8:]), taken, strict=True):
        model.load_state_dict(before)
        loss = stated_loss(variant, model, start, part)
        assert report.loss == pytest.approx(loss.item(), rel=1e-10, abs=1e-12)
        assert relative(got, gradient(model, loss)) <= 1e-10
    moved = torch.cat([row_statistics(model, t)[0] - row_statistics(start, t)[0] for t in chosen])
    assert moved.abs().max() > 0.3  # the policy of the second step is not the reference any more


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(VARIANTS), st.integers(1, 60), st.booleans(), st.permutations(range(7)))
def test_the_gradient_does_not_depend_on_the_partition(variant, budget, packing, order):
    method, chosen = variant.method(variant.options), demonstrations(5, 7)

    def gradient_of(rows: list[Trajectory], tokens: int, packed: bool) -> Tensor:
        model = make_tiny_model()
        reference = copy.deepcopy(model)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        trainer = Trainer(model, 0.0, StepSettings(tokens, packed, 0.0, torch.float64), reference=reference)
        trainer.step(demonstration_batch(trainer, method, rows)[0])
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole = gradient_of(chosen, 10_000, False)
    assert relative(gradient_of([chosen[i] for i in order], budget, packing), whole) <= 1e-10


@pytest.mark.parametrize("method", [Asft(), Gift()], ids=["asft", "gift"])
def test_without_a_reference_model_no_step_is_taken(tiny_model, method):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(model, 0.1, StepSettings(64, False, 0.0, torch.float64))
    with pytest.raises(UserError, match="reference model") as refused:
        facts = [TokenFacts(torch.zeros(1), torch.zeros(1), reference=torch.zeros(1), vocabulary=3)]
        batch = make_batch(method, [DEMONSTRATION], facts)
        trainer.step(batch)
    assert "Trainer(reference=...)" in (refused.value.remedy or "")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_need_the_reference_are_refused_without_it(tiny_model):
    facts = [TokenFacts(torch.zeros(1), torch.zeros(1))]
    with pytest.raises(UserError, match="which were not computed"):
        Gift().weigh([DEMONSTRATION], facts)
    trainer = Trainer(tiny_model(), 0.1, StepSettings(64, False, 0.0, torch.float64))
    with pytest.raises(UserError, match="the trainer has none"):
        demonstration_batch(trainer, Gift(), [DEMONSTRATION])


@pytest.mark.parametrize(
    ("method", "options", "field"),
    [
        (Dft, {"aggregation": "mean"}, "aggregation"),
        (Dft, {"kl": 0.1}, "kl"),
        (Asft, {"kl": -0.1}, "kl"),
        (Asft, {"direction": "backward"}, "direction"),
        (Gift, {"beta": -1.0}, "beta"),
        (Gift, {"smoothing": 1.5}, "smoothing"),
        (Gift, {"floor": -1e-10}, "floor"),
    ],
)
def test_bad_options_are_refused_with_their_field(method, options, field):
    with pytest.raises(RecipeError) as refused:
        method(options)
    assert field in (refused.value.field or "")
    assert refused.value.remedy


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_stage_of_each_logs_the_plain_loss_and_what_its_weights_were(tmp_path):
    found = {}
    for name, options in {"sft": {}, "dft": {}, "asft": {"kl": 0.5}, "gift": {"beta": 5.0}}.items():
        sft = {"lr": 1e-2, "batch": 4, "steps": 3, "method": name, "options": options, "held_out": 4}
        sft |= {"held_out_every": 1, "data": {"limit": 16}}
        found[name] = metrics_of(
            run(world_recipe(tmp_path, ["sft"], name=name, sft=sft), {"folder": str(tmp_path / name)})
        )
    start = found["sft"][0]["loss"]
    for name in ("dft", "asft", "gift"):
        first, *later = found[name]
        assert first["nll"] == pytest.approx(start, rel=1e-5)  # the same model and rows, plain cross-entropy
        if name != "gift":  # whose first step is plain SFT to a model that is its own reference
            assert first["loss"] < start / 2
        assert all(line["held_out_loss"] > 0 for line in later)
        scored = {"dft": 0, "asft": 1, "gift": 2}[name]
        assert first["flops"] == pytest.approx(found["sft"][0]["flops"] * (6 + 2 * scored) / 6)
        ratio = first["executed_flops"] / found["sft"][0]["executed_flops"]
        assert ratio == pytest.approx((3 + scored) / 3, rel=0.02)
    assert "nll" not in found["sft"][0]
    shares = [found["gift"][0][f"blend/above {bound}"] for bound in (0.001, 0.01, 0.1, 0.5)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1
    assert 0 < found["gift"][0]["blend/mean"] < 1


KILLED = """
import json, os, signal, sys
from pathlib import Path

import thence.pipeline.context as context
from thence.pipeline.run import run

recipe, last = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
log = context.StageContext.log


def log_and_die(self, line):
    log(self, line)
    if line.get("step") == last:
        os.kill(os.getpid(), signal.SIGKILL)


context.StageContext.log = log_and_die
run(recipe)
"""


@pytest.mark.matrix(1)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "lora"),
    [("dft", {}, False), ("asft", {"kl": 0.5}, False), ("gift", {"beta": 3.0}, False), ("gift", {"beta": 3.0}, True)],
)
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(tmp_path, name, options, lora):
    """The reference is the model at the start of the stage, not the one that the run resumes from."""
    sft = {"lr": 1e-2, "batch": 4, "steps": 6, "method": name, "options": options, "data": {"limit": 24}}
    sft["checkpoint_every"] = 2
    recipe = world_recipe(tmp_path, ["sft"], name=name, sft=sft)
    if lora:
        recipe["model"]["lora"] = {"rank": 2}
    whole, broken = ({**recipe, "folder": str(tmp_path / kind)} for kind in ("whole", "broken"))
    run(whole)
    (tmp_path / "recipe.json").write_text(json.dumps(broken))
    (tmp_path / "driver.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "recipe.json"), "3"]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    run(broken)
    files = [sorted((Path(r["folder"]) / "stages" / "sft").rglob("*model.safetensors"))[-1] for r in (whole, broken)]
    expected, got = map(load_file, files)
    assert expected and all(got[key].equal(expected[key]) for key in expected)
    timed = ("seconds", "tokens_per_s")
    lines = [
        [{k: v for k, v in line.items() if k not in timed} for line in metrics_of(Path(r["folder"]))]
        for r in (whole, broken)
    ]
    assert lines[0] == lines[1]
