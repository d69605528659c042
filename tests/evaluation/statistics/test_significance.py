"""Tests of differences, against enumeration of everything that can happen and against closed forms."""

from __future__ import annotations

from itertools import combinations, product
from math import comb, sqrt

import numpy as np
import pytest

from lpc_lightning.evaluation.statistics import significance
from lpc_lightning.evaluation.statistics.significance import RESAMPLES, holm, paired_test


def answers(both: int, gained: int, lost: int, neither: int) -> tuple[list[float], list[float]]:
    """0/1 scores of a baseline and of a model: so many items right for both, won by the model, lost by it ..."""
    baseline = [1.0] * both + [0.0] * gained + [1.0] * lost + [0.0] * neither
    other = [1.0] * both + [1.0] * gained + [0.0] * lost + [0.0] * neither
    return baseline, other


# McNemar


@pytest.mark.parametrize(("gained", "lost"), [(0, 1), (1, 1), (3, 0), (5, 1), (2, 9), (8, 4)])
def test_mcnemar_is_the_share_of_swaps_that_go_as_far(gained: int, lost: int) -> None:
    """Where the models do not differ, each item that parts them may as well be swapped: count all the swaps."""
    swaps = [abs(sum(signs)) for signs in product((1, -1), repeat=gained + lost)]
    expected = sum(swap >= abs(gained - lost) for swap in swaps) / len(swaps)
    found = paired_test(*answers(both=4, gained=gained, lost=lost, neither=2))
    assert found.p_value == pytest.approx(expected, rel=1e-12)
    assert found.method == "McNemar"
    assert found.items == 6 + gained + lost
    assert found.difference == pytest.approx((gained - lost) / (6 + gained + lost), rel=1e-12)


def test_two_equal_models_do_not_differ() -> None:
    found = paired_test(*answers(3, 0, 0, 5))
    assert (found.difference, found.p_value) == (0, 1)
    assert found.low < 0 < found.high


def test_the_interval_of_two_shares_by_hand() -> None:
    """20 items, 7 gained, 2 lost: shares 8/22 and 3/22, difference 5/22, variance (11/22 - 25/484) / 22."""
    found = paired_test(*answers(6, 7, 2, 5))
    half = 1.959963984540054 * sqrt((0.5 - 25 / 484) / 22)
    assert found.low == pytest.approx(5 / 22 - half, rel=1e-12)
    assert found.high == pytest.approx(5 / 22 + half, rel=1e-12)


def test_the_interval_stays_within_what_a_difference_can_be() -> None:
    found = paired_test([0.0, 0.0], [1.0, 1.0])
    assert found.high == 1


@pytest.mark.parametrize(("up", "down"), [(0.1, 0.1), (0.3, 0.05), (0.02, 0.02), (0.4, 0.3)])
def test_interval_and_p_value_keep_their_promise_exactly(up: float, down: float) -> None:
    """Every outcome of 30 items with its probability: how often the interval holds the truth, how often p < 0.05."""
    items, covered, rejected = 30, 0.0, 0.0
    for gained in range(items + 1):
        for lost in range(items + 1 - gained):
            ways = comb(items, gained) * comb(items - gained, lost)
            chance = ways * up**gained * down**lost * (1 - up - down) ** (items - gained - lost)
            found = paired_test(*answers(items - gained - lost, gained, lost, 0))
            covered += chance * (found.low <= up - down <= found.high)
            rejected += chance * (found.p_value < 0.05)
    assert covered > 0.94
    if up == down:
        assert rejected <= 0.05


# The bootstrap

DIFFERENCES = np.array([0.31, -0.12, 0.4, 0.05, -0.03, 0.22])


@pytest.fixture(scope="module")
def every_resample() -> np.ndarray:
    """The mean of each of the 6^6 ways to draw six items again."""
    return np.array([np.mean(drawn) for drawn in product(DIFFERENCES, repeat=len(DIFFERENCES))])


def test_the_bootstrap_is_what_all_resamples_say(every_resample: np.ndarray) -> None:
    baseline = np.array([0.2, 0.5, 0.1, 0.9, 0.4, 0.3])
    found = paired_test(baseline, baseline + DIFFERENCES)
    share = (every_resample <= 0).mean()
    assert found.method == "bootstrap"
    assert found.difference == pytest.approx(DIFFERENCES.mean(), rel=1e-9)
    assert found.p_value == pytest.approx(2 * share, abs=8 * sqrt(share * (1 - share) / RESAMPLES))
    for end, level in ((found.low, 0.025), (found.high, 0.975)):
        below, above = np.quantile(every_resample, (level - 0.006, level + 0.006))
        assert below <= end <= above


def test_the_other_way_round_it_is_the_same_but_for_the_sign() -> None:
    one = paired_test(np.zeros(6), DIFFERENCES)
    other = paired_test(DIFFERENCES, np.zeros(6))
    assert other.difference == -one.difference
    assert other.p_value == pytest.approx(one.p_value, abs=0.02)
    assert other.low == pytest.approx(-one.high, abs=0.02)


def test_a_seed_decides_the_draws() -> None:
    found = [paired_test(np.zeros(6), DIFFERENCES, seed) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("items", [2, 3, 5, 8])
def test_few_items_are_never_sure(items: int) -> None:
    """All items 0.5 better. All resamples are, too; but by chance all go one way in 2 of 2^n cases."""
    found = paired_test([0.1] * items + [0.2] * 4, [0.6] * items + [0.2] * 4)
    assert found.p_value >= 2 / 2**items


def test_models_that_never_part_do_not_differ() -> None:
    found = paired_test([0.1, 0.7], [0.1, 0.7])
    assert (found.method, found.difference, found.low, found.high, found.p_value) == ("bootstrap", 0, 0, 0, 1)


def test_the_bootstrap_keeps_its_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 times two models that differ by 0.1 on average, and two that do not, on 60 items of skewed scores."""
    monkeypatch.setattr(significance, "RESAMPLES", 1000)
    random = np.random.default_rng(5)
    covered = rejected = 0
    for seed in range(400):
        noise = random.exponential(size=60) - 1
        moved = paired_test(np.zeros(60), 0.1 + noise, seed)
        still = paired_test(np.zeros(60), noise, seed)
        covered += moved.low <= 0.1 <= moved.high
        rejected += still.p_value < 0.05
    assert 0.90 < covered / 400 < 0.975
    assert 0.02 < rejected / 400 < 0.10


@pytest.mark.parametrize(
    ("baseline", "other", "told"),
    [
        ([1.0], [1.0], "found 1 and 1 items, expected the same number of each, at least 2"),
        ([1.0, 0.0], [1.0, 0.0, 1.0], "found 2 and 3 items"),
        ([0.5, float("nan")], [0.5, 0.1], "not a finite number"),
    ],
)
def test_what_cannot_be_tested_is_refused(baseline: list[float], other: list[float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        paired_test(baseline, other)


# Holm


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_holm_is_the_closure_of_bonferroni(count: int) -> None:
    """A hypothesis falls when every set of hypotheses that holds it falls by Bonferroni: try all the sets."""
    random = np.random.default_rng(count)
    for _ in range(20):
        p_values = (random.random(count) ** 3).round(2).tolist()
        sets = [chosen for size in range(1, count + 1) for chosen in combinations(range(count), size)]
        expected = [
            max(min(1.0, len(chosen) * min(p_values[each] for each in chosen)) for chosen in sets if place in chosen)
            for place in range(count)
        ]
        assert holm(p_values) == pytest.approx(expected, rel=1e-12)


def test_holm_of_nothing_is_nothing() -> None:
    assert holm([]) == []
