"""Weight and margin of a pair, from the cells of its row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lpc_lightning.data.sources.columns import Columns, MarginScale
from lpc_lightning.data.sources.rows import BadRow, Reason, Row, entry_of


def read_weight(row: Row, columns: Columns) -> float | None:
    """Return the weight of a row's pair. None if the row has no weight.

    Raises:
        BadRow: The weight is no finite number of at least 0.
    """
    weight = _number(row, columns.weight, "invalid weight")
    if weight is not None and weight < 0:
        raise BadRow("invalid weight", f"found {weight:g} in {columns.weight!r}, expected at least 0")
    return weight


def read_margin(row: Row, columns: Columns) -> float | None:
    """Return the margin of a row's pair, from its column or from two scores. None if the row has neither.

    Raises:
        BadRow: A number or the margin is not finite, one of the scores is missing, or the difference has no logarithm.
    """
    if columns.score_chosen is None:
        return _number(row, columns.margin, "invalid margin")
    chosen, rejected = (_number(row, name, "invalid score") for name in (columns.score_chosen, columns.score_rejected))
    if chosen is None or rejected is None:
        missing = columns.score_chosen if chosen is None else columns.score_rejected
        raise BadRow("invalid score", f"found none in {missing!r}, expected a number")
    if columns.margin_scale == "log" and not chosen > rejected:
        raise BadRow(
            "invalid score",
            f"found {chosen:g} in {columns.score_chosen!r} and {rejected:g} in {columns.score_rejected!r}, expected a "
            "higher score of the chosen answer, because a margin is the logarithm of the difference. Set "
            "data.columns.margin_scale to difference, or leave the row out",
        )
    margin = columns.margin_alpha * SCALES[columns.margin_scale](chosen - rejected)
    if not math.isfinite(margin):
        raise BadRow(
            "invalid score",
            f"found {chosen:g} in {columns.score_chosen!r} and {rejected:g} in {columns.score_rejected!r}, expected "
            "scores with a finite margin",
        )
    return margin


SCALES: dict[MarginScale, Callable[[float], float]] = {"log": math.log, "difference": float}
"""Functions from the difference of two scores to a margin."""


def _number(row: Row, column: str | None, reason: Reason) -> float | None:
    cell: Any = None if column is None else entry_of(row, column)
    if cell is None or cell == "":
        return None
    try:
        number = math.nan if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError, OverflowError):  # overflow: an integer beyond 1e308
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(reason, f"found {str(cell)[:40]!r} in {column!r}, expected a finite number")
    return number
