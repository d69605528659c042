"""Quality of predicted probabilities of labels: calibration, and detection of wrong labels.

The probability of a pair's label is sigmoid(margin), as in the model of Bradley and Terry 1952.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

BINS = 15
"""Number of bins of the calibration error, as in Guo et al. 2017."""


def calibration_error(margins: Tensor) -> float:
    """Compute the expected calibration error: the mean over pairs of |accuracy - confidence| of the pair's bin.

    The confidence of a prediction is sigmoid(|margin|), between 1/2 and 1.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.

    Args:
        margins: (n,) margins of the pairs as labelled, at least one. A prediction is correct if the margin is positive.
            A tie counts half.

    Returns:
        The error, or NaN if a margin is NaN.
    """
    if margins.isnan().any():
        return math.nan
    # Each pair counts twice, so that a tie is correct once and wrong once.
    confidences, correct = _confidences(margins).repeat(2), torch.cat([margins > 0, margins >= 0]).long()
    return float(binary_calibration_error(confidences, correct, n_bins=2 * BINS, norm="l1"))


def calibration_deviations(margins: Tensor, clusters: ArrayLike) -> dict[str, float]:
    """Estimate what each cluster adds to `calibration_error`, which is no mean, by the jackknife.

    With E_c the error without the pairs of cluster c, C clusters, and E the mean of all E_c, it is
    (C - 1) / C (E - E_c), as in `clustered_means.deviations`.

    Source: Efron 1982, "The Jackknife, the Bootstrap and Other Resampling Plans", section 3.

    Args:
        margins: (n,) margins of the pairs as labelled, none of them NaN.
        clusters: (n,) the cluster of each pair, at least two clusters.
    """
    values = margins.double().cpu().numpy()
    names, owner = np.unique(np.asarray(clusters), return_inverse=True)
    confidences = _confidences(margins).cpu().numpy()
    # The edges have the type of the confidences, as those of torchmetrics: some confidences are at an edge.
    edges = torch.linspace(0, 1, 2 * BINS + 1, dtype=torch.float64).numpy()
    bins = np.searchsorted(edges, confidences, side="right") - 1
    gaps = np.zeros((len(names), 2 * BINS + 1))
    np.add.at(gaps, (owner, bins), (np.sign(values) + 1) / 2 - confidences)
    without = np.abs(gaps.sum(0) - gaps).sum(-1) / (len(values) - np.bincount(owner))
    added = (len(names) - 1) / len(names) * (without.mean() - without)
    return dict(zip(map(str, names), added.tolist(), strict=True))


def _confidences(margins: Tensor) -> Tensor:
    """Compute sigmoid(|margin|), below 1 by one unit of float64 at least.

    The last bin includes 1, and torchmetrics would count a confidence that is rounded to 1 in a bin of its own.
    """
    return margins.double().abs().sigmoid().clamp(max=math.nextafter(1, 0))


def wrong_label_auroc(margins: Tensor, wrong: Tensor) -> float:
    """Compute the probability that a wrong label has a lower margin than a right one. A tie counts half.

    This is the area under the ROC curve of the detection of wrong labels by 1 - sigmoid(margin).

    Args:
        margins: (n,) margins of the pairs as labelled.
        wrong: (n,) bool, true for wrong labels. At least one is true and one is false.

    Returns:
        The probability, or NaN if a margin is NaN.
    """
    if margins.isnan().any():
        return math.nan
    from sklearn.metrics import roc_auc_score  # the import takes a second, and most runs have no known wrong labels

    return float(roc_auc_score(wrong.cpu().numpy(), -margins.double().cpu().numpy()))
