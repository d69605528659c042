"""Scores and p-values in tables."""

from __future__ import annotations


def score(value: float, stderr: float | None = None) -> str:
    """Format a score and its standard error, if known: `0.4321 ± 0.0123`."""
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def p_value(value: float) -> str:
    """Format a p-value: `0.031` or `<0.001`."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"
