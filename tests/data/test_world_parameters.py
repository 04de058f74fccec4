"""The embedded world with parameters in its name: what they change, what stays, and which are refused."""

from __future__ import annotations

import hashlib
import re

import pytest

from tests.data.test_world import worked_out
from thence.cli import main
from thence.data.worlds import chain
from thence.data.worlds.named import world_examples
from thence.errors import UserError
from thence.recipe import load_recipe

GOLDEN = {
    "train": "9c963678eef5034f",
    "dev": "546cf5e8c7b7fc01",
    "test": "e7cffcfb58bba49b",
    "ood": "bcec325944ac0706",
    "rich": "6a664a610053a3fb",
    "poor": "348501d7bee8666d",
}
"""Of the world without parameters, as it was before it had any: 500 problems, or 50,000 tokens, of seed 3."""


def digest(made: object) -> str:
    return hashlib.sha256(repr(made).encode()).hexdigest()[:16]


@pytest.mark.parametrize("split", chain.SPLITS)
def test_without_parameters_the_problems_are_what_they_always_were(split: str) -> None:
    assert digest(chain.problems(split, 500, 3)) == GOLDEN[split]


@pytest.mark.parametrize("base", ["rich", "poor"])
def test_without_parameters_the_corpora_are_what_they_always_were(base: chain.Base) -> None:
    assert digest(list(chain.pretraining(base, 50_000, 3))) == GOLDEN[base]


@pytest.mark.parametrize(
    ("source", "split"),
    [("world:chain?expert=mixed&wrong=0", "train"), ("world:chain?question=0.4&slip=0.1", "pretraining-rich")],
)
def test_the_default_values_written_out_change_nothing(source: str, split: str) -> None:
    plain, written = world_examples("world:chain", split, 300, 3), world_examples(source, split, 300, 3)
    assert [(e.prompt, e.demonstration, e.answer) for e in plain] == [
        (e.prompt, e.demonstration, e.answer) for e in written
    ]


def demonstrations(source: str, n: int = 600) -> list[str]:
    return [str(example.demonstration) for example in world_examples(source, "train", n, 1)]


@pytest.mark.parametrize("source", ["world:chain?expert=careful", "world:chain?expert=hasty", "world:chain?wrong=0.5"])
def test_every_expert_shows_the_same_problems_with_the_right_reference(source: str) -> None:
    plain = world_examples("world:chain", "train", 300, 1)
    found = world_examples(source, "train", 300, 1)
    assert [(e.prompt, e.answer) for e in found] == [(e.prompt, e.answer) for e in plain]
    assert [e.demonstration for e in found] != [e.demonstration for e in plain]


def test_the_careful_expert_writes_everything_and_splits_every_product() -> None:
    for shown in demonstrations("world:chain?expert=careful"):
        assert re.match(r"\d\d[a-d]", shown)  # neither in the head nor terse
        if "," not in shown:
            assert shown.count("*") == shown.count(":")


def test_the_hasty_expert_never_splits_and_mostly_writes_little() -> None:
    shown = demonstrations("world:chain?expert=hasty")
    assert not any(":" in text or "," in text for text in shown)
    assert 0.6 < sum(text[0] in "#a" for text in shown) / len(shown) < 0.8


@pytest.mark.parametrize("expert", ["mixed", "careful", "hasty"])
def test_experts_are_right_unless_they_are_asked_to_be_wrong(expert: str) -> None:
    for example in world_examples(f"world:chain?expert={expert}", "train", 300, 2):
        assert str(example.demonstration).endswith(f"#{worked_out(example.prompt)[-1]:02d}")


def test_wrong_demonstrations_are_as_many_as_asked_and_have_one_wrong_step() -> None:
    right = demonstrations("world:chain", 2000)
    found = world_examples("world:chain?wrong=0.2", "train", 2000, 1)
    wrong = [(e, was) for e, was in zip(found, right, strict=True) if e.demonstration != was]
    assert 0.17 < len(wrong) / 2000 < 0.23
    for example, was in wrong:
        shown, truth = str(example.demonstration), worked_out(example.prompt)
        assert re.sub(r"\d", "0", shown.split("#")[0])[:3] == re.sub(r"\d", "0", was.split("#")[0])[:3]  # same habit
        assert int(shown.rsplit("#", 1)[1]) != truth[-1] == int(str(example.answer))
        steps = re.findall(r"([a-d])([-+*]?)(\d?)[^a-d#]*?(\d\d)(?=[a-d#])", shown)
        if steps:
            values, slips = [truth[0]], 0
            for (_, op, digit), (*_, after) in zip(
                re.findall(r"([a-d])([-+*])([2-9])", example.prompt), steps, strict=True
            ):
                expected = chain.Step("a", op, int(digit)).apply(values[-1])
                slips += int(after) != expected
                values.append(int(after))
            assert slips == 1 and values[-1] == int(shown.rsplit("#", 1)[1])


def test_more_wrong_demonstrations_hold_the_fewer() -> None:
    right, few, many = (demonstrations(f"world:chain?wrong={share}") for share in (0, 0.1, 0.4))
    wrong = {i for i in range(600) if few[i] != right[i]}
    assert len(wrong) > 0 and all(few[i] == many[i] for i in wrong)
    assert sum(many[i] != right[i] for i in range(600)) > 2 * len(wrong)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
def test_the_share_of_questions_is_the_one_asked_for_and_the_rest_keeps_its_proportions(share: float) -> None:
    texts = [str(e.demonstration) for e in world_examples(f"world:chain?question={share}", "pretraining-rich", 6000, 0)]
    asked = sum("?" in text for text in texts) / len(texts)
    assert abs(asked - share) < 0.02
    if share < 1:
        look_ups = sum(bool(re.match(r"\d\d[a-d][-+*]\d[a-d]", text)) and "?" not in text for text in texts)
        assert abs(look_ups / len(texts) / (1 - asked) - 0.25 / 0.6) < 0.03


def test_slips_are_as_frequent_as_asked() -> None:
    def right(slip: float) -> float:
        found = world_examples(f"world:chain?question=1&slip={slip}", "pretraining-rich", 1000, 0)
        texts = [str(e.demonstration) for e in found]
        return sum(int(t.rsplit("#", 1)[1]) == worked_out(t.split("?")[0] + "?")[-1] for t in texts) / len(texts)

    assert right(0) == 1.0
    assert right(1) < 0.05 < 0.5 < right(0.1) < 0.85


REFUSED = [
    ("world:chain?questoin=0.6", "pretraining-rich", "'question'"),
    ("world:chain?colour=red", "train", "train has expert and wrong"),
    ("world:chain?question=1.5", "pretraining-rich", "at most 1"),
    ("world:chain?slip=-0.1", "pretraining-rich", "at least 0"),
    ("world:chain?wrong=nan", "train", "finite"),
    ("world:chain?wrong=much", "train", "a number"),
    ("world:chain?wrong=0_1", "train", "a number"),
    ("world:chain?wrong= 0.1", "train", "a number"),
    ("world:chain?wrong=\u0661", "train", "a number"),
    ("world:chain?expert=lazy", "train", "mixed, careful, hasty"),
    ("world:chain?question=0.5", "pretraining-poor", "changes nothing"),
    ("world:chain?question=0.5", "train", "changes nothing"),
    ("world:chain?expert=careful", "test", "changes nothing"),
    ("world:chain?wrong=0.2", "pretraining-rich", "changes nothing"),
    ("world:chain?wrong=0.2&wrong=0.3", "train", "given twice"),
    ("world:chain?", "train", "is no parameter"),
    ("world:chain?wrong", "train", "is no parameter"),
    ("world:ring?wrong=0.2", "train", "no embedded world"),
    ("world:chain", "valid", "pretraining-rich"),
]


@pytest.mark.parametrize(("source", "split", "said"), REFUSED)
def test_a_parameter_that_cannot_be_meant_is_refused(source: str, split: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        world_examples(source, split, 4, 0)
    assert said in str(caught.value) and caught.value.remedy and (caught.value.field or "").startswith("data.")


def test_thence_data_shows_a_world_with_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "world:chain?expert=careful", "--data.limit", "20"]) == 0
    assert "20 rows, 20 with a demonstration" in capsys.readouterr().out
    assert main(["data", "world:chain?wrong=2", "--data.limit", "20"]) == 2
    assert "must be at most 1, not 2" in capsys.readouterr().err


def test_a_run_is_planned_and_tried_with_a_world_with_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--sft.data.source", "world:chain?wrong=0.2", "--dry-run"]
    assert main(["run", "quickstart", *flags]) == 0
    assert main(["run", "quickstart", *flags[:1], "world:chain?slip=0.2", "--dry-run"]) == 2
    said = capsys.readouterr()
    assert "changes nothing in the split 'train'" in said.out + said.err
    recipe = load_recipe("base-rich", {"data.source": ["world:chain?question=0.2&slip=0"], "data.limit": 30})
    assert recipe.data.source == ["world:chain?question=0.2&slip=0"]


def test_an_evaluation_suite_refuses_a_world_with_parameters(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = tmp_path / "mine.toml"
    task = 'name = "mine"\n\n[[tasks]]\nname = "a"\nsource = "world:chain?wrong=0.2"\nproblems = 4\ngrader = "exact"\n'
    suite.write_text(task)
    assert main(["eval", "world:chain/rich", "--suite", str(suite)]) == 2
    assert "its parameters change no problem" in capsys.readouterr().err


def test_calls_end_at_the_first_product_and_the_other_demonstrations_stay() -> None:
    plain, called = demonstrations("world:chain"), demonstrations("world:chain?calls=0.5")
    changed = [text for before, text in zip(plain, called, strict=True) if before != text]
    assert 0.4 * len(plain) < len(changed) < 0.6 * len(plain)
    assert all(re.fullmatch(r"\d\d([a-d][+-]\d=\d\d)*[a-d]\*\d", text) for text in changed)
    more = demonstrations("world:chain?calls=0.8")
    assert all(text == more[i] for i, text in enumerate(called) if text != plain[i]), (
        "the larger share holds the smaller"
    )
