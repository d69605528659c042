"""Tests of intervals over seeds that are scored on the same prompts, against bootstraps and simulations."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from lpc_lightning.evaluation.statistics.clusters import deviations, shared_variance
from lpc_lightning.evaluation.statistics.seeds import NOTHING_SHARED, Shared, estimate, paired_difference

SEEDS, PROMPTS = 5, 60


def draw_scores(
    draw: np.random.Generator,
    seed_deviation: float,
    prompt_deviation: float,
    noise: float,
    pairs: int = 1,
    shared: bool = True,
) -> NDArray[np.float64]:
    """Draw (seeds, prompts, pairs) scores with mean 0: effects of seeds and of prompts, and noise."""
    seeds = seed_deviation * draw.normal(size=(SEEDS, 1, 1))
    prompts = prompt_deviation * draw.normal(size=(1 if shared else SEEDS, PROMPTS, 1))
    return seeds + prompts + noise * draw.normal(size=(SEEDS, PROMPTS, pairs))


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
    """c is (0.1, -0.1) in both seeds: (0.2^2 - 2 * 0.1^2) * 2 prompts / (2 seeds * 1), times 2 / 1."""
    seed = {"a": 0.1, "b": -0.1}
    assert shared_variance([seed, seed]) == Shared(pytest.approx(0.04), 2)  # type: ignore[arg-type]
    assert shared_variance([seed, {"a": -0.1, "b": 0.1}]) == Shared(0.0, 2)
    assert shared_variance([seed, {"c": 0.1, "d": -0.1}]) == NOTHING_SHARED
    assert shared_variance([seed]) == NOTHING_SHARED


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
    actual = np.var(values, ddof=1) / SEEDS + shared_variance(by_prompt(scores)).variance
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
    ("design", "shared"), [("seeds", True), ("prompts", True), ("both", True), ("noise", True), ("both", False)]
)
def test_false_positive_rate(design: str, shared: bool) -> None:
    """At 0.05, a true null is rejected in 3 to 7 % of sets, and as many intervals miss the truth."""
    draw, repeats = np.random.default_rng(len(design)), 600
    names = [[f"{number} {0 if shared else seed}" for number in range(PROMPTS)] for seed in range(SEEDS)]
    rejected, missed, sets = 0, 0, []
    for _ in range(repeats):
        table = draw_scores(draw, *DESIGNS[design], shared=shared)[..., 0]
        values = table.mean(1)
        added = (table - values[:, None]) / PROMPTS  # as `deviations` of one pair for each prompt
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
