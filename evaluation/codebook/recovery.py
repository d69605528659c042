"""Whether codes are factors: the share of pairs whose code names their label, once each code is given a label.

Both statistics rise with the number of codes, and of labels that one of them dominates: read them against what
`shuffled_mean` says of shuffled labels.
"""

from __future__ import annotations

from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

from lpc_lightning.evaluation.codebook.mutual_information import contingency


def matched_accuracy(codes: ArrayLike, labels: ArrayLike) -> float:
    """The share of items that are right under the best one-to-one match of codes and labels.

    A code without a partner, where there are more codes than labels, is wrong for all its items. The best match is
    found by the Hungarian method (Kuhn 1955). Known as clustering accuracy.

    Args:
        codes: (n,) labels of any type that numpy sorts, at least one.
        labels: (n,) labels of the same items.
    """
    counts = contingency(codes, labels)
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / counts.sum())


def purity(codes: ArrayLike, labels: ArrayLike) -> float:
    """The share of items that are right when each code stands for its most frequent label.

    Several codes may stand for one label: nothing is lost where a factor is spread over codes. With a code for each
    item it is 1, whatever the labels.

    Args:
        codes: (n,) labels of any type that numpy sorts, at least one.
        labels: (n,) labels of the same items.
    """
    counts = contingency(codes, labels)
    return float(counts.max(1).sum() / counts.sum())


STATISTICS = {"matched": matched_accuracy, "purity": purity}
"""By the name of their metric."""
