"""Tests of calibration and detection, against scikit-learn and loops over pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve

from lpc_lightning.evaluation.statistics.calibration import (
    BINS,
    calibration_deviations,
    calibration_error,
    wrong_label_auroc,
)


@pytest.mark.parametrize("scale", [0.3, 2.0, 20.0])
def test_calibration_error_equals_scikit_learn(scale: float) -> None:
    margins = scale * torch.randn(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.2
    confidences = np.clip(1 / (1 + np.exp(-margins.abs().numpy())), 0, 1)
    correct = margins.numpy() > 0
    # scikit-learn's bins are over [0, 1]; confidences are in the upper half of them.
    accuracy, confidence = calibration_curve(correct, confidences, n_bins=2 * BINS)
    edges = np.linspace(0, 1, 2 * BINS + 1)
    counts = np.bincount(np.searchsorted(edges[1:-1], confidences), minlength=2 * BINS)
    expected = np.abs(accuracy - confidence) @ counts[counts > 0] / len(correct)
    assert calibration_error(margins) == pytest.approx(expected, rel=1e-9)


def test_calibration_error_by_hand() -> None:
    """Three predictions at 0.9, two of them correct: |2/3 - 0.9|."""
    margin = float(np.log(9))
    assert calibration_error(torch.tensor([margin, margin, -margin])) == pytest.approx(0.9 - 2 / 3, rel=1e-6)


@pytest.mark.parametrize("sure", [50.0, 5000.0])
def test_calibration_error_of_rounded_confidence(sure: float) -> None:
    """The confidence sigmoid(50) is 1 in float64. It is in the last bin, in which 95 right pairs have sigmoid(5)."""
    margins = torch.tensor(95 * [5.0] + 5 * [-sure], dtype=torch.float64)
    gap = 95 * (1 - 1 / (1 + math.exp(-5))) - 5 * 1
    assert calibration_error(margins) == pytest.approx(abs(gap) / 100, rel=1e-6)


def test_calibration_error_of_ties() -> None:
    """Ties are half right at a confidence of 1/2. Beside them, one of two predictions at 0.9 is wrong: |1/2 - 0.9|."""
    margin = float(np.log(9))
    assert calibration_error(torch.zeros(10)) == 0
    actual = calibration_error(torch.tensor([0.0, 0.0, margin, -margin], dtype=torch.float64))
    assert actual == pytest.approx((0 + 0 + 2 * 0.4) / 4, rel=1e-9)


def test_calibration_error_of_true_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    margins = 2 * torch.randn(100_000, generator=generator)
    labels = torch.rand(100_000, generator=generator) < margins.sigmoid()
    assert calibration_error(torch.where(labels, margins, -margins)) < 0.01


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4])
def test_wrong_label_auroc_equals_a_loop(scale: float) -> None:
    margins = (scale * torch.randn(60, generator=torch.Generator().manual_seed(5)).double()).round(decimals=9)
    wrong = torch.rand(60, generator=torch.Generator().manual_seed(6)) < 0.3
    comparisons = [(low < high) + 0.5 * (low == high) for low in margins[wrong] for high in margins[~wrong]]
    assert wrong_label_auroc(margins, wrong) == pytest.approx(float(sum(comparisons)) / len(comparisons), rel=1e-12)


def test_wrong_label_auroc_counts_pairs() -> None:
    """Wrong margins -1 and 2 against right margins 2 and 5: three of four comparisons, and a tie is half of one."""
    margins, wrong = torch.tensor([-1.0, 2.0, 2.0, 5.0]), torch.tensor([True, True, False, False])
    assert wrong_label_auroc(margins, wrong) == pytest.approx((1 + 1 + 0.5 + 1) / 4, rel=1e-9)
    assert wrong_label_auroc(torch.zeros(4), wrong) == pytest.approx(0.5, rel=1e-9)


def test_calibration_deviations_equal_the_jackknife() -> None:
    """Leave out each of twelve prompts of different sizes. Ties, sure predictions and edges of bins are among them."""
    draw = torch.Generator().manual_seed(0)
    margins = torch.randn(60, generator=draw, dtype=torch.float64)
    # Confidences 2/3 and 4/5 are edges of bins.
    margins[:6] = torch.tensor([0.0, 40.0, -40.0, math.log(2), math.log(4), -math.log(4)], dtype=torch.float64)
    clusters = torch.randint(12, (60,), generator=draw).numpy()
    names = sorted(set(clusters.tolist()))
    without = {name: calibration_error(margins[torch.from_numpy(clusters != name)]) for name in names}
    mean, count = sum(without.values()) / len(names), len(names)
    expected = {str(name): (count - 1) / count * (mean - without[name]) for name in names}
    assert calibration_deviations(margins, clusters) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("confidence", [edge / 30 for edge in range(16, 30)])
def test_calibration_deviations_at_an_edge(confidence: float) -> None:
    """A right and a wrong pair have a confidence at the edge of two bins, up to rounding."""
    margin = math.log(confidence / (1 - confidence))
    margins = torch.tensor([margin, -margin, 0.3, 1.3], dtype=torch.float64)
    without = [calibration_error(margins[[other for other in range(4) if other != left]]) for left in range(4)]
    expected = {str(left): 3 / 4 * (sum(without) / 4 - without[left]) for left in range(4)}
    assert calibration_deviations(margins, range(4)) == pytest.approx(expected, abs=1e-12)
