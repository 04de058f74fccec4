"""The embedded world: every problem and demonstration is right, splits do not overlap, lengths are as promised."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thence.data.worlds import chain
from thence.data.worlds.vocabulary import END, PAD, UNKNOWN, VOCABULARY, build_tokenizer, save_tokenizer

SPECIAL = {END, PAD, UNKNOWN}


def worked_out(prompt: str) -> list[int]:
    """Values after every step, from the prompt's text alone."""
    start, rest = int(prompt[:2]), prompt[2:]
    assert re.fullmatch(r"([a-d][-+*][2-9])+\?", rest)
    values = [start]
    for op, digit in re.findall(r"[a-d]([-+*])([2-9])", rest):
        before, d = values[-1], int(digit)
        values.append((before + d if op == "+" else before - d if op == "-" else before * d) % 100)
    return values


def every_split(n: int, seed: int = 0) -> dict[str, list[chain.ChainProblem]]:
    return {split: chain.problems(split, n, seed) for split in chain.SPLITS}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), split=st.sampled_from(chain.SPLITS))
def test_every_demonstration_ends_in_the_true_answer(seed: int, split: str):
    for problem in chain.problems(split, 50, seed):
        truth = f"{worked_out(problem.prompt)[-1]:02d}"
        assert problem.answer == truth
        assert problem.demonstration.rsplit("#", 1)[1] == truth


@pytest.mark.parametrize("habit", ["terse", "written", "slow"])
def test_written_work_is_right_at_every_step(habit: chain.Habit):
    rng = random.Random(7)
    for _ in range(300):
        drawn = chain.draw_chain(rng, ood=rng.random() < 0.3)
        work = chain.demonstrate(drawn, rng, habit).split("#")[0]
        values = worked_out(drawn.prompt)
        steps = re.findall(r"[a-d][^a-d]*", work)
        assert [int(s[-2:]) for s in steps] == values[1:]
        for split in re.finditer(r"(\d\d)[a-d]\*(\d):(\d\d)\+(\d\d)=(\d\d)", work):
            value, digit, tens, ones, after = map(int, split.groups())
            assert (tens, ones) == ((value - value % 10) * digit % 100, value % 10 * digit)
            assert (tens + ones) % 100 == after
        if habit == "slow":
            assert_counts_right(work)


def assert_counts_right(work: str):
    value = int(work[:2])
    for op, digit, stations in re.findall(r"[a-d]([-+*])(\d)((?:,\d\d)+)", work):
        expected, v = [], value
        for _ in range(int(digit) - (op == "*")):
            v = (v + {"+": 1, "-": -1, "*": value}[op]) % 100
            expected.append(v)
        assert [int(s) for s in stations[1:].split(",")] == expected
        value = expected[-1]


def test_the_same_arguments_give_the_same_problems_and_other_seeds_others():
    assert chain.problems("train", 200, 3) == chain.problems("train", 200, 3)
    assert chain.problems("train", 200, 3) != chain.problems("train", 200, 4)
    # A longer list begins with the shorter one, so a larger evaluation contains the smaller.
    assert chain.problems("test", 200, 3)[:50] == chain.problems("test", 50, 3)


def test_no_prompt_is_in_two_splits_or_twice_in_one_call():
    prompts = {split: [p.prompt for p in problems] for split, problems in every_split(4000).items()}
    for split, own in prompts.items():
        assert len(set(own)) == len(own)
        for other in set(prompts) - {split}:
            assert not set(own) & set(prompts[other])


def test_a_prompt_keeps_its_split_whatever_the_seed():
    for seed in range(5):
        for split, ps in every_split(200, seed).items():
            assert all(p.split == split for p in ps)
            if split != "ood":
                assert {chain.split_of(p.prompt) for p in ps} == {split}


def test_out_of_distribution_problems_have_more_products_than_any_training_problem():
    in_distribution = max(p.prompt.count("*") for p in chain.problems("train", 3000))
    assert all(p.prompt.count("*") > in_distribution for p in chain.problems("ood", 300))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, dev, test, ood"):
        chain.problems("valid", 3)


def test_demonstrations_have_a_heavy_tail_of_lengths_below_the_cap():
    lengths = sorted(len(p.demonstration) + 1 for p in chain.problems("train", 4000))
    median, mean = lengths[len(lengths) // 2], sum(lengths) / len(lengths)
    assert 20 <= mean <= 30
    assert lengths[int(0.95 * len(lengths))] >= 2.2 * median
    assert lengths[-1] >= 4 * median
    assert lengths[-1] >= 20 * lengths[len(lengths) // 10]  # a tenth of the demonstrations are bare answers
    assert lengths[-1] <= 160


def test_the_rich_corpus_asks_questions_of_the_train_split_only_and_the_poor_one_never_answers():
    rich = list(chain.pretraining("rich", 100_000, 0))
    asked = [text.split("?")[0] + "?" for text in rich if "?" in text]
    assert len(asked) > 0.1 * len(rich)
    assert {chain.split_of(prompt) for prompt in asked} == {"train"}
    assert max(prompt.count("*") for prompt in asked) <= 2
    poor = list(chain.pretraining("poor", 100_000, 0))
    assert not any("#" in text for text in poor)


@pytest.mark.parametrize("base", ["rich", "poor"])
def test_a_corpus_is_as_long_as_asked_and_repeats_itself_for_a_seed(base: chain.Base):
    corpus = list(chain.pretraining(base, 20_000, 1))
    assert 20_000 <= sum(len(text) + 2 for text in corpus) < 20_200
    assert corpus == list(chain.pretraining(base, 20_000, 1))
    assert corpus[:50] != list(islice(chain.pretraining(base, 20_000, 2), 50))


def test_facts_of_the_corpora_are_true():
    rng = random.Random(0)
    for _ in range(2000):
        text = chain.fact(rng)
        if match := re.fullmatch(r"(\d\d)\+(\d\d)=(\d\d)", text):
            a, b, c = map(int, match.groups())
            assert (a + b) % 100 == c
        elif match := re.fullmatch(r"(\d\d)([a-d][-+*]\d)=(\d\d)", text):
            assert worked_out(f"{match[1]}{match[2]}?")[-1] == int(match[3])
        else:
            match = re.fullmatch(r"(\d\d)[a-d]\*(\d):(\d\d)\+(\d\d)", text)
            assert match is not None, text
            value, digit, tens, ones = map(int, match.groups())
            assert (tens + ones) % 100 == value * digit % 100 and tens % 10 == 0


def test_exercises_of_the_poor_corpus_are_true_but_never_a_chain():
    rng = random.Random(1)
    chained = 0
    for _ in range(300):
        listed, working = chain.exercise(rng).split("?")
        worked = working.split(";")
        assert worked[0][:2] == listed[:2]  # the start is found
        previous = None
        for text in worked:
            match = re.fullmatch(r"(\d\d)([a-d][-+*]\d)(?::\d\d\+\d\d)?=(\d\d)", text)
            assert match is not None, text
            assert match[2] in listed
            assert worked_out(f"{match[1]}{match[2]}?")[-1] == int(match[3])
            chained += int(match[1]) == previous
            previous = int(match[3])
    assert chained < 0.05 * 300 * 3  # by chance only


def test_every_text_is_made_of_the_vocabulary():
    assert len(VOCABULARY) <= 40 and len(set(VOCABULARY)) == len(VOCABULARY)
    ordinary = set(VOCABULARY) - SPECIAL
    for ps in every_split(300).values():
        assert all(set(p.prompt + p.demonstration) <= ordinary for p in ps)
    for base in ("rich", "poor"):
        assert all(set(text) <= ordinary for text in chain.pretraining(base, 20_000, 0))


def test_the_tokenizer_puts_exactly_one_beginning_token_and_gives_texts_back(tmp_path: Path):
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    for tokenizer in (build_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (END, END, PAD)
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
        for p in chain.problems("train", 20):
            ids = tokenizer(p.prompt)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
            assert len(ids) == len(p.prompt) + 1
            response = tokenizer(p.demonstration, add_special_tokens=False)["input_ids"]
            assert len(response) == len(p.demonstration)
            assert tokenizer.decode(ids, skip_special_tokens=True) == p.prompt
            assert tokenizer.decode([*ids, *response]) == END + p.prompt + p.demonstration


def test_a_character_outside_the_vocabulary_becomes_the_unknown_token():
    tokenizer = build_tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("4é\n")["input_ids"]) == [END, "4", UNKNOWN, UNKNOWN]


def test_the_world_is_made_without_torch():
    code = (
        "import sys; from thence.data.worlds import chain, vocabulary; chain.problems('train', 5); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'tokenizers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
