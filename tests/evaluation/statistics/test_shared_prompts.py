"""Tests of intervals over seeds that are scored on the same prompts, against bootstraps and simulations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from lpc_lightning.clustered_means import deviations, shares
from lpc_lightning.evaluation.statistics.seeds import MIN_PROMPTS, NOTHING_SHARED, Shared, estimate, paired_difference
from lpc_lightning.evaluation.statistics.shared_clusters import shared_variance, with_annotators

SEEDS, PROMPTS = 5, 60


def draw_scores(
    draw: np.random.Generator,
    seed_deviation: float,
    prompt_deviation: float,
    noise: float,
    pairs: int = 1,
    shared: bool = True,
    number: int = PROMPTS,
) -> NDArray[np.float64]:
    """Draw (seeds, number of prompts, pairs) scores with mean 0: effects of seeds and of prompts, and noise."""
    seeds = seed_deviation * draw.normal(size=(SEEDS, 1, 1))
    prompts = prompt_deviation * draw.normal(size=(1 if shared else SEEDS, number, 1))
    return seeds + prompts + noise * draw.normal(size=(SEEDS, number, pairs))


def by_prompt(scores: NDArray[np.float64], shared: bool = True) -> list[Mapping[str, float]]:
    """Return the deviations of each seed. Without shared prompts, each seed has prompts of its own."""
    names = np.repeat([f"prompt {number}" for number in range(PROMPTS)], scores.shape[-1])
    owners = [names if shared else np.char.add(names, f" of {seed}") for seed in range(len(scores))]
    return [deviations(values.ravel(), owner) for values, owner in zip(scores, owners, strict=True)]


def means(scores: NDArray[np.float64]) -> list[float]:
    return scores.mean((1, 2)).tolist()


def test_deviations_by_hand() -> None:
    """The mean of 1, 0, 1, 1 is 3/4. Prompt a has 1 and 0, prompt b has 1 and 1."""
    assert deviations([1, 0, 1, 1], ["a", "a", "b", "b"]) == {"a": -0.125, "b": 0.125}


def test_shared_variance_by_hand() -> None:
    """c is 0.1 or -0.1 for four prompts of both seeds: 4 (0.2^2 - 2 * 0.1^2) / (2 seeds * 1), times 4 / 3."""
    seed = {"a": 0.1, "b": -0.1, "c": 0.1, "d": -0.1}
    assert shared_variance([seed, seed]) == Shared(pytest.approx(0.16 / 3), 4, freedom=3)  # type: ignore[arg-type]
    assert shared_variance([seed, {name: -value for name, value in seed.items()}]) == Shared(0.0, 4, freedom=3)
    assert shared_variance([seed, {f"other {name}": value for name, value in seed.items()}]) == NOTHING_SHARED
    assert shared_variance([seed]) == NOTHING_SHARED


def test_shared_variance_of_few_prompts() -> None:
    """It is unknown if a seed has fewer than four prompts and shares one. Prompts of its own are independent."""
    many = dict.fromkeys("abcdef", 0.0)
    assert shared_variance([{"a": 0.0}, {"a": 0.0}]) == Shared(None, 1)
    assert shared_variance([{"a": 0.0}, {"b": 0.0}, many]) == Shared(None, 1)
    assert shared_variance([{"x": 0.0}, {"y": 0.0}, {"z": 0.1, "w": -0.1}]) == NOTHING_SHARED
    assert shared_variance([{"x": 0.0}, many, many]) == Shared(0.0, 6, freedom=5)
    assert shared_variance([many, {"a": 0.1, "v": 0.1, "w": -0.1, "x": -0.1}]) == NOTHING_SHARED


def test_shared_variance_of_one_large_prompt() -> None:
    """It is unknown if one prompt has most pairs. 60, 10, 10 and 10 are effectively 90^2 / 3900 = 2.08 prompts."""
    seed = {"a": 0.1, "b": -0.1, "c": 0.1, "d": -0.1}
    for sizes, known in (((60, 10, 10, 10), True), ((100, 5, 5, 5), False), ((100, 1, 1, 1), False)):
        shared = shared_variance([seed, seed], dict(zip(seed, sizes, strict=True)))
        assert ((shared.variance is not None), shared.prompts) == (known, 4)
    names = [f"prompt {number}" for number in range(10)]
    seed = dict.fromkeys(names, 0.1)
    assert shared_variance([seed, seed], dict(zip(names, (300, *[1] * 9), strict=True))) == Shared(None, 10)


def test_shared_variance_equals_variance_components() -> None:
    """In a crossed design it is (the mean square of the prompts minus that of the residuals) / (seeds * prompts)."""
    scores = draw_scores(np.random.default_rng(0), 0.3, 1.0, 0.5)
    table = scores[..., 0]
    residuals = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    prompts = SEEDS * np.square(table.mean(0) - table.mean()).sum() / (PROMPTS - 1)
    noise = np.square(residuals).sum() / (SEEDS - 1) / (PROMPTS - 1)
    assert shared_variance(by_prompt(scores)).variance == pytest.approx((prompts - noise) / SEEDS / PROMPTS, rel=1e-9)


def test_variance_against_two_level_bootstrap() -> None:
    """Resample seeds and, for all of them, whole prompts. With one draw less than there are, it is unbiased."""
    draw = np.random.default_rng(1)
    scores = draw_scores(draw, 0.2, 1.5, 0.2, pairs=3)
    table = scores.mean(2)
    rows, columns = (draw.integers(0, size, (20_000, size - 1)) for size in table.shape)
    counts = [
        np.stack([np.bincount(line, minlength=size) for line in lines]) / lines.shape[1]
        for lines, size in ((rows, SEEDS), (columns, PROMPTS))
    ]
    expected = np.einsum("ds,sp,dp->d", counts[0], table, counts[1]).var()
    values = means(scores)
    shared = shared_variance(by_prompt(scores)).variance
    assert shared is not None
    actual = np.var(values, ddof=1) / SEEDS + shared
    assert actual == pytest.approx(expected, rel=0.1)


def test_interval_without_shared_prompts_is_students() -> None:
    scores = draw_scores(np.random.default_rng(2), 0.3, 1.0, 0.5)
    shared = shared_variance(by_prompt(scores, shared=False))
    values = means(scores)
    actual = estimate(values, shared)
    expected = stats.t.interval(0.95, SEEDS - 1, loc=np.mean(values), scale=stats.sem(values))
    assert (actual.low, actual.high) == pytest.approx(expected, rel=1e-12)
    assert actual.prompts == 0


DESIGNS = {
    "seeds": (1.0, 0.0, 0.5),
    "prompts": (0.01, 2.0, 0.1),
    "both": (0.2, 1.5, 0.5),
    "noise": (0.0, 0.0, 1.0),
}


@pytest.mark.parametrize(
    ("design", "shared", "count"),
    [
        ("seeds", True, PROMPTS),
        ("prompts", True, PROMPTS),
        ("both", True, PROMPTS),
        ("noise", True, PROMPTS),
        ("both", False, PROMPTS),
        ("both", True, MIN_PROMPTS),
    ],
)
def test_false_positive_rate(design: str, shared: bool, count: int) -> None:
    """At 0.05, a true null is rejected in 3 to 7 % of sets, and as many intervals miss the truth."""
    draw, repeats = np.random.default_rng(len(design)), 600
    names = [[f"{number} {0 if shared else seed}" for number in range(count)] for seed in range(SEEDS)]
    rejected, missed, sets = 0, 0, []
    for _ in range(repeats):
        table = draw_scores(draw, *DESIGNS[design], shared=shared, number=count)[..., 0]
        values = table.mean(1)
        added = (table - values[:, None]) / count  # as `deviations` of one pair for each prompt
        seeds = [dict(zip(owners, row, strict=True)) for owners, row in zip(names, added.tolist(), strict=True)]
        test = paired_difference([0.0] * SEEDS, values.tolist(), shared_variance(seeds))
        assert test.p_value is not None
        assert test.estimate.low is not None
        assert test.estimate.high is not None
        rejected += test.p_value < 0.05
        missed += not test.estimate.low <= 0 <= test.estimate.high
        sets.append(values)
    assert rejected == missed
    assert 0.03 <= rejected / repeats <= 0.07
    if shared and design in ("prompts", "both"):
        assert np.mean(stats.ttest_1samp(sets, 0, axis=1).pvalue < 0.05) > 0.2


def rejections_of_unequal_prompts(sizes: Sequence[int], repeats: int) -> float:
    """Return the share of sets in which a true null is rejected at 0.05."""
    draw, rejected = np.random.default_rng(len(sizes)), 0
    names = np.repeat(np.arange(len(sizes)), sizes)
    for _ in range(repeats):
        prompts = draw.normal(size=len(sizes))[names]
        scores = prompts + 0.1 * draw.normal(size=(SEEDS, 1)) + draw.normal(size=(SEEDS, len(names)))
        shared = shared_variance([deviations(values, names) for values in scores], shares(names))
        p_value = paired_difference([0.0] * SEEDS, scores.mean(1).tolist(), shared).p_value
        assert p_value is not None
        rejected += p_value < 0.05
    return rejected / repeats


@pytest.mark.parametrize("sizes", [(1, 2, 3, 4, 5, 6, 8, 11, 16, 31), (40, *[4] * 9)])
def test_false_positive_rate_of_unequal_prompts(sizes: Sequence[int]) -> None:
    """At 0.05, a true null is rejected in 3 to 7 % of sets, although few prompts have half of the pairs."""
    assert 0.03 <= rejections_of_unequal_prompts(sizes, 600) <= 0.07


def test_one_large_prompt_needs_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `MIN_EFFECTIVE`, 12 to 18 % are rejected if one of four prompts has nearly all pairs."""
    monkeypatch.setattr("lpc_lightning.evaluation.statistics.shared_clusters.MIN_EFFECTIVE", 0.0)
    assert 0.12 <= rejections_of_unequal_prompts((100, 1, 1, 1), 1000) <= 0.18


def crossed(variance: float | None, number: int, freedom: float) -> Shared:
    return Shared(variance, number, freedom=freedom)


@pytest.mark.parametrize(
    ("variances", "expected", "freedom"),
    [
        ((5.0, 3.0, 1.0), 7.0, 19),  # what both contain is counted once
        ((5.0, 0.5, 1.0), 5.0, 19),  # another dependency never lowers the variance
        ((0.5, 5.0, 1.0), 5.0, 19),
        ((5.0, 0.0, 0.0), 5.0, 59),  # annotators without variance limit no degrees of freedom
        ((0.0, 3.0, 0.0), 3.0, 19),
        ((0.0, 0.0, 0.0), 0.0, 0),
    ],
)
def test_variance_with_annotators(variances: Sequence[float], expected: float, freedom: float) -> None:
    of_prompts, of_annotators, of_both = variances
    actual = with_annotators(crossed(of_prompts, 60, 59), crossed(of_annotators, 20, 19), crossed(of_both, 1200, 1199))
    assert actual == Shared(expected, 60, freedom=freedom, annotators=20)


def test_variance_without_known_annotators() -> None:
    """With three annotators it is that over prompts. With three prompts it is unknown."""
    prompts, unknown, both = crossed(5.0, 60, 59), Shared(None, 3), crossed(1.0, 180, 179)
    assert with_annotators(prompts, unknown, both) == prompts
    assert with_annotators(unknown, crossed(5.0, 60, 59), both) == unknown


@pytest.mark.parametrize(("prompts", "annotators", "pairs"), [(30, 20, 200), (12, 8, 60), (100, 6, 300)])
@pytest.mark.parametrize(("of_prompts", "of_annotators"), [(1.0, 1.0), (0.3, 2.0), (0.0, 0.0)])
def test_false_positive_rate_with_annotators(
    prompts: int, annotators: int, pairs: int, of_prompts: float, of_annotators: float
) -> None:
    """At 0.05, a true null is rejected in 2 to 7 % of sets, and in fewer where nothing but single pairs matters.

    Where annotators matter, the test over prompts alone rejects more than 10 %.
    """
    draw, rejected, alone = np.random.default_rng(11), 0, 0
    for _ in range(400):
        chosen = draw.permutation(prompts * annotators)[:pairs]
        owners = chosen // annotators, chosen % annotators, chosen
        effects = of_prompts * draw.normal(size=prompts), of_annotators * draw.normal(size=annotators)
        fixed = effects[0][owners[0]] + effects[1][owners[1]] + draw.normal(size=pairs)
        scores = fixed + 0.5 * draw.normal(size=(SEEDS, pairs))
        parts = [shared_variance([deviations(each, names) for each in scores], shares(names)) for names in owners]
        for shared in (with_annotators(*parts), parts[0]):
            p_value = paired_difference([0.0] * SEEDS, scores.mean(1).tolist(), shared).p_value
            assert p_value is not None
            if shared is parts[0]:
                alone += p_value < 0.05
            else:
                rejected += p_value < 0.05
    assert (0.02 if of_annotators else 0) <= rejected / 400 <= 0.07
    if of_annotators:
        assert alone / 400 > 0.1


def test_equal_differences_vary_with_prompts() -> None:
    """Six seeds of an arm without randomness are one result: the test is that over its prompts."""
    scores = np.random.default_rng(3).normal(0.1, 1.0, PROMPTS)
    names = [f"prompt {number}" for number in range(PROMPTS)]
    shared = shared_variance([deviations(scores, names)] * 6)
    actual = paired_difference([0.5] * 6, [0.5 + scores.mean()] * 6, shared)
    expected = stats.ttest_1samp(scores, 0)
    assert actual.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert (actual.estimate.low, actual.estimate.high) == pytest.approx(expected.confidence_interval(0.95), rel=1e-9)
    assert actual.p_signs == pytest.approx(2 / 2**6)


@pytest.mark.parametrize("count", range(1, MIN_PROMPTS))
def test_few_prompts_have_no_test(count: int) -> None:
    """A t-test over seeds alone rejects a true null in over 20 % of sets of several pairs of few prompts."""
    draw, sets = np.random.default_rng(count), []
    for _ in range(200):
        scores = draw_scores(draw, *DESIGNS["both"], pairs=4, number=count)
        names = np.repeat([f"prompt {number}" for number in range(count)], 4)
        seeds = [deviations(values.ravel(), names) for values in scores]
        test = paired_difference([0.0] * SEEDS, means(scores), shared_variance(seeds))
        assert (test.p_value, test.p_signs) == (None, None)
        assert (test.estimate.low, test.estimate.high, test.estimate.prompts) == (None, None, count)
        sets.append(means(scores))
    assert np.mean(stats.ttest_1samp(sets, 0, axis=1).pvalue < 0.05) > 0.2
