"""Two answers that a label orders, as in SHP, PKU-SafeRLHF, HelpSteer3 and Chatbot Arena."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from lpc_lightning.data.sources.columns import Columns
from lpc_lightning.data.sources.rows import BadRow, Row, Tie, is_missing

Value: TypeAlias = str | int | float


@dataclass(frozen=True)
class LabelledAnswers:
    """Columns of two answers, and values of the label that orders them."""

    answers: tuple[str, str]
    """Columns of the first and of the second answer."""
    label: str
    """Column of the label."""
    first: Sequence[Value]
    """Values of the label if the first answer is preferred."""
    second: Sequence[Value]
    """Values of the label if the second answer is preferred."""
    tie: Sequence[Value] = ()
    """Values of the label if no answer is preferred."""
    prompt: str | None = None
    """Column of the prompt in this data set. None: `prompt`."""

    @property
    def description(self) -> str:
        """The columns, for reports and errors."""
        return f"answers {self.answers[0]} and {self.answers[1]}, ordered by {self.label}"

    def ordered(self, row: Row) -> tuple[str, str]:
        """Return the columns of the preferred answer and of the other one.

        Raises:
            Tie: The label prefers neither.
            BadRow: The label has no value, or an unknown one.
        """
        value = _text(row.get(self.label))
        if value in map(_text, self.first):
            return self.answers
        if value in map(_text, self.second):
            return self.answers[1], self.answers[0]
        if value in map(_text, self.tie):
            raise Tie
        raise BadRow(
            "unknown label",
            f"found {row.get(self.label)!r} in {self.label!r}; expected one of {list(self.first)} for "
            f"{self.answers[0]!r}, {list(self.second)} for {self.answers[1]!r}, or {list(self.tie)} for a tie. Set "
            "data.columns.label_a, label_b and label_tie if the labels have other values",
        )


TIES = ("tie", "tie (bothbad)", "both_bad", "bothbad", "both bad", "tie (inconsistent)")
KNOWN = (
    LabelledAnswers(("human_ref_A", "human_ref_B"), "labels", [1], [0], prompt="history"),
    LabelledAnswers(("response_0", "response_1"), "better_response_id", [0], [1]),
    LabelledAnswers(("response1", "response2"), "overall_preference", [-3, -2, -1], [1, 2, 3], [0], prompt="context"),
    LabelledAnswers(("response_1", "response_2"), "preference_strength", [-3, -2, -1], [1, 2, 3], [0]),
    LabelledAnswers(("conversation_a", "conversation_b"), "winner", ["model_a"], ["model_b"], TIES),
    LabelledAnswers(("response_a", "response_b"), "winner", ["model_a"], ["model_b"], TIES),
    LabelledAnswers(("output_1", "output_2"), "preference", [1], [2], [0], prompt="instruction"),
)
"""Known data sets: SHP, PKU-SafeRLHF, HelpSteer3, HelpSteer2, Chatbot Arena and MT-Bench, other battles, AlpacaFarm."""


def find_labelled_answers(row: Row, columns: Columns) -> LabelledAnswers | None:
    """Return the labelled answers of a row, or None if the columns `chosen` and `rejected` hold its answers.

    The settings come first, then `chosen` and `rejected`, then the known data sets. If `chosen` and `rejected` are set
    to the two answers of a known data set, its label still orders them.

    Raises:
        BadRow: The row fits several known data sets, lacks a column that is set, or has a label and scores.
    """
    if columns.answer_a is not None and columns.answer_b is not None and columns.label is not None:
        return _with_settings(_unknown(columns.answer_a, columns.answer_b, columns.label), columns, row)
    known = [form for form in KNOWN if all(name in row for name in form.answers)]
    if columns.label is not None:
        known = list({form.answers: replace(form, label=columns.label) for form in known}.values())
    known = [form for form in known if form.label in row]
    direct = (columns.chosen, columns.rejected)
    if columns.label is None and not any(is_missing(row.get(name)) for name in direct):
        known = [form for form in known if set(form.answers) == set(direct)]
    if len(known) > 1:
        raise BadRow(
            "ambiguous columns",
            f"found {'; '.join(form.description for form in known)}. Set data.columns.answer_a, answer_b and label",
        )
    if not known and columns.label is not None:
        raise BadRow("missing answer", f"found no answers for the label {columns.label!r}; {SETTINGS}")
    return _with_settings(known[0], columns, row) if known else None


SETTINGS = "set data.columns.answer_a, answer_b and label for two answers that a label orders"


def _unknown(answer_a: str, answer_b: str, label: str) -> LabelledAnswers:
    known = next((form for form in KNOWN if (*form.answers, form.label) == (answer_a, answer_b, label)), None)
    words = LabelledAnswers((answer_a, answer_b), label, ["a", answer_a], ["b", answer_b], TIES)
    return known or words


def _with_settings(form: LabelledAnswers, columns: Columns, row: Row) -> LabelledAnswers:
    if missing := [name for name in (*form.answers, form.label) if name not in row]:
        raise BadRow("missing answer", f"no {missing[0]!r}; the row has {sorted(map(str, row))}")
    if columns.score_chosen is not None:
        raise BadRow(
            "ambiguous columns",
            f"found {form.description}, and data.columns.score_chosen, the score of the answer in {columns.chosen!r}; "
            "expected a label or scores. Leave the scores out, or set data.columns.chosen and rejected to answers that "
            "no label orders",
        )
    return replace(
        form,
        first=form.first if columns.label_a is None else columns.label_a,
        second=form.second if columns.label_b is None else columns.label_b,
        tie=form.tie if columns.label_tie is None else columns.label_tie,
    )


def _text(value: Any) -> str:
    """Return a label as text, so that 1, 1.0, "1", "1.0" and " 1 " are equal."""
    text = str(value).strip().lower()
    whole = re.fullmatch(r"([+-]?[0-9]{1,16})\.0*", text)  # `int` refuses a text of more than 4300 digits
    return text if whole is None else str(int(whole[1]))
