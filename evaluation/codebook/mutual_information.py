"""Mutual information between two labels of the same items: plug-in estimates from paired samples, in nats.

The plug-in estimate is biased upwards. For n pairs of independent labels with K and S observed values, its expectation
is about (K - 1)(S - 1) / 2n nats (Miller, 1955). `shuffled_information` measures this bias for the given samples.
Compare the estimate with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEAST_EXCHANGED = 8
"""Labels are exchanged between at least so many prompts of neighbouring sizes, if there are as many."""


def mutual_information(first: ArrayLike, second: ArrayLike) -> float:
    """Compute sum over (a, b) of p(a, b) log(p(a, b) / p(a) p(b)), where p are the observed shares.

    Args:
        first: (n,) labels, of any type that numpy can sort.
        second: (n,) labels of the same items.

    Returns:
        Mutual information in nats. 0 if either label has a single value.
    """
    counts = contingency(first, second)
    # Rounding must not make it negative.
    return max(0.0, entropy(counts.sum(1)) + entropy(counts.sum(0)) - entropy(counts.ravel()))


def normalized_information(first: ArrayLike, second: ArrayLike) -> float:
    """Compute mutual information divided by the mean of the two entropies, as `normalized_mutual_info_score` does.

    The result is between 0 and 1. It is 0 if either label has a single value. (scikit-learn returns 1 if both have a
    single value.)
    """
    counts = contingency(first, second)
    entropies = entropy(counts.sum(1)), entropy(counts.sum(0))
    return 0.0 if 0.0 in entropies else 2 * mutual_information(first, second) / sum(entropies)


def shuffled_information(first: ArrayLike, second: ArrayLike, prompts: ArrayLike, seed: int, times: int = 20) -> float:
    """Compute the mean mutual information after shuffling one of the labels; see `shuffled_mean`."""
    return shuffled_mean(mutual_information, first, second, prompts, seed, times)


def shuffled_mean(
    statistic: Callable[[ArrayLike, ArrayLike], float],
    first: ArrayLike,
    second: ArrayLike,
    prompts: ArrayLike,
    seed: int,
    times: int = 20,
) -> float:
    """Compute the mean of a statistic after shuffling one of the labels: its value for unrelated labels.

    Each prompt gets the labels of another one, in random order. The prior's code is the same for all pairs of a prompt,
    and other labels often are, too: if pairs were shuffled one by one, labels that depend on the prompt alone would
    seem related. Prompts exchange labels with those of about their size. Labels that a smaller prompt has no place
    for go to the larger ones, so that each label is used once. A single prompt has its labels shuffled.

    Args:
        statistic: Function of two labels of the same items.
        first: (n,) labels.
        second: (n,) labels.
        prompts: (n,) prompt of each item.
        seed: Seed of the shuffles. Global random states are not changed.
        times: Number of shuffles to average over.
    """
    # Integer codes: sorting strings again in every repetition would take seconds.
    one, other, prompt = (np.unique(np.asarray(labels), return_inverse=True)[1] for labels in (first, second, prompts))
    generator = np.random.default_rng(seed)
    return float(np.mean([statistic(one, _exchange(other, prompt, generator)) for _ in range(times)]))


def _exchange(
    labels: NDArray[np.int64], prompt: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.int64]:
    """Give each prompt the labels of another one; see `shuffled_mean`.

    Args:
        labels: (n,) labels.
        prompt: (n,) number of each item's prompt.
        generator: Source of random numbers.
    """
    sizes = np.bincount(prompt)
    starts = sizes.cumsum() - sizes
    group = _groups_by_size(sizes)
    # A cycle through the prompts of each group, in random order: every prompt gives its labels to the next one.
    order = np.lexsort((generator.random(len(sizes)), group))
    taker = np.empty_like(order)
    firsts = np.searchsorted(group[order], np.arange(group.max() + 1))
    taker[order] = np.roll(order, -1)
    taker[order[np.append(firsts[1:], len(order)) - 1]] = order[firsts]
    by_prompt = np.lexsort((generator.random(len(prompt)), prompt))
    place = np.empty_like(prompt)  # of an item among those of its prompt, at random
    place[by_prompt] = np.arange(len(prompt)) - np.repeat(starts, sizes)
    fits = place < sizes[taker[prompt]]
    takers = np.lexsort((generator.random(len(prompt)), prompt))
    target = takers[starts[taker[prompt[fits]]] + place[fits]]
    exchanged, is_free = np.empty_like(labels), np.ones(len(labels), dtype=bool)
    exchanged[target], is_free[target] = labels[fits], False
    exchanged[is_free] = generator.permutation(labels[~fits])
    return exchanged


def _groups_by_size(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (P,) a group of each prompt: all prompts of a size, and of further sizes up to `LEAST_EXCHANGED`."""
    order = sizes.argsort(kind="stable")
    starts, ordered = [0], sizes[order]
    for number in range(1, len(order)):
        if ordered[number] > ordered[number - 1] and number - starts[-1] >= LEAST_EXCHANGED:
            starts.append(number)
    if len(starts) > 1 and len(order) - starts[-1] < LEAST_EXCHANGED:
        starts.pop()
    group = np.empty_like(order)
    group[order] = np.searchsorted(starts, np.arange(len(order)), side="right") - 1
    return group


def contingency(first: ArrayLike, second: ArrayLike) -> NDArray[np.int64]:
    """Count how often each value of `first` occurs with each value of `second`: (A, S) counts, values in order."""
    (rows, row), (columns, column) = (np.unique(np.asarray(labels), return_inverse=True) for labels in (first, second))
    cells = np.bincount(row * len(columns) + column, minlength=len(rows) * len(columns))
    return cells.reshape(len(rows), len(columns))


def entropy(counts: ArrayLike) -> float:
    """Compute the entropy of the shares given by counts, in nats."""
    values = np.asarray(counts, dtype=np.float64)
    shares = values[values > 0] / values.sum()
    # max() turns -0.0, the result for a single value, into 0.0.
    return max(0.0, float(-(shares * np.log(shares)).sum()))


def quantile_bins(values: Sequence[float] | NDArray[np.float64], bins: int = 4) -> NDArray[np.int64]:
    """Assign each value to one of `bins` bins of about equal size: (n,) bin numbers.

    Equal values share a bin, so there may be fewer bins.
    """
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]))
    return np.searchsorted(edges, values, side="right")
