"""One text of a response for every grader, and every end token kept through a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.chatml import CHATML, CHATML_THINK, make_tokenizer
from tests.tiny_model import make_tiny_model
from thence.cli import main
from thence.data.response import response_text
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import UserError
from thence.evaluate.backends import Generation
from thence.evaluate.completion import request_outcome
from thence.http_client import Answer
from thence.pipeline.run import run
from thence.rollout.responses import grade
from thence.verify.reward import load_reward


def with_think_tokens() -> Any:
    tokenizer = make_tokenizer(CHATML_THINK)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    return tokenizer


def test_think_tags_that_are_special_tokens_reach_the_reward_and_the_end_does_not() -> None:
    tokenizer = with_think_tokens()
    ids = tuple(tokenizer.encode("hm</think>It is \\boxed{4}<|im_end|>", add_special_tokens=False))
    stops = (ids[-1],)
    with load_reward("math-after-think") as grader:
        (graded,) = grade(tokenizer, grader, [Trajectory(Prompt(0, (1,), answer="4", opening="<think>\n"), ids)], stops)
    assert graded.verdict == "right"
    assert graded.text == "<think>\nhm</think>It is \\boxed{4}"
    assert graded.text == response_text(tokenizer, ids, stops, "<think>\n")  # as `thence eval` has it


def test_a_server_whose_template_opens_the_thinking_gets_the_tag_put_back() -> None:
    def text(content: str) -> str:
        body = json.dumps({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]})
        found = request_outcome(Answer(200, {}, body.encode()), hide=str, remedy=str, file="")
        assert isinstance(found, Generation)
        return found.text

    assert text("hm</think>4") == "<think>\nhm</think>4"
    assert text("<think>hm</think>4") == "<think>hm</think>4"
    assert text("4") == "4"


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    from transformers import AutoModelForCausalLM

    tokenizer, folder = with_think_tokens(), tmp_path / "model"
    config = make_tiny_model().config
    config.vocab_size = len(tokenizer)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids("<|im_start|>"), tokenizer.eos_token_id]
    model.generation_config._from_model_config = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(folder: Path, model: Path, data: Path, **tables: Any) -> dict[str, Any]:
    reward = folder / "mine.py"
    reward.write_text("def closed(prompt, response, answer):\n    return float(response.startswith('<think>'))\n")
    return {
        "folder": str(folder / "run"),
        "stages": ["sft", "rl", "eval"],
        "model": {"path": str(model)},
        "data": {"source": [str(data)]},
        "sft": {"batch": 1, "steps": 1},
        "rl": {"steps": 1, "prompts": 1, "rollouts": 2, "max_tokens": 4, "reward": f"{reward}:closed"},
        "eval": {"max_tokens": 4, "reward": f"{reward}:closed"},
        **tables,
    }


def test_a_run_grades_with_the_prompts_opening_and_publishes_every_end_token(
    tmp_path: Path, model_folder: Path
) -> None:
    data = tmp_path / "d.jsonl"
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "hm</think>4"}]
    data.write_text(json.dumps({"messages": turns, "answer": "4"}) + "\n")
    folder = run(recipe(tmp_path, model_folder, data))
    for stage in ("rl", "eval"):
        lines = (folder / "stages" / stage / "samples.jsonl").read_text().splitlines()
        assert lines and all(json.loads(line)["score"] == 1.0 for line in lines)
    tokenizer = with_think_tokens()
    wanted = {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>", "<|im_start|>")}
    for stage in ("sft", "rl"):
        published = json.loads((folder / "stages" / stage / "model" / "generation_config.json").read_text())
        assert set(published["eos_token_id"]) == wanted
    with pytest.raises(UserError, match="does not read thnk"):
        again = recipe(tmp_path, model_folder, data)
        run(again, {"data.template_variables.thnk": 1, "folder": str(tmp_path / "other")})


def test_eval_takes_template_variables_and_refuses_unknown_ones(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model_folder / "chat_template.jinja").write_text(CHATML + "{% if think is false %}<no>{% endif %}")
    data = tmp_path / "p.jsonl"
    data.write_text(json.dumps({"question": "2+2?", "answer": "4"}) + "\n")
    common = ["eval", str(model_folder), "--suite", str(data), "--max-tokens", "2", "--samples", "1"]
    common += ["--grader", "exact", "--folder", str(tmp_path / "e")]
    assert main([*common, "--template-variable", "thnk=false"]) == 2
    assert "does not read thnk" in capsys.readouterr().err
    common[-1] = str(tmp_path / "f")
    assert main([*common, "--template-variable", "think=false"]) == 0
    facts = json.loads((tmp_path / "f" / "environment.json").read_text())
    assert facts["template_variables"] == {"think": False}
