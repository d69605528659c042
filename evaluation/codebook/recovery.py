"""Measures of whether codes recover labels: the share of items whose code predicts their label.

Both measures increase with the number of codes, and if one label is much more frequent than the others. Compare them
with `shuffled_mean`, their value for shuffled labels.
"""

from __future__ import annotations

from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

from lpc_lightning.evaluation.codebook.mutual_information import contingency


def matched_accuracy(codes: ArrayLike, labels: ArrayLike) -> float:
    """Compute the share of correct items under the best one-to-one match of codes and labels (clustering accuracy).

    If there are more codes than labels, some codes have no label, and all their items are wrong. The Hungarian method
    finds the best match (Kuhn 1955).

    Args:
        codes: (n,) codes of any type that numpy can sort, at least one.
        labels: (n,) labels of the same items.
    """
    counts = contingency(codes, labels)
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / counts.sum())


def purity(codes: ArrayLike, labels: ArrayLike) -> float:
    """Compute the share of correct items if each code predicts its most frequent label.

    Several codes may predict the same label, so a factor that is spread over several codes costs nothing. Purity is 1
    for any labels if each item has its own code.

    Args:
        codes: (n,) codes of any type that numpy can sort, at least one.
        labels: (n,) labels of the same items.
    """
    counts = contingency(codes, labels)
    return float(counts.max(1).sum() / counts.sum())


STATISTICS = {"matched": matched_accuracy, "purity": purity}
"""Measure by the name of its metric."""
