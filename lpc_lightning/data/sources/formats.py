"""Conversion of rows in any supported format to `PreferenceExample`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lpc_lightning.data.sources.columns import Columns
from lpc_lightning.data.sources.labelled_answers import SETTINGS, find_labelled_answers
from lpc_lightning.data.sources.markup import is_dialogue_in_lines, refuse_rendered
from lpc_lightning.data.sources.messages import describe, spelled_messages, unread_keys
from lpc_lightning.data.sources.prompts import find_prompt, refuse_other_prompt, with_input, with_system
from lpc_lightning.data.sources.rows import BadRow, Row, check_text, entry_of, is_missing, label_text
from lpc_lightning.data.sources.structures import (
    Structure,
    Triple,
    conversations,
    prompt_and_answers,
    rendered_conversations,
    rendered_prompt,
)
from lpc_lightning.data.sources.votes import gold_differs, voted_order
from lpc_lightning.data.sources.weights import read_margin, read_weight
from lpc_lightning.types import PreferenceExample

DEFAULTS = Columns()
REPEATED_PROMPT = "answers that begin with the prompt"

_WHOLE: dict[str, tuple[Structure, ...]] = {"turns": (conversations, rendered_conversations), "text": (conversations,)}
"""Structures without a prompt column, by `Columns.rendered`, in the order in which they are tried."""
_PROMPTED: dict[str, tuple[Structure, ...]] = {
    "turns": (rendered_prompt, prompt_and_answers),
    "text": (prompt_and_answers,),
}
"""Structures with a prompt column."""


def to_example(row: Row, place: str, columns: Columns = DEFAULTS, forms: list[str] | None = None) -> PreferenceExample:
    """Convert one row to a labelled comparison.

    The two answers are the columns `chosen` and `rejected`, or two columns that a label orders (see
    `labelled_answers`). Two structures are supported. The first is whole conversations in both answers; their common
    turns are the prompt. The second is a prompt with two answers. Cells are texts, messages (see `messages`), or
    dialogues that a template has rendered (see `markup`). A system text and an input may have columns of their own
    (see `prompts`).

    Args:
        row: Cells by column name.
        place: Place of the row in its file. It becomes the id if the row has none.
        columns: Names of the columns.
        forms: List to which a name of each special form of the row is appended, for reports.

    Raises:
        BadRow: The row cannot be used. The exception has the reason.
        Tie: The row's label, vote or gold label prefers neither answer.
    """
    labelled = find_labelled_answers(row, columns)
    answers = (columns.chosen, columns.rejected) if labelled is None else labelled.ordered(row)
    answers = voted_order(row, answers, columns.vote)
    for name in answers:
        if is_missing(row.get(name)):
            raise BadRow("missing answer", f"no {name!r}; the row has {sorted(map(str, row))}; {SETTINGS}")
    special = [] if labelled is None else [labelled.description]
    names = (columns.prompt, *answers)
    cells = _cells(row, names, columns, special)
    triple = _read(_WHOLE[columns.rendered], cells, special)
    if triple is not None and is_dialogue_in_lines(row[answers[0]]):
        refuse_other_prompt(row, columns, triple.prompt)
    if triple is None:
        names = (find_prompt(row, columns, None if labelled is None else labelled.prompt), *answers)
        cells = _cells(row, names, columns, special)
        triple = _read(_PROMPTED[columns.rendered], cells, special)
    if triple is None:
        raise _unknown_form(row, names)
    prompt, input_columns = with_input(triple.prompt, names[0], row, columns)
    prompt, system_columns = with_system(prompt, row, columns)
    if names[0] != columns.prompt and columns.prompt in row:
        special.append(f"prompt from {names[0]}, as {columns.prompt} is empty")
    special += [f"input from {name}" for name in input_columns] + [
        f"system text from {name}" for name in system_columns
    ]
    used = {*columns.purposes, *names, *input_columns, *system_columns}
    used |= set() if labelled is None else {*labelled.answers, labelled.label}
    unused = {name: cell for name, cell in row.items() if name not in used}
    for name, cell in zip(names, cells, strict=True):
        unused |= {f"{name}.{key}": value for key, value in unread_keys(cell).items()}
    example = PreferenceExample(
        id=label_text(entry_of(row, columns.id)) or place,
        prompt=prompt,
        chosen=triple.chosen,
        rejected=triple.rejected,
        source=label_text(entry_of(row, columns.source)),
        factor=label_text(entry_of(row, columns.factor)),
        annotator=label_text(entry_of(row, columns.annotator)),
        flipped=gold_differs(row, answers, columns.gold),
        has_gold=columns.gold is not None,
        weight=read_weight(row, columns),
        margin=read_margin(row, columns),
        meta=unused,
    )
    special += ["weight"] * (example.weight is not None) + ["margin"] * (example.margin is not None)
    _check(example)
    special += [REPEATED_PROMPT] * _repeats_prompt(example)
    if columns.rendered == "turns":
        refuse_rendered(example)
    if forms is not None:
        forms += dict.fromkeys(special)
    return example


def _check(example: PreferenceExample) -> None:
    if not example.prompt:
        raise BadRow("no prompt", "found no prompt column and no common turn of the two conversations")
    last = example.prompt[-1]
    if last["role"] != "user":
        raise BadRow("prompt does not end in a user turn", f"its last turn has the role {last['role']!r}")
    if not last["content"].strip():
        raise BadRow("empty prompt", f"its last user turn is {last['content']!r}")
    for name, answer in (("chosen", example.chosen), ("rejected", example.rejected)):
        if not answer.strip():
            raise BadRow("empty answer", f"the {name} answer is {answer!r}")
    if example.chosen == example.rejected:
        raise BadRow("equal answers", f"both are {example.chosen[:40]!r}")
    labels = (example.id, example.source, example.factor, example.annotator)
    for text in (example.chosen, example.rejected, *labels, *(turn["content"] for turn in example.prompt)):
        check_text(text)


def _repeats_prompt(example: PreferenceExample) -> bool:
    """Return True if both answers begin with the text of the last user turn."""
    question = example.prompt[-1]["content"].strip()
    return all(answer.lstrip().startswith(question) for answer in (example.chosen, example.rejected))


def _cells(row: Row, names: Sequence[str], columns: Columns, forms: list[str]) -> list[Any]:
    cells = [None if is_missing(row.get(name)) else row[name] for name in names]
    return [spelled_messages(cell, forms) for cell in cells] if columns.rendered == "turns" else cells


def _read(structures: Sequence[Structure], cells: Sequence[Any], forms: list[str]) -> Triple | None:
    """Read the cells of prompt, chosen and rejected with the first structure that fits."""
    prompt, chosen, rejected = cells
    return next((triple for read in structures if (triple := read(prompt, chosen, rejected, forms))), None)


def _unknown_form(row: Row, names: Sequence[str]) -> BadRow:
    cells = [row.get(name) for name in names]
    if not cells[0]:
        others = ", ".join(
            repr(name) for name, cell in row.items() if isinstance(cell, str | list) and name not in names
        )
        return BadRow(
            "no prompt",
            f"found no prompt in {names[0]!r}, and the answers are not whole conversations. Set data.columns.prompt to "
            f"the prompt's column; the row also has {others or 'no other text'}",
        )
    kinds = ", ".join(f"{name}: {describe(cell)}" for name, cell in zip(names, cells, strict=True))
    return BadRow("unknown form", f"{kinds}; expected texts or lists of messages")
