"""GSPO, and what methods with a ratio of their own see of the old policy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests import ROOT
from tests.oracle import gradient, relative, row_statistics, weights_of
from tests.recipes import world_recipe
from thence.cli import main
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import UserError
from thence.methods.base import Method, TokenFacts, Weights, bare_row
from thence.methods.gspo import Gspo, sequence_ratio
from thence.methods.registry import make_method
from thence.objective import Logp, Normaliser, Term
from thence.pipeline.rehearsal import rehearse
from thence.pipeline.rl_metrics import BatchMetrics
from thence.pipeline.rl_update import Update
from thence.pipeline.run import run
from thence.recipe import Rl
from thence.train.parallel import SingleProcess
from thence.train.step import StepSettings, train_step
from thence.train.trainer import Trainer

LENGTHS = ((3, 7), (2, 9), (3, 5), (4, 6), (2, 8), (3, 4), (2, 11), (3, 6), (2, 3), (1, 12), (4, 5), (2, 7))
GROUP, MINIS = 4, 3


class SequenceRatio(Method):
    """A plug-in: policy gradient with one unclipped ratio a response."""

    name = "sequence_ratio"
    stage = "rl"
    formula = "-(1/B) sum s R"
    source = "this test"
    exactness = "exact"
    uses_old = True

    @property
    def terms(self) -> tuple[Term, ...]:
        return (Term("policy", Logp(), Normaliser("sequences")),)

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        return [
            {"policy": (t.score or 0.0) * float(f.log_ratio.mean().exp()) / len(f.logp)}
            for t, f in zip(trajectories, facts, strict=True)
        ]


def make_trajectories(model: Any) -> list[Trajectory]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for i, (prompt, response) in enumerate(LENGTHS):
        ids = torch.randint(model.config.vocab_size, (prompt + response,), generator=generator).tolist()
        owner = Prompt(i // GROUP, tuple(ids[:prompt]), draw=i // GROUP)
        found.append(Trajectory(owner, tuple(ids[prompt:]), score=(1.0, 0.0, 0.5, -0.5)[i % GROUP]))
    return found


def steps_of(
    model: Any, method: Method, trajectories: list[Trajectory], budget: int = 64, packing: bool = False, metrics=None
):
    """The weights before, the report and the gradient of each optimizer step on a rollout batch."""
    taken = []

    def step_and_tell(policy, optimizer, batch, *rest):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        report = train_step(policy, optimizer, batch, *rest)
        taken.append((before, report, torch.cat([p.grad.flatten() for p in model.parameters()])))
        return report

    trainer = Trainer(model, 1e-2, StepSettings(budget, packing, 0.0, torch.float64), take_step=step_and_tell)
    stage: Any = SimpleNamespace(temperature=1.0, importance_bound=None, fault=None)
    metrics = metrics or BatchMetrics(SingleProcess(), method.terms)
    Update(stage, method, trainer, MINIS).take(trajectories, metrics)
    return taken


def advantages(scores: list[float], std: bool) -> list[float]:
    values = torch.tensor(scores, dtype=torch.float64)
    centred = values - values.mean()
    return (centred / (values.std() + 1e-6) if std else centred).tolist()


def stated_loss(method: Method, model: Any, part: list[Trajectory], old: list[Tensor]) -> tuple[Tensor, list[bool]]:
    """The loss as printed, by autograd through the ratio itself; and which responses the clip holds back."""
    o: Any = method.options
    gains = [t.score or 0.0 for t in part]
    if isinstance(method, Gspo):
        gains = advantages(gains, o.std)
    loss, held = torch.zeros((), dtype=torch.float64), []
    for trajectory, gain, before in zip(part, gains, old, strict=True):
        ratio = (row_statistics(model, trajectory)[0] - before).mean().exp()
        clipped = ratio.clamp(1 - o.clip_low, 1 + o.clip_high) if isinstance(method, Gspo) else ratio
        loss = loss - torch.minimum(ratio * gain, clipped * gain) / len(part)
        held.append(bool(ratio * gain > clipped * gain))
    return loss, held


METHODS = [SequenceRatio(), Gspo(), Gspo({"clip_low": 0.02, "clip_high": 0.03, "std": False})]


@pytest.mark.parametrize("method", METHODS, ids=["plug-in", "gspo", "gspo wide"])
def test_gradients_of_all_optimizer_steps_are_those_of_the_sequence_ratio(tiny_model, method):
    model = tiny_model()
    trajectories = make_trajectories(model)
    old = [row_statistics(model, t)[0].detach() for t in trajectories]
    taken = steps_of(model, method, trajectories)
    assert len(taken) == MINIS
    held_back = []
    for number, (before, _, got) in enumerate(taken):
        model.load_state_dict(before)
        part = slice(number * GROUP, (number + 1) * GROUP)
        loss, held = stated_loss(method, model, trajectories[part], old[part])
        assert relative(got, gradient(model, loss)) <= 1e-12
        held_back += held
        ratios = [
            (row_statistics(model, t)[0].detach() - o).mean().exp().item()
            for t, o in zip(trajectories, old, strict=True)
        ]
        assert max(abs(ratio - 1) for ratio in ratios[part]) > 0.005 or number == 0  # the policy has moved
    assert not any(held_back[:GROUP])
    assert any(held_back) == isinstance(method, Gspo)  # the clip is tried, on some responses
    assert not all(held_back[GROUP:])


@pytest.mark.parametrize("method", METHODS, ids=["plug-in", "gspo", "gspo wide"])
def test_tokens_of_responses_that_are_held_back_are_clipped_tokens(tiny_model, method):
    model = tiny_model()
    trajectories = make_trajectories(model)
    old = [row_statistics(model, t)[0].detach() for t in trajectories]
    metrics = BatchMetrics(SingleProcess(), method.terms)
    taken = steps_of(model, method, trajectories, metrics=metrics)
    for number, (before, _, _) in enumerate(taken):
        model.load_state_dict(before)
        part = slice(number * GROUP, (number + 1) * GROUP)
        sizes = [len(t.response_ids) for t in trajectories[part]]
        held = stated_loss(method, model, trajectories[part], old[part])[1]
        clipped = sum(size for size, back in zip(sizes, held, strict=True) if back)
        assert metrics.reports[number].clip_share == pytest.approx(clipped / sum(sizes))
    assert any(report.clip_share for report in metrics.reports) == isinstance(method, Gspo)


@pytest.mark.parametrize("method", METHODS, ids=["plug-in", "gspo", "gspo wide"])
def test_the_update_does_not_depend_on_the_partition(tiny_model, method):
    ends = []
    for budget, packing in ((10_000, False), (24, False), (24, True), (1, False)):
        model = tiny_model()
        taken = steps_of(model, method, make_trajectories(model), budget, packing)
        ends.append(torch.cat([got for _, _, got in taken]))
    assert all(relative(end, ends[0]) <= 1e-9 for end in ends[1:])


# The published vector: old probabilities 0.5 and 0.4, new ones 0.6 and 0.4.


@pytest.mark.parametrize(
    ("low", "high", "right", "wrong"),
    [(0.2, 0.2, 0.547723, -0.547723), (3e-4, 4e-4, 0.0, -0.547723)],
)
def test_golden_vector(low, high, right, wrong):
    logp, old = torch.tensor([0.6, 0.4]).double().log(), torch.tensor([0.5, 0.4]).double().log()
    facts = TokenFacts(logp, torch.zeros(2), old)
    assert sequence_ratio(facts.log_ratio) == pytest.approx(1.095445, abs=1e-6)
    pair = [Trajectory(Prompt(0, (1,)), (2, 3), score=score) for score in (1.0, -1.0)]
    found = weights_of(Gspo({"clip_low": low, "clip_high": high, "std": False}), pair, [facts, facts])
    assert [w.tolist() for w in found] == [[pytest.approx([x] * 2, abs=1e-6)] for x in (right, wrong)]


def test_a_ratio_below_its_bound_holds_a_wrong_response_back_and_not_a_right_one():
    facts = TokenFacts(torch.full((3,), -1.2).double(), torch.zeros(3), torch.full((3,), -1.0).double())
    pair = [Trajectory(Prompt(0, (1,)), (2, 3, 4), score=score) for score in (1.0, 0.0)]
    right, wrong = weights_of(Gspo({"std": False}), pair, [facts, facts])
    assert right.tolist() == [pytest.approx([0.5 * 0.8187307530779818 / 3] * 3)]
    assert not wrong.any()


def test_a_response_without_tokens_and_a_ratio_beyond_all_bounds():
    nothing = TokenFacts(torch.zeros(0), torch.zeros(0), torch.zeros(0))
    rows = [Trajectory(Prompt(0, (1,)), (), score=score) for score in (1.0, 0.0)]
    assert [tuple(w.shape) for w in weights_of(Gspo(), rows, [nothing] * 2)] == [(1, 0)] * 2
    assert sequence_ratio(torch.tensor([200.0])) == pytest.approx(torch.tensor(20.0).double().exp().item())


# What was not computed is refused.


class Forgetful(SequenceRatio):
    uses_facts: ClassVar[bool] = True
    uses_old: ClassVar[bool] = False


def test_a_method_that_does_not_ask_for_the_old_policy_is_refused_before_the_first_step():
    stage = Rl(reward="exact", prompts=1, rollouts=2, max_tokens=4, steps=1)
    rehearse(SequenceRatio(), stage, [Prompt(0, (2, 3))])
    with pytest.raises(UserError, match="old log-probabilities, which were not computed") as caught:
        rehearse(Forgetful(), stage, [Prompt(0, (2, 3))])
    assert "uses_old = True" in caught.value.remedy


def test_a_replay_is_compared_with_the_policy_that_sampled_it(tiny_model):
    seen = []

    class Looks(SequenceRatio):
        def weigh(self, trajectories, facts=()):
            seen.append([(t, f.old) for t, f in zip(trajectories, facts, strict=True)])
            return super().weigh(trajectories, facts)

    model = tiny_model()
    rows = make_trajectories(model)
    kept = tuple([-1.5] * len(rows[5].response_ids))
    rows[5] = replace(rows[5], origin="replay", behaviour=kept)
    old = [logp.detach() for logp, _ in (row_statistics(model, t) for t in rows)]
    steps_of(model, Looks(), rows)
    assert [len(part) for part in seen] == [GROUP] * MINIS
    for i, (trajectory, found) in enumerate(entry for part in seen for entry in part):
        assert trajectory is rows[i]
        torch.testing.assert_close(found.double(), torch.tensor(kept).double() if i == 5 else old[i])


def test_the_old_policy_costs_a_pass_over_all_steps_but_the_first(tiny_model, monkeypatch):
    passes: list[int] = []
    measured = Trainer.statistics

    def counting(self, rows, temperature=1.0):
        passes.append(len(rows))
        return measured(self, rows, temperature)

    monkeypatch.setattr(Trainer, "statistics", counting)
    model = tiny_model()
    steps_of(model, Gspo(), make_trajectories(model))
    assert passes == [GROUP] * (MINIS - 1) + [GROUP] * MINIS  # old, then current before each step
    assert bare_row(make_trajectories(model)[0]).n_trained == LENGTHS[0][1]


# The package of the documentation.

PACKAGE = ROOT / "examples" / "own_method"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The example, installed with pip as a user does, where only this test sees it."""
    copy = shutil.copytree(PACKAGE, tmp_path / "source")  # a build leaves files beside the sources
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(tmp_path / "site"), str(copy)]
    subprocess.run(command, check=True, timeout=120)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield
    sys.modules.pop("sequence_ratio", None)


def test_the_example_package_is_found_explained_and_weighs_as_gspo_does(installed, tiny_model, capsys):
    assert main(["methods", "sequence_ratio"]) == 0
    told = capsys.readouterr().out
    assert "one importance ratio a response" in told and "exactness: reconstruction" in told and "band" in told
    theirs = make_method("sequence_ratio", {"band": 0.02}, "rl")
    ours = Gspo({"clip_low": 0.02, "clip_high": 0.02, "std": False})
    ends = []
    for method in (theirs, ours):
        model = tiny_model()
        ends.append(torch.cat([got for _, _, got in steps_of(model, method, make_trajectories(model))]))
    assert relative(*ends) <= 1e-9


@pytest.mark.parametrize("method", ["sequence_ratio", "gspo"])
def test_a_run_with_a_ratio_of_responses_and_two_optimizer_steps_a_batch(installed, tmp_path, method):
    rl = {"method": method, "mini_batch": 2, "steps": 2, "max_tokens": 8}
    value = "float(sum(map(ord, response)) % 3 == 0)"
    recipe = world_recipe(tmp_path, ["rl"], value, data={"limit": 8}, rl=rl)
    folder = run({**recipe, "folder": str(tmp_path / "run")})
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(line["grad_norm"] > 0 for line in lines)
