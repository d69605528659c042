"""Names of the columns of a row, and how their cells are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal, TypeAlias

MarginScale: TypeAlias = Literal["log", "difference"]
OPTIONAL = ("source", "factor", "annotator", "id", "weight", "margin")
"""Settings of the columns that rows may lack."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a row, and how their cells are read.

    A row needs two answers in an order of preference: `chosen` and `rejected`, or two answers and a label. Columns
    without a purpose are stored in `meta`. Source, factor and annotator may be the same column. For example,
    `annotator: factor` treats each factor as one annotator. These three, the id, weight, margin and scores may be
    entries of a column: `meta.worker` is the entry `worker` of the column `meta`. Training is refused if a name is
    set for one of them and no row has a value there.
    """

    prompt: str = "prompt"
    """The prompt: text, rendered text or messages. May be absent if the answers are whole conversations. If a row has
    no such column, a single column `instruction`, `question`, `query`, `history` or `context` is used, also if its cell
    is null, which is counted."""
    chosen: str = "chosen"
    """The preferred answer: text, one assistant message, or a whole conversation that ends with the answer."""
    rejected: str = "rejected"
    """The other answer, in the same formats."""
    answer_a: str | None = None
    """First of two answers that a label orders, in the formats of `chosen`. null: the columns of a known data set (see
    docs/data.md)."""
    answer_b: str | None = None
    """Second of the two answers."""
    label: str | None = None
    """Label that orders the two answers. null: the label column of a known data set."""
    label_a: list[str | int | float] | None = None
    """Values of the label if the first answer is preferred, such as [model_a] or [-3, -2, -1]. null: the values of a
    known data set, otherwise `a`, `A` or the name of the first answer's column."""
    label_b: list[str | int | float] | None = None
    """Values of the label if the second answer is preferred."""
    label_tie: list[str | int | float] | None = None
    """Values of the label if no answer is preferred. These rows are dropped and counted."""
    vote: str | None = None
    """Entry that names the preferred answer by its column, such as `meta.one_vote` (the entry `one_vote` of the column
    `meta`) with the values `chosen` and `rejected`. Rows with another value are dropped and counted as ties. null: the
    answers are in the order of their columns or of the label."""
    gold: str | None = None
    """Entry that names the right answer by its column, such as `meta.gold`, or the column itself if it always holds the
    right answer, such as `chosen`. Pairs whose label prefers the other answer count as wrong labels: see
    `gold_accuracy` in docs/metrics.md. Rows with another value are dropped and counted as ties. null: unknown."""
    system: str | None = None
    """System text, placed before the prompt. null: the column `system`, `system_prompt` or `system_message`. A name
    that no row has: no system text."""
    input: str | None = None
    """Text appended to the prompt after a blank line. null: the column `input` if the prompt is in `instruction`. A
    name that no row has: nothing is appended."""
    rendered: Literal["turns", "text"] = "turns"
    """Treatment of text that a chat template has rendered ("<|im_start|>user", "Human: ... Assistant:"), and of message
    lists that are written as text. `turns`: convert to messages. `text`: use it as plain text."""
    source: str = "source"
    """Origin of the pair. Defaults to the empty text if absent."""
    factor: str = "factor"
    """The preference factor that decided the label. Defaults to the empty text if absent."""
    annotator: str = "annotator"
    """Name of the annotator who labelled the pair. Defaults to the empty text if absent."""
    named_in_prompt: Literal["annotator", "factor", "source"] | None = None
    """Label that the policy reads: the last user turn starts with a line such as `Annotator: anna`, in training,
    validation and test. A policy that reads the annotator's name shows what can be learned about known annotators (see
    docs/adaptation.md). The choice of validation pairs, label noise, and errors over prompts go by the prompt
    without the line. A name that training does not have is written as well, and is only text to the policy. Pairs
    without the label have no line. `data.too_long: truncate_prompt` does not cut a prompt with the line; a longer one
    is refused. null: none."""
    id: str = "id"
    """Name of the pair. Defaults to the place of the row if absent."""

    weight: str | None = "weight"
    """Weight of the pair in the loss, a finite number of at least 0: the loss is the weighted mean over the pairs of an
    optimizer step. Defaults to 1 if absent. null: all weights are 1."""
    margin: str | None = "margin"
    """Margin of the pair, a finite number in units of the reward: the target by which the chosen answer's
    reward exceeds that of the rejected one (see `losses`). Defaults to 0 if absent. null: all margins are 0."""
    score_chosen: str | None = None
    """Score of the chosen answer, from which the margin is computed in place of the column `margin`: margin_alpha times
    the scaled difference of both scores. null: no scores."""
    score_rejected: str | None = None
    """Score of the rejected answer."""
    margin_scale: MarginScale = "log"
    """Scale of the difference of scores. `log`: its natural logarithm, as in ODPO (arXiv 2402.10571), which needs a
    higher score of the chosen answer. `difference`: the difference itself."""
    margin_alpha: float = 1.0
    """Factor of a margin from scores, ODPO's alpha."""

    def __post_init__(self) -> None:
        names = [self.prompt, self.chosen, self.rejected, self.id, *{self.source, self.factor, self.annotator}]
        names += [name for name in (self.answer_a, self.answer_b, self.label, self.system, self.input) if name]
        names += [name for name in (self.weight, self.margin, self.score_chosen, self.score_rejected) if name]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"columns: found {repeated} for more than one purpose, expected a column for each purpose")
        if (self.answer_a is None) != (self.answer_b is None):
            raise ValueError(
                f"columns: found answer_a={self.answer_a!r} and answer_b={self.answer_b!r}, expected both or neither"
            )
        if (self.score_chosen is None) != (self.score_rejected is None):
            raise ValueError(
                f"columns: found score_chosen={self.score_chosen!r} and score_rejected={self.score_rejected!r}, "
                "expected both or neither"
            )
        if self.score_chosen is not None and (self.answer_a or self.vote):
            raise ValueError(
                "columns: found score_chosen together with a label or a vote, expected one of them. The scores are "
                "those of the columns chosen and rejected; a label or a vote orders the answers anew"
            )
        if not 0 < self.margin_alpha < math.inf:
            raise ValueError(f"columns.margin_alpha: found {self.margin_alpha}, expected a number above 0")
        if self.score_chosen is None and (self.margin_alpha, self.margin_scale) != (1.0, "log"):
            raise ValueError(
                f"columns: found margin_alpha={self.margin_alpha} and margin_scale={self.margin_scale!r} without "
                "columns.score_chosen, expected the columns of the scores that they scale, or neither"
            )
        if self.answer_a is not None and self.label is None:
            raise ValueError(
                f"columns: found the answers {self.answer_a!r} and {self.answer_b!r} without columns.label, expected "
                "the column that names the preferred answer"
            )

    @cached_property
    def expected(self) -> dict[str, str]:
        """Optional columns in which a value is expected, by setting: those whose name is set, or in the prompt."""
        names = {setting: getattr(self, setting) for setting in OPTIONAL}
        names = {setting: name for setting, name in names.items() if name not in (None, getattr(Columns, setting))}
        label = self.named_in_prompt
        return names if label is None else names | {"named_in_prompt": getattr(self, label)}

    @cached_property
    def purposes(self) -> set[str]:
        """Names of the columns with texts and labels. Numbers stay in `meta` for other uses, such as label noise."""
        numbers = ("margin_scale", "weight", "margin", "score_chosen", "score_rejected")
        others = ("rendered", "named_in_prompt", *numbers)
        return {value for f in fields(self) if f.name not in others and isinstance(value := getattr(self, f.name), str)}
