"""How much one label says about another: mutual information of paired samples, plug-in estimates in nats.

The plug-in estimate is biased upwards: with n pairs, K values on one side and S on the other, two independent labels
show about (K - 1)(S - 1) / 2n nats (Miller, 1955), values counted that occur. `shuffled_information` measures that
for the very samples at hand: read the estimate against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def mutual_information(one: ArrayLike, other: ArrayLike) -> float:
    """sum over (a, b) of p(a, b) log(p(a, b) / p(a) p(b)), p the observed shares.

    Args:
        one: (n,) labels, of any type that numpy sorts.
        other: (n,) labels of the same items.

    Returns:
        Nats; 0 where either label has one value alone.
    """
    counts = contingency(one, other)
    # Not below 0 by a rounding error.
    return max(0.0, entropy(counts.sum(1)) + entropy(counts.sum(0)) - entropy(counts.ravel()))


def normalised_information(one: ArrayLike, other: ArrayLike) -> float:
    """Mutual information over the mean of the two entropies, 0 to 1, as scikit-learn's `normalized_mutual_info_score`.

    Where either label has one value alone it is 0: nothing is said about anything. (scikit-learn gives 1 where both
    have.)
    """
    counts = contingency(one, other)
    entropies = entropy(counts.sum(1)), entropy(counts.sum(0))
    return 0.0 if 0.0 in entropies else 2 * mutual_information(one, other) / sum(entropies)


def shuffled_information(one: ArrayLike, other: ArrayLike, seed: int, times: int = 20) -> float:
    """Mean mutual information after one of the labels is shuffled; see `shuffled_mean`."""
    return shuffled_mean(mutual_information, one, other, seed, times)


def shuffled_mean(
    statistic: Callable[[ArrayLike, ArrayLike], float], one: ArrayLike, other: ArrayLike, seed: int, times: int = 20
) -> float:
    """Mean of a statistic after one of the labels is shuffled: what the estimate says where there is nothing.

    Args:
        statistic: Of two labels of the same items.
        one: (n,) labels.
        other: (n,) labels.
        seed: Of the shuffles. No global generator is touched.
        times: Shuffles to average.
    """
    # By number: sorting text again at each turn would take seconds.
    first, second = (np.unique(np.asarray(side), return_inverse=True)[1] for side in (one, other))
    generator = np.random.default_rng(seed)
    return float(np.mean([statistic(first, generator.permutation(second)) for _ in range(times)]))


def contingency(one: ArrayLike, other: ArrayLike) -> NDArray[np.int64]:
    """(A, S) how often each value of `one` (in order) meets each value of `other`."""
    (rows, row), (columns, column) = (np.unique(np.asarray(side), return_inverse=True) for side in (one, other))
    cells = np.bincount(row * len(columns) + column, minlength=len(rows) * len(columns))
    return cells.reshape(len(rows), len(columns))


def entropy(counts: ArrayLike) -> float:
    """Entropy of the shares that counts make up, in nats."""
    some = np.asarray(counts, dtype=np.float64)
    shares = some[some > 0] / some.sum()
    # Not -0.0 for a single value.
    return max(0.0, float(-(shares * np.log(shares)).sum()))


def quantile_bins(values: Sequence[float] | NDArray[np.float64], bins: int = 4) -> NDArray[np.int64]:
    """(n,) which of `bins` bins of about equal size each value is in; ties stay together, so there may be fewer."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]))
    return np.searchsorted(edges, values, side="right")
