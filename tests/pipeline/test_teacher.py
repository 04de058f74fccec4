"""What the teacher of self-distillation reads, what is refused before the first step, and that runs resume."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import thence.pipeline.rl_stage as rl_stage
from tests.data.chatml import CHATML_THINK, decode, make_tokenizer, write_jsonl
from tests.oracle import row_statistics
from tests.recipes import ROWS, Tables, changed, file_recipe, llama, write_rows
from tests.runs import metrics, trained
from tests.tiny_model import make_tiny_model
from thence.cli import main
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import UserError
from thence.methods.base import Teacher
from thence.methods.self_distillation import Sdft, Sdpo
from thence.pipeline.prompts import load_prompts
from thence.pipeline.run import run
from thence.pipeline.teacher import TeacherPass, TeacherPrompts, check_teacher_rows
from thence.recipe import Data
from thence.toml import to_toml
from thence.train.step import StepSettings
from thence.train.trainer import Trainer

FORM = "{solution};{prompt}"
SLOW = pytest.mark.slow
CHAT = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Add {prompt} and {solution}."},
            {"role": "assistant", "content": "<think>\nwhy\n</think>\nBoth {x}."},
        ]
    }
]


def asked(tmp_path: Path, rows: list[Any], tokenizer: Any, form: str) -> tuple[TeacherPrompts, list[Prompt], Data]:
    data = Data(source=[write_jsonl(tmp_path / "rows.jsonl", rows)])
    prompts = load_prompts(data, tokenizer)
    stops = (tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id)
    return TeacherPrompts(Teacher("start", form), data, tokenizer, stops), prompts, data


def test_the_last_turn_is_written_anew_and_the_rest_of_the_conversation_stands(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(CHATML_THINK)
    made, (prompt,), _ = asked(tmp_path, CHAT, tokenizer, "{prompt} <{solution}> Go.")
    ids = made.token_ids(prompt, prompt.demonstration_ids or ())
    assert decode(tokenizer, ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nAdd {prompt} and {solution}. <<think>\nwhy\n</think>\nBoth {x}.> Go.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


def test_a_teacher_who_is_shown_nothing_reads_the_students_tokens(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos=True)
    rows = [{"prompt": "1+1?", "completion": "2"}, {"messages": [*CHAT[0]["messages"][:2], {"role": "assistant",
            "content": "2"}]}]  # fmt: skip
    made, prompts, _ = asked(tmp_path, rows[:1], tokenizer, "{prompt}{solution}")
    assert made.token_ids(prompts[0], ()) == prompts[0].token_ids
    made, prompts, _ = asked(tmp_path, rows[1:], tokenizer, "{solution}{prompt}")
    assert made.token_ids(prompts[0], ()) == prompts[0].token_ids


def test_a_plain_prompt_is_continued_by_the_form(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    made, (prompt,), _ = asked(tmp_path, [{"prompt": "1+1?", "completion": "two"}], tokenizer, "{solution}; {prompt}")
    assert decode(tokenizer, made.token_ids(prompt, prompt.demonstration_ids or ())) == "two; 1+1?"


# Scores.


class Made:
    def __init__(self, answers: dict[Any, Any]) -> None:
        self.answers = answers

    def token_ids(self, prompt: Prompt, solution: Any) -> tuple[int, ...]:
        found = self.answers[solution]
        if isinstance(found, Exception):
            raise found
        return found


def teacher(method: Any, answers: dict[Any, Any], limit: int | None = None) -> tuple[TeacherPass, Any]:
    model = make_tiny_model()
    trainer = Trainer(model, 1e-2, StepSettings(64, False, 0.0, torch.float64))
    made: Any = Made(answers)
    return TeacherPass("rl", method, made, trainer, 0.7, None, limit), model


def test_a_response_is_scored_under_the_teachers_prompt_at_the_temperature() -> None:
    rows = [Trajectory(Prompt(0, (2, 3), (9,)), (4, 5, 6)), Trajectory(Prompt(1, (2,)), (4,))]
    found, model = teacher(Sdft(), {(9,): (7, 8, 9, 2, 3)})
    scores = found.logps(rows)
    expected = row_statistics(model, Trajectory(Prompt(0, (7, 8, 9, 2, 3)), (4, 5, 6)), 0.7)[0].detach()
    assert scores[1] is None and scores[0] is not None
    torch.testing.assert_close(scores[0].double(), expected, rtol=0, atol=1e-12)


def test_what_cannot_be_shown_has_no_teacher_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    from thence.errors import DataError

    rows = [Trajectory(Prompt(0, (2, 3)), ids, score=score) for ids, score in (((4,), 1.0), ((5,), 1.0), ((6,), 0.0))]
    answers = {(4,): tuple(range(2, 12)), (5,): DataError("a turn contains an end token", remedy="remove it")}
    found, _ = teacher(Sdpo(), answers, limit=10)
    with caplog.at_level(logging.WARNING):
        assert found.logps(rows) == [None] * 3
        assert found.logps(rows) == [None] * 3
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("rl: a response cannot be shown to the teacher (a turn contains an end token)")
    fits, _ = teacher(Sdpo(), answers, limit=11)
    assert [logp is None for logp in fits.logps(rows)] == [True, False, False]


# Refused before the first step.


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    recipe = changed(file_recipe(tmp_path), {"stages": ["rl"], "rl.options": {"form": FORM}})
    del recipe["sft"], recipe["eval"]
    return recipe


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "sdft without demonstrations": ({"rl.method": "sdft", "data.source": ["ASKED"]}, "no example has a demonst", ""),
    "a form in unknown characters": (
        {"rl.method": "sdft", "rl.options": {"form": "{prompt}\n{solution}"}},
        "characters that the tokenizer does not know",
        "rl.options.form",
    ),
    "a form without its solution": (
        {"rl.method": "sdpo", "rl.options": {"form": "{prompt}"}},
        "it must hold {solution} once",
        "rl.options.form",
    ),
    "demonstrations that leave no room": (
        {"rl.method": "sdft", "rl.max_tokens": 50},
        "tokens with its demonstration in it; a response of up to 50 more exceed the model's context of 64",
        "rl.max_tokens",
    ),
    "right responses that leave no room": (
        {"rl.method": "sdpo", "rl.max_tokens": 30},
        "with no solution in it yet; a solution and a response of up to 30 more exceed",
        "rl.max_tokens",
    ),
    "a moving average of adapters": (
        {"rl.method": "sdpo", "model.lora": {"rank": 2}},
        "a moving average of adapters is not kept",
        "rl.options.teacher",
    ),
    "a fault beside whole distributions": (
        {
            "rl.method": "sdft",
            "rl.options": {"form": FORM, "divergence": "jsd"},
            "rl.fault": {"names": ["mean-of-means"]},
        },
        "a fault makes rows of its own, which no teacher reads",
        "rl.options.divergence",
    ),
    "a lone response": ({"rl.method": "sdpo", "rl.rollouts": 1}, "sdpo learns nothing from 1 rollout", "rl.rollouts"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_teacher_that_cannot_be_is_refused_by_run_and_dry_run(
    name: str, tables: Tables, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, message, field = WRONG[name]
    rows = [{"question": row["prompt"], "answer": "3"} for row in ROWS]
    text = json.dumps(flags).replace("ASKED", write_rows(tmp_path / "asked.jsonl", rows))
    recipe = changed(tables, json.loads(text))
    with pytest.raises(UserError) as error:
        run(recipe)
    assert message in str(error.value) and error.value.remedy
    assert not field or error.value.field == field
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    assert main(["run", str(tmp_path / "recipe.toml"), "--dry-run"]) == 2
    assert message in capsys.readouterr().err


@SLOW
@pytest.mark.parametrize(
    ("method", "tokens"), [("sdft", 50), ("sdpo", 30)], ids=["the demonstration", "a right response"]
)
def test_the_remedy_of_a_teachers_prompt_that_is_too_long_works(method: str, tokens: int, tables: Tables) -> None:
    with pytest.raises(UserError) as error:
        run(changed(tables, {"rl.method": method, "rl.max_tokens": tokens}))
    flag, number = error.value.remedy.split()
    assert flag == "--rl.max-tokens"
    run(changed(tables, {"rl.method": method, "rl.max_tokens": int(number)}))


def test_a_prompt_that_leaves_no_room_at_all_is_refused_with_limits_that_fit(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    _, prompts, data = asked(tmp_path, [{"prompt": "a" * 30, "completion": "b" * 40}], tokenizer, FORM)
    with pytest.raises(UserError) as error:
        check_teacher_rows("rl", Sdft({"form": FORM}), data, tokenizer, prompts, 8, 64)
    asks = "--rl.data.max-prompt-tokens 16 --rl.data.max-response-tokens 16 --rl.max-tokens 16"
    assert asks in error.value.remedy


def test_a_conversation_that_a_tool_ends_is_refused_with_its_line(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}, {"role": "assistant", "content": "c"}]
    tokenizer = make_tokenizer("{# tool #}" + CHATML_THINK.replace("<think>\n", ""))
    _, prompts, data = asked(tmp_path, [{"messages": turns}], tokenizer, FORM)
    with pytest.raises(UserError, match="the last turn of the prompt is of role tool") as error:
        check_teacher_rows("rl", Sdft({"form": FORM}), data, tokenizer, prompts, 8, None)
    assert "rows.jsonl" in str(error.value)


# Whole runs.


def test_prompts_without_a_demonstration_are_not_drawn_and_that_is_said(
    tables: Tables, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row if i % 4 == 0 else {"prompt": row["prompt"], "answer": "1"} for i, row in enumerate(ROWS)]
    drawn: list[Any] = []
    sampler = rl_stage.RolloutSampler

    def noted(context: Any, stage: Any, prompts: Any, *rest: Any) -> Any:
        drawn.extend(prompts)
        return sampler(context, stage, prompts, *rest)

    monkeypatch.setattr(rl_stage, "RolloutSampler", noted)
    source = write_rows(tmp_path / "mixed.jsonl", rows)
    run(changed(tables, {"rl.method": "sdft", "data.source": [source], "rl.steps": 2}))
    assert [prompt.index for prompt in drawn] == [0, 4]
    assert "6 of 8 prompts have no demonstration that the teacher could read; they are not drawn" in caplog.text
    assert [line["taught_share"] for line in metrics(tmp_path / "run")] == [1.0, 1.0]


@pytest.mark.parametrize("divergence", ["sampled", pytest.param("reverse-kl", marks=SLOW)])
@pytest.mark.parametrize("kind", ["average", pytest.param("start", marks=SLOW), pytest.param("current", marks=SLOW)])
def test_a_run_that_stops_goes_on_with_the_same_teacher(
    kind: str, divergence: str, tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rl = {"method": "sdpo", "steps": 4, "rollouts": 4, "mini_batch": 1, "lr": 1e-2, "checkpoint_every": 1}
    rl["options"] = {"teacher": kind, "form": FORM, "average_rate": 0.5, "divergence": divergence}
    expected, lines = trained(tables, tmp_path / "whole", **rl)
    assert any(line["grad_norm"] > 0 for line in lines)
    step = rl_stage.Loop.step

    def stops(loop: Any, at: int) -> Any:
        if at == 2:
            raise KeyboardInterrupt
        return step(loop, at)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rl_stage.Loop, "step", stops)
        trained(tables, tmp_path / "cut", **rl)
    found, again = trained(tables, tmp_path / "cut", **rl)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]


def test_the_average_is_part_of_the_checkpoint_and_lies_between_start_and_end(tables: Tables, tmp_path: Path) -> None:
    options = {"form": FORM, "average_rate": 0.5, "teacher": "average"}
    rl = {"method": "sdft", "steps": 1, "lr": 1e-2, "options": options}
    end, _ = trained(tables, tmp_path / "one", **rl)
    files = (tmp_path / "one" / "stages" / "rl" / "checkpoints").glob("step-*/*.safetensors")
    kept = {name: value for file in files for name, value in load_file(file).items()}
    averages = {name: value for name, value in kept.items() if "average/" in name}
    start, _ = trained(tables, tmp_path / "none", **{**rl, "lr": 1e-30})
    assert len(averages) == len(end)
    for name, value in end.items():
        (mean,) = [kept for key, kept in averages.items() if f"average/{name}/weight" in key]
        torch.testing.assert_close(mean, (start[name] + value) / 2, rtol=1e-5, atol=1e-7)


def test_the_teachers_tokens_count_in_the_rule_and_its_pass_in_what_is_executed(tables: Tables, tmp_path: Path) -> None:
    rl = {"steps": 1, "lr": 1e-2, "rollouts": 4}
    _, (own,) = trained(tables, tmp_path / "gspo", **{**rl, "method": "gspo", "options": {"std": False}})
    _, (taught,) = trained(tables, tmp_path / "sdft", **{**rl, "method": "sdft"})
    assert taught["sampled_tokens"] == own["sampled_tokens"] == taught["trained_tokens"]
    parameters = own["flops"] / (8 * own["sampled_tokens"])
    assert taught["flops"] == pytest.approx(10 * parameters * own["sampled_tokens"])
    assert taught["executed_flops"] > own["executed_flops"] + 2 * parameters * own["sampled_tokens"] * 0.5


@SLOW
def test_adapters_are_off_where_the_teacher_is_the_start(tables: Tables, tmp_path: Path) -> None:
    lora = changed(tables, {"model.lora": {"rank": 2}})
    rl = {"method": "sdft", "steps": 3, "lr": 1e-2, "options": {"teacher": "start", "form": FORM}}
    _, lines = trained(lora, tmp_path / "lora", **rl)
    assert [line["taught_share"] for line in lines] == [1.0] * 3 and all(line["grad_norm"] > 0 for line in lines)


@SLOW
def test_a_teacher_without_a_right_response_is_said_and_nothing_is_learned(
    tables: Tables, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rl = {"method": "sdpo", "steps": 10, "options": {"form": FORM, "success": 9.0}}
    _, lines = trained(tables, tmp_path / "run", **rl)
    assert {line["taught_share"] for line in lines} == {0.0} and {line["grad_norm"] for line in lines} == {0.0}
    assert "no response had a teacher" in caplog.text


def test_a_plan_counts_the_teacher(tables: Tables, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables["model"]["init"] = llama(max_position_embeddings=64)
    told = {}
    for method, options in {"gspo": {}, "sdft": {"form": FORM}, "now": {"form": FORM, "teacher": "current"}}.items():
        name = "sdft" if method == "now" else method
        file = tmp_path / f"{method}.toml"
        file.write_text(to_toml({**tables, "rl": {**tables["rl"], "method": name, "options": options}}))
        assert main(["run", str(file), "--dry-run"]) == 0
        told[method] = capsys.readouterr().out
    assert "a teacher scores every response" in told["sdft"] and "a teacher scores every response" in told["now"]
    assert [f"teacher {'':<3}" in told[m] or "  teacher" in told[m] for m in told] == [False, True, False]
