"""Quality of predicted probabilities of labels: calibration, and detection of wrong labels.

The probability of a pair's label is sigmoid(margin), as in the model of Bradley and Terry 1952.
"""

from __future__ import annotations

import math

import torch
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
    confidences, correct = margins.double().abs().sigmoid().repeat(2), torch.cat([margins > 0, margins >= 0]).long()
    return float(binary_calibration_error(confidences, correct, n_bins=2 * BINS, norm="l1"))


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
