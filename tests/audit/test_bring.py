"""What people bring: any optimizer, frozen parameters, adapters, small models, bfloat16, dropout left on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.audit.homemade import HomeMade
from tests.audit.optimizers import OPTIMIZERS
from tests.audit.test_ways import WORDS
from thence.audit import Report, check, random_rows
from thence.audit.judge.adapted import saved_adapter
from thence.audit.judge.case import Judge
from thence.audit.judge.evidence import Evidence
from thence.audit.judge.settle import scale_law, settle
from thence.audit.judge.untouched import find_untouched
from thence.audit.result import Case, CaseResult
from thence.audit.run.program import audit_program
from thence.audit.solve.sequences import KnownExample
from thence.errors import UserError

SHORT = random_rows(40, lengths=(2, 11, 3, 7))
LINEAR = {"sgd", "momentum", "sgd-decayed", "adamw-linear", "radam"}
SIZES = {"adafactor", "adadelta", "schedule-free"}


def ids(report: Report) -> set[str]:
    return {finding.id for case in report.cases for finding in case.faults}


def judge_of(model: Any, rows: Any = SHORT) -> Judge:
    known = [KnownExample((), (), tuple(row["input_ids"]), tuple(row["labels"])) for row in rows]
    return Judge(copy.deepcopy(model), known, [str(i) for i in range(40)], -1, None)


def states(step: HomeMade, model: Any, micro_batch: int, accumulation: int) -> list[dict[str, torch.Tensor]]:
    """Parameters before and after a step on the short rows; the model is left as it is."""
    own = copy.deepcopy(model)
    before = {name: p.detach().clone() for name, p in own.named_parameters()}
    step(own, [dict(row) for row in SHORT], micro_batch, accumulation)  # pyright: ignore
    return [before, {name: p.detach().clone() for name, p in own.named_parameters()}]


def blind(step: HomeMade, model: Any, micro_batch: int = 2, accumulation: int = 2) -> CaseResult:
    """A step as ``command`` sees it: parameters before and after, and nothing of the optimizer."""
    judge = judge_of(model)
    case = Case("case", micro_batch, accumulation, examples=4, optimizer="unknown")
    evidence = Evidence(states(step, model, micro_batch, accumulation), pieces=judge.plan(case), scale_known=False)
    return judge.case(case, evidence)


@pytest.mark.matrix(4)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_check_judges_what_any_optimizer_is_given_and_says_what_it_did_not_look_at(
    name: str, tiny_model: Callable[..., Any]
) -> None:
    report = check(HomeMade(name), model=tiny_model(torch.float32), batch=SHORT)
    assert report.ok, str(report)
    said = [line for line in report.not_verified if line.startswith("what the optimizer (")]
    assert bool(said) == (name not in LINEAR), report.not_verified
    broken = check(HomeMade(name, missing="end"), model=tiny_model(torch.float32), batch=SHORT)
    assert ids(broken) == {"end-missing"}


def test_the_optimizers_are_named(tiny_model: Callable[..., Any]) -> None:
    report = check(HomeMade("muon"), model=tiny_model(torch.float32), batch=SHORT)
    assert any("Muon and AdamW" in line and "arithmetic was not looked at" in line for line in report.not_verified)


@pytest.mark.parametrize("name", ["adafactor", "lion", "adamw", "schedule-free", "adam-l2"])
def test_the_update_alone_is_enough_where_its_signs_are_those_of_the_gradient(
    name: str, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(torch.float32)
    right = blind(HomeMade(name), model)
    assert (right.status, right.faults) == ("judged", ()), right.reason
    assert right.steps[0].source == "signs" and any("sizes" in line for line in right.steps[0].unseen)
    wrong = blind(HomeMade(name, weight="micro-batch"), model)
    assert [finding.id for finding in wrong.faults] == ["micro-batch-mean"], wrong.reason


@pytest.mark.parametrize(
    ("name", "said"), [("muon", "Muon, Shampoo"), ("shampoo", "Muon, Shampoo"), ("lars", "(LARS)")]
)
def test_an_update_alone_that_hides_the_gradient_is_named_and_never_acquitted(
    name: str, said: str, tiny_model: Callable[..., Any]
) -> None:
    for step in (HomeMade(name), HomeMade(name, times=0.0)):
        result = blind(step, tiny_model(torch.float32))
        assert result.status == "not judged" or result.faults
    result = blind(HomeMade(name), tiny_model(torch.float32))
    assert result.status == "not judged" and said in result.reason and not result.faults


def test_an_update_that_is_nearly_the_gradient_is_not_acquitted_by_its_signs(tiny_model: Callable[..., Any]) -> None:
    """A small term beside the tokens leaves most signs as they are."""

    class Regularised(HomeMade):
        def _step(self, model: Any, optimizers: Any) -> None:
            for number, p in enumerate(model.parameters()):
                noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
                p.grad += 3e-3 * p.grad.std() * noise
            super()._step(model, optimizers)

    result = blind(Regularised("sgd"), tiny_model(torch.float32))
    assert result.status == "not judged"
    assert "% of the update is unexplained" in result.reason and "Usual causes" in result.reason


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_adapters_are_followed_in_a_step_of_ones_own(optimizer: str, tiny_model: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(tiny_model(torch.float32), settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert check(HomeMade(optimizer), model=model, batch=SHORT).ok
    assert ids(check(HomeMade(optimizer, missing="end"), model=model, batch=SHORT)) == {"end-missing"}
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_adapters_put_in_by_the_step_itself_are_refused_by_name(tiny_model: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")

    def step(model: Any, rows: Any) -> None:
        HomeMade("sgd")(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"])), rows, 4, 1)

    report = check(step, model=tiny_model(torch.float32), batch=SHORT)
    assert report.verdict.exit_code == 2
    assert "parameters into the model that were not there before" in report.verdict.sentences[1]


@pytest.mark.parametrize("trained", ["layers.1", "q_proj", "k_proj", "norm"])
def test_all_but_a_few_parameters_may_be_frozen_under_adam(trained: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    assert check(HomeMade("adamw"), model=model, batch=SHORT).ok
    assert not check(HomeMade("adamw", weight="rows"), model=model, batch=SHORT).ok


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("layers", [1, 2])
def test_models_of_a_few_thousand_parameters_are_judged_by_signs_alone(layers: int, seed: int) -> None:
    """The sign solver once diverged below 12,000 parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    right = blind(HomeMade("adamw"), model)
    assert (right.status, right.faults) == ("judged", ()), right.reason
    mistakes: list[dict[str, Any]] = [
        {"weight": "rows"},
        {"weight": "micro-batch"},
        {"extra": "prompt"},
        {"times": 0.0},
    ]
    for mistake in mistakes:
        wrong = blind(HomeMade("adamw", **mistake), model)
        assert wrong.faults or wrong.status == "not judged", mistake


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_bfloat16_weights_under_adam_are_judged_by_signs_alone(optimizer: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(torch.float32).bfloat16()
    right = blind(HomeMade(optimizer), model)
    assert (right.status, right.faults, right.steps[0].source) == ("judged", (), "signs"), right.reason
    assert "end-missing" in {finding.id for finding in blind(HomeMade(optimizer, missing="end"), model).faults}


@pytest.mark.parametrize("seeded", [False, True])
def test_dropout_left_on_is_named(seeded: bool, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(torch.float32, "gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1

    def step(model: Any, rows: Any, micro_batch: int, accumulation: int) -> None:
        if seeded:
            torch.manual_seed(0)
        model.train()
        HomeMade("adamw")(model, rows, micro_batch, accumulation)

    report = check(step, model=model, batch=SHORT)
    assert report.verdict.exit_code == 2
    said = report.verdict.sentences[1]
    assert "layers with p = 0.1" in said
    assert ("the step is random: two runs of it" in said) != seeded, "with a seed both runs are the same"


def test_a_step_that_is_random_without_dropout_is_named(tiny_model: Callable[..., Any]) -> None:
    def step(model: Any, rows: Any, micro_batch: int, accumulation: int) -> None:
        HomeMade("sgd")(model, rows, micro_batch, accumulation)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-2 * torch.randn_like(parameter))

    report = check(step, model=tiny_model(torch.float32), batch=SHORT)
    assert report.verdict.exit_code == 2
    assert "the step is random" in report.verdict.sentences[1] and "No dropout was found" in report.verdict.sentences[1]
    assert "parameters move outside of its step as well" in report.verdict.sentences[1]


def test_an_optimizer_that_is_called_in_every_micro_batch_is_said(tiny_model: Callable[..., Any]) -> None:
    report = check(HomeMade("adafactor", every=True), model=tiny_model(torch.float32), batch=SHORT)
    assert report.verdict.exit_code == 1 and "depends-on-cut" in ids(report)
    assert "called 4 times in one step" in report.cases[1].reason


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_step_up_the_loss_is_never_acquitted(optimizer: str, tiny_model: Callable[..., Any]) -> None:
    up = HomeMade(optimizer, scale=-1.0)
    report = check(up, model=tiny_model(torch.float32), batch=SHORT)
    assert ids(report) == {"against-gradient"} and "makes the loss larger" in report.verdict.sentences[0]
    assert blind(up, tiny_model(torch.float32)).faults or optimizer == "muon"


def test_a_merged_adapter_is_recognised_by_its_rank(tiny_model: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    base = tiny_model(torch.float32)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    HomeMade("adamw")(model, [dict(row) for row in SHORT], 2, 2)  # pyright: ignore
    after = {name: p.detach().clone() for name, p in model.merge_and_unload().named_parameters()}
    judge, case = judge_of(base), Case("case", 2, 2, examples=4, optimizer="unknown")
    result = judge.case(case, Evidence([before, after], pieces=judge.plan(case), scale_known=False))
    assert result.status == "not judged" and not result.faults
    assert "merged LoRA adapter of rank 4" in result.reason and "save the adapter itself" in result.reason


def saved(folder: Path, base: Any, step: HomeMade, **settings: Any) -> Path:
    """A folder with an adapter that one step has trained."""
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(**({"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings))
    model: Any = peft.get_peft_model(copy.deepcopy(base), config)
    step(model, [dict(row) for row in SHORT], 2, 2)  # pyright: ignore
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["norm"], "use_rslora": True}])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adam-decayed"])
def test_a_saved_adapter_is_followed_from_where_it_must_have_begun(
    optimizer: str, settings: dict[str, Any], tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    base = tiny_model(torch.float32)
    case = Case("case", 2, 2, examples=4, optimizer="unknown")
    for step, found in (
        (HomeMade(optimizer), []),
        (HomeMade(optimizer, weight="micro-batch"), ["micro-batch-mean"]),
    ):
        folder = saved(tmp_path / step.weight, base, step, **settings)
        adapter = saved_adapter(copy.deepcopy(base), folder)
        judge = judge_of(base).beside(adapter.model)
        evidence = Evidence([adapter.before, adapter.after], pieces=judge.plan(case), scale_known=False)
        result = judge.case(case, evidence)
        assert result.status == "judged", result.reason
        assert [finding.id for finding in result.faults] == found


def test_an_adapter_that_begins_elsewhere_is_refused(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = tiny_model(torch.float32)
    folder = saved(tmp_path / "pissa", base, HomeMade("sgd"), init_lora_weights="pissa")
    with pytest.raises(UserError, match=r"does not begin with a factor of zero.*pissa"):
        saved_adapter(copy.deepcopy(base), folder)
    model: Any = peft.get_peft_model(
        copy.deepcopy(base), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "ia3")
    with pytest.raises(UserError, match="IA3"):
        saved_adapter(copy.deepcopy(base), tmp_path / "ia3")


def test_weights_of_the_wrong_sign_under_a_known_rate_go_against_the_gradient(tiny_model: Callable[..., Any]) -> None:
    report = check(replace(HomeMade("sgd"), scale=-1.0), model=tiny_model(torch.float32), batch=SHORT, lr=0.5)
    assert ids(report) == {"against-gradient"}


@pytest.mark.everything
@pytest.mark.slow
def test_a_program_that_saves_an_adapter_is_judged_and_a_merged_one_is_named() -> None:
    pytest.importorskip("peft")
    only = ["micro 2 x 4"]
    right = audit_program([*WORDS, "--lora", "4"], only=only)
    assert right.ok, str(right)
    assert any(line.startswith("the weights under the adapter") for line in right.not_verified)
    wrong = audit_program([*WORDS, "--lora", "8", "--loss", "means", "--optimizer", "sgd"], only=only)
    assert ids(wrong) == {"micro-batch-mean"}
    merged = audit_program([*WORDS, "--lora", "8", "--merge"], only=only)
    assert merged.verdict.exit_code == 2 and "merged LoRA adapter of rank 8" in merged.verdict.sentences[1]


@pytest.mark.everything
@pytest.mark.slow
def test_dropout_and_optimizers_of_a_program_are_named() -> None:
    pytest.importorskip("peft")
    only = ["micro 2 x 4"]
    dropout = audit_program([*WORDS, "--lora", "8", "--dropout", "0.2"], only=only)
    assert dropout.verdict.exit_code == 2 and "lora_dropout = 0.2" in dropout.verdict.sentences[1]
    muon = audit_program([*WORDS, "--optimizer", "muon"], only=only)
    assert muon.verdict.exit_code == 2 and "as Muon, Shampoo or SOAP make it" in muon.verdict.sentences[1]
    assert audit_program([*WORDS, "--optimizer", "adafactor"], only=only).ok


def test_a_norm_of_ones_that_moved_by_equal_steps_has_moved() -> None:
    """Equal steps of one sign move equal numbers as decay would: once taken for a parameter that never moved."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 16, generator=generator)
    before = {"matrix": matrix, "norm": torch.ones(16)}
    gradient = torch.randn(64, 16, generator=generator).double()
    steps = 1e-2 * gradient.sign() * torch.rand(64, 16, generator=generator)
    expected = {"matrix": gradient, "norm": 2 + torch.rand(16, generator=generator).double()}
    moved = {"matrix": matrix - steps.float(), "norm": torch.ones(16) - 1e-3}
    assert find_untouched(before, moved, expected, 23).whole == ()
    assert find_untouched(before, moved | {"norm": before["norm"]}, expected, 23).whole == ("norm",)


def test_a_summed_loss_of_the_wrong_sign_goes_against_the_gradient_and_has_no_divisor(
    tiny_model: Callable[..., Any],
) -> None:
    """The size follows the tokens, as with a constant divisor; which of them is wrong is the sign."""

    def summed(model: Any, rows: Any, micro_batch: int, accumulation: int) -> None:
        tokens = sum(label != -100 for row in rows for label in row["labels"][1:])
        replace(HomeMade("sgd"), scale=-0.05 * tokens)(model, rows, micro_batch, accumulation)

    found = [check(summed, model=tiny_model(torch.float32), batch=SHORT[:size], lr=0.5) for size in (4, 3)]
    settled = settle([case for report in found for case in report.cases])
    assert scale_law([case for case in settled if case.status == "judged"]) == "tokens"
    assert {finding.id for case in settled for finding in case.faults} == {"against-gradient"}
