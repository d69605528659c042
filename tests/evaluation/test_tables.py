"""Tests of scores and p-values in tables."""

from __future__ import annotations

from lpc_lightning.evaluation.tables import p_value, score


def test_score_and_p_value() -> None:
    assert score(0.43217) == "0.4322"
    assert score(0.43217, 0.01234) == "0.4322 ± 0.0123"
    assert [p_value(value) for value in (1.0, 0.0314, 0.001, 0.0009)] == ["1.000", "0.031", "0.001", "<0.001"]
