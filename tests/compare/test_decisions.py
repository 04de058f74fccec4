"""Verdicts of contrasts: what is decided, what is not yet, and how often a verdict is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.compare.blocks import SKILL, contrast, make_blocks
from thence.compare.contrasts import Contrast
from thence.compare.decisions import (
    ERROR,
    DecidedContrast,
    decisions_of,
    halved,
    judgement_of,
    questions_of,
    reliability_of,
)
from thence.compare.result import Comparison, results_json
from thence.stats.multiplicity import holm, holm_of_questions
from thence.stats.typical import one_sided, sign_flips, typical_mean, typical_slope

ARMS = {
    "sft": lambda s: 0.45 + 0.5 * s,
    "bug": lambda s: 0.35 + 0.5 * s,
    "same": lambda s: 0.45 + 0.5 * s,
    "rl": lambda s: min(0.95, 0.2 + 1.2 * s),
}
CONTRASTS = (
    contrast("correct", "sft", "bug", equal_within=0.02, says="Correct SFT beats SFT with the bug"),
    contrast("wrong", "bug", "sft", equal_within=0.02),
    contrast("alike", "sft", "same", "equal", equal_within=0.03),
    contrast("turns", "rl", "sft", kind="slope"),
    contrast("strong", "rl", "sft", blocks="upper half", primary=False),
    contrast("best", "sft", ["bug", "rl"], choose_on="dev", primary=False),
)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return make_blocks(ARMS, contrasts=CONTRASTS)


def by_name(comparison: Comparison) -> dict[str, DecidedContrast]:
    return {decision.contrast.name: decision for decision in decisions_of(comparison).contrasts}


def test_known_effects_get_their_verdicts(comparison: Comparison) -> None:
    found = by_name(comparison)
    outcomes = {name: decision.outcome for name, decision in found.items()}
    assert outcomes == {
        "correct": "held",
        "wrong": "refuted",
        "alike": "held",
        "turns": "held",
        "strong": "held",
        "best": "undecided",
    }
    assert found["correct"].estimate == pytest.approx(0.1, abs=0.03)
    assert found["turns"].estimate == pytest.approx(0.7, abs=0.15)
    assert found["strong"].planned == 12 and found["correct"].planned == 24
    assert all(d.corrected is not None and d.p is not None and d.corrected >= d.p for d in found.values())


def test_numbers_are_those_of_the_tests_on_the_blocks_differences(comparison: Comparison) -> None:
    found = by_name(comparison)
    runs = {(run.arm, run.base): run for run in comparison.runs}

    def accuracy(arm: str, base: str, column: int) -> float:
        return runs[arm, base].measured[column].accuracy

    d = [accuracy("sft", base, 0) - accuracy("bug", base, 0) for base in comparison.bases]
    assert list(found["correct"].differences.values()) == pytest.approx(d)
    assert found["correct"].p == typical_mean(d).equal_to(0)
    assert found["correct"].p_equal == typical_mean(d).within(0.02)
    d = [accuracy("rl", base, 0) - accuracy("sft", base, 0) for base in comparison.bases]
    z = [accuracy("base", base, 2) for base in comparison.bases]
    assert found["turns"].p == typical_slope(d, z).equal_to(0)
    upper = [value for value, skill in zip(d, z, strict=True) if skill >= float(np.median(z))]
    assert list(found["strong"].differences.values()) == pytest.approx(upper)
    primary = [found[name] for name in ("correct", "wrong", "alike", "turns")]
    asked = [[d.p] if d.p_equal is None else [d.p, d.p_equal] for d in primary]
    assert [d.corrected for d in primary] == [own[0] for own in holm_of_questions(asked)]  # type: ignore[arg-type]


def test_the_other_arm_is_chosen_block_by_block_on_its_own_test_set(comparison: Comparison) -> None:
    chosen = by_name(comparison)["best"].chosen
    runs = {(run.arm, run.base): run for run in comparison.runs}
    for (base, _), arm in chosen.items():
        dev = {name: runs[name, base].measured[1].accuracy for name in ("bug", "rl")}
        assert dev[arm] == max(dev.values())
    assert set(chosen.values()) == {"bug", "rl"}


def test_a_small_difference_is_equal_where_a_larger_one_was_expected() -> None:
    made = make_blocks(ARMS, contrasts=(contrast("larger", "sft", "same", equal_within=0.05),), spread=0.01, draw=3)
    decision = by_name(made)["larger"]
    assert decision.outcome == "equal"
    assert decision.low is not None and decision.high is not None and decision.low < 0 < decision.high


def test_a_covariate_that_is_taken_out_makes_the_interval_narrower() -> None:
    contrasts = (contrast("a", "rl", "sft"), contrast("b", "rl", "sft", adjust="linear"))
    made = make_blocks(ARMS, contrasts=contrasts, spread=0.01)
    plain, adjusted = by_name(made)["a"], by_name(made)["b"]
    assert plain.low is not None and plain.high is not None and adjusted.low is not None and adjusted.high is not None
    assert adjusted.high - adjusted.low < 0.5 * (plain.high - plain.low)
    assert adjusted.differences == plain.differences


def test_a_parabola_takes_out_what_a_line_leaves() -> None:
    arms = {"sft": lambda s: 0.5, "rl": lambda s: 0.2 + 6 * (s - 0.325) ** 2}
    contrasts = tuple(contrast(adjust, "rl", "sft", adjust=adjust) for adjust in ("linear", "quadratic"))
    found = by_name(make_blocks(arms, contrasts=contrasts, spread=0.01))
    line, parabola = found["linear"], found["quadratic"]
    assert line.low is not None and line.high is not None and parabola.low is not None and parabola.high is not None
    assert parabola.high - parabola.low < 0.4 * (line.high - line.low)
    assert parabola.estimate == pytest.approx(line.estimate)


def test_nothing_is_tested_before_all_blocks_are_finished(comparison: Comparison) -> None:
    missing = tuple(run for run in comparison.runs if (run.arm, run.base) != ("bug", "b23"))
    found = by_name(replace(comparison, runs=missing))
    assert (found["correct"].outcome, found["correct"].finished, found["correct"].planned) == ("not tested", 23, 24)
    assert found["correct"].p is found["correct"].estimate is None
    assert found["turns"].outcome == "held"  # its own blocks are all there
    # one that is still to come counts in the family, as one that says nothing
    assert found["turns"].corrected == pytest.approx(4 * (found["turns"].p or 1))


def test_halves_wait_for_the_covariate_of_all_blocks(comparison: Comparison) -> None:
    missing = tuple(run for run in comparison.runs if (run.arm, run.base) != ("base", "b0"))
    found = by_name(replace(comparison, runs=missing))
    assert (found["strong"].outcome, found["strong"].finished, found["strong"].planned) == ("not tested", 23, 24)
    assert found["turns"].outcome == "not tested" and found["correct"].outcome == "held"


def test_a_covariate_that_tells_no_blocks_apart_gives_no_slope(comparison: Comparison) -> None:
    def flat(run):
        return replace(run, measured=tuple(replace(m, right=(1,) * 300) for m in run.measured))

    runs = tuple(flat(run) if run.arm == "base" else run for run in comparison.runs)
    found = by_name(replace(comparison, runs=runs))
    assert found["turns"].outcome == "not tested" and found["turns"].finished == 24


def test_both_halves_hold_the_middle_block_of_an_odd_number() -> None:
    blocks = [(f"b{i}", 0) for i in range(5)]
    values = {block: place / 10 for place, block in enumerate(blocks)}
    assert halved(blocks, values, "upper half") == blocks[2:] and halved(blocks, values, "lower half") == blocks[:3]
    assert halved(blocks, values, "all") == blocks


def test_contrasts_survive_being_kept_and_read(tmp_path, comparison: Comparison) -> None:
    from thence.compare.result import read_results

    (tmp_path / "kept.json").write_text(results_json(comparison))
    again = read_results(tmp_path / "kept.json")
    assert decisions_of(again) == decisions_of(comparison)


def test_reliability_is_the_share_of_variance_that_more_problems_would_keep() -> None:
    rng = np.random.default_rng(0)
    skill = np.linspace(0.2, 0.4, 400)
    rows = [rng.binomial(2, s, 150) / 2 for s in skill]
    true = float(np.var(skill))
    assert reliability_of(rows) == pytest.approx(true / (true + float(np.mean(skill * (1 - skill))) / 300), abs=0.04)
    assert reliability_of([np.array([1.0, 0.0]), np.array([1.0, 0.0])]) is None
    assert reliability_of(rows[:1]) is None and reliability_of([rows[0], rows[1][:9]]) is None


@pytest.mark.parametrize(
    ("expect", "estimate", "corrected", "said"),
    [
        ("higher", 0.1, [0.01, 0.5], "held"),
        ("higher", -0.1, [0.01, 0.5], "refuted"),
        ("lower", -0.1, [0.01], "held"),
        ("lower", 0.1, [0.01], "refuted"),
        ("higher", 0.01, [0.2, 0.01], "equal"),
        ("higher", 0.01, [0.01, 0.01], "held"),
        ("higher", 0.1, [0.06, 0.06], "undecided"),
        ("equal", 0.01, [1.0, 0.01], "held"),
        ("equal", 0.1, [0.01, 1.0], "refuted"),
        ("equal", 0.1, [0.3, 0.3], "undecided"),
    ],
)
def test_verdicts_follow_from_the_corrected_p_values(expect: str, estimate: float, corrected, said: str) -> None:
    asked = Contrast(name="c", arm="a", other="b", expect=expect, equal_within=0.02)  # type: ignore[arg-type]
    assert judgement_of(asked, estimate, corrected) == said


def test_one_question_each_is_plain_holm_and_more_questions_only_cost_certainty() -> None:
    p_values = [0.03, 0.001, 0.2, 0.02]
    assert [own[0] for own in holm_of_questions([[p] for p in p_values])] == holm(p_values)
    assert [own[0] for own in holm_of_questions([[0.01]], 4)] == [0.04]
    assert holm_of_questions([[0.01, 0.9], [0.02]]) == [[0.02, 0.9], [0.04]]
    assert holm_of_questions([[0.01, 0.015], [0.02]]) == [[0.02, 0.03], [0.03]]


TRUTHS = {"zero": [0.0] * 4, "at the bound": [0.02, 0.02, -0.02, 0.02], "some of each": [0.0, 0.0, 0.02, -0.02]}


@pytest.mark.parametrize("truth", TRUTHS)
def test_in_a_family_any_verdict_is_wrong_in_at_most_five_of_a_hundred_studies(truth: str) -> None:
    """All verdicts, with their direction, and both questions of each contrast. Three errors of the simulation apart."""
    studies, wrong, wrong_apart = 1500, 0, 0
    rng = np.random.default_rng(11)
    expects = ["higher", "higher", "lower", "equal"]
    asked = [Contrast(name=e, arm="a", other="b", expect=e, equal_within=0.02) for e in expects]  # type: ignore[arg-type]
    effects = TRUTHS[truth]
    noise = rng.normal(0, 0.02, (12, studies, 4))
    p_values, estimates = [], []
    for place, (own, effect) in enumerate(zip(asked, effects, strict=True)):
        d = effect + noise[:, :, place]
        sides = {bound: one_sided(sign_flips(12), d, bound) for bound in (-0.02, 0.0, 0.02)}
        other = (0.02, -0.02) if own.expect == "equal" else (0.0, 0.0)
        first = np.minimum(1, 2 * np.minimum(sides[other[0]][0], sides[other[1]][1]))
        p_values.append(np.stack([first, np.maximum(sides[-0.02][0], sides[0.02][1])], axis=1))
        estimates.append(d.mean(axis=0))
        single = typical_mean(d[:, 0].tolist())
        assert p_values[-1][0].tolist() == questions_of(own, single)
    for study in range(studies):
        rows = [p_values[place][study].tolist() for place in range(4)]
        apart = list(zip(*(holm([row[question] for row in rows]) for question in (0, 1)), strict=True))
        together = holm_of_questions(rows)
        values = [float(estimates[place][study]) for place in range(4)]
        wrong += any(map(is_wrong, asked, values, together, effects))
        wrong_apart += any(map(is_wrong, asked, values, apart, effects))
    assert wrong / studies <= ERROR + 3 * np.sqrt(ERROR * (1 - ERROR) / studies)
    # Holm's correction of each question apart is wrong more often than it may be where some differences are zero and
    # others are as large as the bound
    assert wrong_apart > ERROR * studies if truth == "some of each" else wrong <= wrong_apart


def is_wrong(asked: Contrast, estimate: float, corrected, effect: float) -> bool:
    """Whether what is said of a difference contradicts its true value."""
    said = judgement_of(asked, estimate, corrected)
    equal = corrected[1] < ERROR
    if said == "undecided":
        return False
    if asked.expect == "equal":
        return abs(effect) >= 0.02 - 1e-9 if said == "held" else abs(effect) < 0.02 - 1e-9
    if equal and abs(effect) >= 0.02 - 1e-9:
        return True
    if said == "equal":
        return False
    higher = (said == "held") == (asked.expect == "higher")
    return effect <= 0 if higher else effect >= 0


def test_the_covariate_has_its_values_and_reliability(comparison: Comparison) -> None:
    found = decisions_of(comparison)
    assert found.covariate is not None and found.covariate.arm == "base"
    assert len(found.values) == 24 and found.reliability is not None and 0.9 < found.reliability < 1
    run = next(run for run in comparison.runs if (run.arm, run.base) == ("base", "b3"))
    measured = run.on(SKILL)
    assert measured is not None and found.values["b3", 0] == measured.accuracy
