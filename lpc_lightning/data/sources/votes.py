"""Votes and gold labels of a row that name one of its answers."""

from __future__ import annotations

from lpc_lightning.data.sources.rows import BadRow, Row, Tie, entry_of

ABSENT = object()
"""Value of an entry that a row does not have. An empty entry is a tie."""


def voted_order(row: Row, answers: tuple[str, str], vote: str | None) -> tuple[str, str]:
    """Return the columns of the preferred answer and of the other one.

    Args:
        row: Cells by column name.
        answers: Columns of the two answers.
        vote: Entry that names the preferred one (see `Columns.vote`). None: the first one is preferred.

    Raises:
        Tie: The vote names neither answer.
        BadRow: The row has no such entry.
    """
    if vote is None:
        return answers
    preferred = _named(row, answers, vote, "vote")
    return (preferred, answers[1 - answers.index(preferred)])


def gold_differs(row: Row, answers: tuple[str, str], gold: str | None) -> bool:
    """Return True if the gold label prefers the second answer.

    Args:
        row: Cells by column name.
        answers: Columns of the preferred answer and of the other one.
        gold: Entry that names the right answer, or its column (see `Columns.gold`). None: unknown, and False.

    Raises:
        Tie: The gold label names neither answer.
        BadRow: The row has no such entry.
    """
    if gold is None:
        return False
    right = gold if gold in answers else _named(row, answers, gold, "gold")
    return right == answers[1]


def _named(row: Row, answers: tuple[str, str], entry: str, setting: str) -> str:
    """Return the answer's column that an entry names."""
    value = entry_of(row, entry, ABSENT)
    if value is ABSENT:
        raise BadRow(
            "unknown label",
            f"found no entry {entry!r}; the row has {sorted(map(str, row))}. Set data.columns.{setting} to an entry "
            f"that names {answers[0]!r} or {answers[1]!r}",
        )
    if value not in answers:
        raise Tie
    return str(value)
