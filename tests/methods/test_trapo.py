"""TRAPO: which responses the expert begins, where prefixes end, what is trained, and what is refused."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.methods.trapo_cases import Rewarded, levels
from tests.oracle import weights_of
from thence.compare.collect import arm_of
from thence.compare.recipe import check_methods, load_comparison, shipped_comparisons
from thence.data.trajectory import Trajectory
from thence.errors import RecipeError
from thence.methods import registry
from thence.methods.trapo import Trapo, cut, trained_prefixes
from thence.methods.unknown import leave_out
from thence.objective import Normaliser
from thence.pipeline.run import method_labels
from thence.recipe import Rl, load_recipe

FIRST = (0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0)
SECOND = (1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0)


def composed(*rewards: Any, preset: str = "clean", **fields: Any) -> list[Trajectory]:
    return Trapo({"preset": preset}).compose(Rewarded(*rewards, **fields), len(rewards), 8)


@pytest.mark.parametrize("preset", ["clean", "code", "paper"])
def test_a_prompt_with_low_rewards_is_guided_in_every_later_micro_group(preset: str) -> None:
    found = composed(FIRST, preset=preset)
    assert levels(found) == [0, 0, 0, 0, 1, 1, 2, 3]
    assert [t.score for t in found] == list(FIRST)
    assert trained_prefixes(found) == [False] * 5 + [True] * 3
    weights = weights_of(Trapo({"preset": preset}), found)
    advantages = [-0.375, 0.625, -0.375, -0.375, -0.375, -0.375, 0.625]
    assert [w[0, -1].item() for w in weights[:7]] == advantages
    assert weights[7][0].tolist() == [0.0] * 101  # the demonstration has no own token


@pytest.mark.parametrize(
    ("preset", "expected"), [("code", [0] * 7 + [3]), ("clean", [0] * 7 + [3]), ("paper", [0] * 6 + [2, 3])]
)
def test_code_and_paper_differ_where_four_of_six_are_right(preset: str, expected: list[int]) -> None:
    found = composed(SECOND, preset=preset)
    assert levels(found) == expected
    assert [t.score for t in found] == list(SECOND)


@given(rewards=st.lists(st.booleans(), min_size=8, max_size=8))
def test_the_codes_sums_decide_in_the_presets_clean_and_code_and_means_in_paper(rewards: list[bool]) -> None:
    scores = [float(right) for right in rewards]
    sums = [0.0, *(sum(scores[:n]) for n in (4, 6, 7))]
    code = [sums[1] < 2, sums[2] < 4, sums[3] < 7]
    paper = [sums[1] / 4 < 0.5, sums[2] / 6 < 0.7, sums[3] / 7 < 0.9]
    for preset, guided in (("clean", code), ("code", code), ("paper", paper)):
        a, b, c = (level if is_guided else 0 for level, is_guided in zip((1, 2, 3), guided, strict=True))
        assert levels(composed(scores, preset=preset)) == [0, 0, 0, 0, a, a, b, c]


def test_the_first_sequence_of_a_guided_micro_group_of_two_has_no_term_on_its_prefix() -> None:
    found = composed(FIRST, breaks=(40, 60))
    assert [t.prefix for t in found] == [0, 0, 0, 0, 41, 41, 61, 0]
    weights = weights_of(Trapo({"entropy": 0.0}), found)
    assert [w[1].sum().item() for w in weights] == [0, 0, 0, 0, 0, 41, 61, 101]
    assert weights[4][0].tolist() == [0.0] * 41 + [-0.375] * 2
    assert weights[6].tolist() == [[0.0] * 61 + [0.625] * 2, [1.0] * 61 + [0.0] * 2]
    twice = weights_of(Trapo({"prefix_weight": 2.5}), found)
    assert twice[6][1].tolist() == [2.5] * 61 + [0.0] * 2
    assert twice[6][2].tolist() == [0.001] * 63  # the entropy bonus is on all tokens


def test_equal_prefixes_of_two_micro_groups_are_both_trained() -> None:
    found = composed(FIRST, breaks=(52,))  # behind half, and before 0.55 of the demonstration
    assert [t.prefix for t in found[4:7]] == [53, 53, 53]
    assert trained_prefixes(found)[4:] == [False, True, True, True]


@pytest.mark.parametrize(
    ("fraction", "breaks", "tokens"),
    [(0.25, (10, 40, 60, 90), 41), (0.5, (10, 40, 60, 90), 61), (0.25, (10,), 25), (0.2, (10, 40, 60, 90), 41),
     (0.25, (25,), 25), (0.25, (26,), 27), (0.25, (55,), 56), (0.25, (56,), 25), (0.25, (), 25)],
)  # fmt: skip
def test_a_prefix_ends_at_the_next_blank_line_within_reach(fraction: float, breaks: Any, tokens: int) -> None:
    texts = ["a \n\n b" if i in breaks else "\n" for i in range(101)]
    assert cut(texts, fraction, 0.3) == tokens


@given(tokens=st.integers(0, 40), fraction=st.floats(0, 1), breaks=st.sets(st.integers(0, 40)))
def test_a_prefix_leaves_the_last_token_to_the_policy(tokens: int, fraction: float, breaks: set[int]) -> None:
    found = cut(["\n\n" if i in breaks else "" for i in range(tokens)], fraction, 0.3)
    assert min(int(fraction * tokens), max(tokens - 1, 0)) <= found <= max(tokens - 1, 0)
    ends = {int(fraction * tokens), *(i + 1 for i in breaks)}
    assert found in {max(min(end, tokens - 1), 0) for end in ends}


def test_guided_and_plain_prompts_share_a_round_and_every_response_has_a_number_of_its_own() -> None:
    sampler = Rewarded(FIRST, [1.0] * 8, SECOND, FIRST, bare=(3,))
    found = Trapo({"preset": "paper"}).compose(sampler, 4, 8)
    assert [t.prompt.index for t in found] == [i for i in range(4) for _ in range(8)]
    assert [levels(found[i : i + 8]) for i in (0, 8, 16, 24)] == [
        [0, 0, 0, 0, 1, 1, 2, 3], [0] * 8, [0] * 6 + [2, 3], [0] * 8,
    ]  # fmt: skip
    assert [t.response_ids[-2] - 200 for t in found[8:16]] == list(range(8))
    assert sampler.asked == [
        ("rollouts", [0, 1, 2, 3], 4, 0),
        ("rollouts", [1, 2, 3], 2, 4),
        ("continuations", [0], 2, 4),
        ("rollouts", [1, 3], 1, 6),
        ("continuations", [0, 2], 1, 6),
        ("rollouts", [1, 3], 1, 7),
        ("demonstrations", [0, 2], 1, 0),
    ]


def test_a_reward_that_nobody_knows_is_no_zero() -> None:
    # 1 of 2 known is not below a half; 1 of 3 known would be, and nothing known guides nothing
    assert levels(composed((1.0, 0.0, None, None, *FIRST[4:])))[4:6] == [0, 0]
    assert levels(composed((1.0, 0.0, 0.0, None, *FIRST[4:])))[4:6] == [1, 1]
    assert levels(composed((None,) * 8)) == [0] * 8


def test_unknown_responses_leave_and_the_prefix_is_still_trained_once() -> None:
    method = Trapo()
    kept = leave_out(method, composed((0.0, 1.0, 0.0, 0.0, 0.0, None, 1.0, 1.0)))
    assert [t.score for t in kept] == [0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert trained_prefixes(kept) == [False] * 4 + [True] * 3
    own = weights_of(method, kept)[0][0, 0].item()
    assert own == pytest.approx(-3 / 7)


def test_a_demonstration_of_unknown_reward_is_trained_and_is_not_in_the_mean() -> None:
    method = Trapo()
    kept = leave_out(method, composed((*FIRST[:7], None)))
    assert len(kept) == 8
    weights = weights_of(method, kept)
    assert weights[7][1].tolist() == [1.0] * 101
    assert weights[0][0, 0].item() == pytest.approx(-2 / 7)
    assert not method.compared(kept[7])
    known = leave_out(method, composed(FIRST))
    assert method.compared(known[7]) and not method.rewarded(known[7])


@pytest.mark.parametrize(
    ("preset", "normaliser"),
    [("clean", Normaliser("tokens")), ("paper", Normaliser("tokens")), ("code", Normaliser("one", 65536.0))],
)
def test_presets_set_the_normaliser_of_both_terms(preset: str, normaliser: Normaliser) -> None:
    policy, prefix, entropy = Trapo({"preset": preset}).terms
    assert policy.normaliser == prefix.normaliser == normaliser
    assert entropy.normaliser == Normaliser("tokens")
    own = Trapo({"preset": preset, "normaliser": "clean", "fractions": [0.1, 0.2, 0.3]})
    assert own.terms[0].normaliser == Normaliser("tokens") and own.options.fractions == (0.1, 0.2, 0.3)
    assert own.options.thresholds == Trapo({"preset": preset}).options.thresholds


def test_only_the_preset_paper_is_a_reconstruction() -> None:
    labels = {preset: Trapo.exactness_with({"preset": preset}) for preset in ("clean", "code", "paper")}
    assert labels == {"clean": "exact", "code": "exact", "paper": "reconstruction"}
    assert Trapo.exactness_with({}) == "exact"


def test_reports_of_runs_and_comparisons_say_which_preset_is_a_reconstruction() -> None:
    settings = {"method": "trapo", "options": {"preset": "paper"}}
    paper = {f"rl.{name}": value for name, value in settings.items()} | {"rl.rollouts": 8}
    assert method_labels(load_recipe("quickstart", paper))["rl"] == "trapo (reconstruction)"
    code = paper | {"rl.options": {"preset": "code"}}
    assert method_labels(load_recipe("quickstart", code))["rl"] == "trapo"
    tables = tomllib.loads(shipped_comparisons()["quick"].read_text())
    tables["arms"] |= {
        "trapo": {"kind": "rl", "settings": {"method": "trapo"}},
        "sft-then-trapo": {"after": "sft", "kind": "rl", "settings": settings},
    }
    recipe = load_comparison(tables)
    assert [arm_of(recipe, name).reconstruction for name in ("trapo", "sft-then-trapo")] == [False, True]
    tables["arms"]["trapo"]["settings"]["rollouts"] = 4
    with pytest.raises(RecipeError, match=r"4 \+ 2 \+ 1 \+ 1 = 8"):
        check_methods(load_comparison(tables))


def stage(**settings: Any) -> Rl:
    return Rl(method="trapo", **settings)


@pytest.mark.parametrize(
    ("settings", "field", "said"),
    [
        ({"rollouts": 4}, "rl.rollouts", "4 + 2 + 1 + 1 = 8"),
        ({"rollouts": 8, "options": {"groups": [4, 2, 1]}}, "rl.options", "thresholds has 3 values"),
        ({"options": {"groups": []}}, "rl.options", "groups is empty"),
        ({"options": {"groups": [0, 8]}}, "rl.options.groups", "at least 1"),
        ({"options": {"groups": [4, 2, 2], "fractions": [0.2, 1.0], "thresholds": [0.5, 0.9]}}, "rl.options",
         "one demonstration 2 times"),
        ({"options": {"fractions": [0.25, 0.5, 1.5]}}, "rl.options.fractions", "at most 1"),
        ({"options": {"fractions": [0.0, 0.5, 1.0]}}, "rl.options.fractions", "above 0"),
        ({"options": {"thresholds": [0.5, 0.7, 7.0]}}, "rl.options.thresholds", "at most 1"),
        ({"options": {"alpha": 0.0}}, "rl.options.alpha", "above 0"),
        ({"options": {"preset": "papers"}}, "rl.options.preset", "paper"),
        ({"options": {"preset": 3}}, "rl.options.preset", "paper"),
        ({"options": {"fraction": 0.2}}, "rl.options.fraction", "fraction"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_with_field_and_remedy(settings: Any, field: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        registry.stage_method(stage(**settings), "rl")
    error = caught.value
    assert (error.field or "").startswith(field), error.field
    assert said in f"{error.problem} {error.remedy}"
    assert error.remedy


def test_other_numbers_of_rollouts_take_micro_groups_of_ones_own() -> None:
    settings = {"groups": [2, 1, 1], "thresholds": [0.5, 0.9], "fractions": [0.25, 1.0]}
    method = registry.stage_method(stage(rollouts=4, options=settings), "rl")
    found = method.compose(Rewarded((0.0, 0.0, 0.0, 1.0), (1.0, 0.0, 0.0, 1.0)), 2, 4)
    assert [levels(found[:4]), levels(found[4:])] == [[0, 0, 1, 2], [0, 0, 0, 2]]
    alone = Trapo({"groups": [8], "thresholds": [], "fractions": []})
    assert levels(alone.compose(Rewarded(FIRST), 1, 8)) == [0] * 8
