"""Prompts and what follows them, packed into rows: each completion sees its own prompt and itself alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lpc_lightning.types import PIECES

ATTENTION_AT = 2048
"""Width of a row, in tokens, at which attention costs about as much as all linear layers (small models on a CPU)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens somewhere in a row: a prompt or a completion."""

    tokens: Sequence[int]
    row: int
    column: int
    position: int
    """Position of the first token in its own sequence."""
    segment: int
    """See `PreferenceBatch.segments`."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What the backbone takes: see the fields of these names in `PreferenceBatch`, each (R, T)."""

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    segments: Tensor

    @property
    def width(self) -> int:
        """T."""
        return self.input_ids.shape[1]


def pack(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Pack items into rows by first-fit decreasing: the largest first, each into the first row with room.

    Args:
        sizes: Size of each item, at most `width`.
        width: What a row may hold.

    Returns:
        The items of each row, by number.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        row = next((row for row, room in enumerate(left) if room >= sizes[number]), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(width)
        rows[row].append(number)
        left[row] -= sizes[number]
    return rows


def cheapest_rows(sizes: Sequence[int], most: int, shared: int = 0) -> list[list[int]]:
    """Pack items into rows as wide as costs least.

    Args:
        sizes: Tokens of each item.
        most: Most tokens a row may hold. A longer item widens the rows to its own length.
        shared: Tokens that every row holds next to its items.

    Returns:
        The items of each row, by number.
    """
    longest = shared + max(sizes)
    widths = {min(longest * quarters // 4, max(longest, most)) for quarters in range(4, 33)}
    options = (pack(sizes, width - shared) for width in sorted(widths))
    return min(options, key=lambda rows: _cost(rows, sizes, shared))


def _cost(rows: Sequence[Sequence[int]], sizes: Sequence[int], shared: int) -> float:
    """Tokens to compute, padding included, times what attention over the row's width adds to each."""
    width = shared + max(sum(sizes[number] for number in members) for members in rows)
    return len(rows) * width * (1 + width / ATTENTION_AT)


Family = tuple[Sequence[int], Sequence[Sequence[int]]]
"""A prompt's tokens, and those of each completion that follows it."""


def place_families(families: Sequence[Family], row_tokens: int | None) -> list[tuple[Piece, list[Piece]]]:
    """Lay each prompt and its completions side by side, several families in a row, rows as wide as costs least.

    Args:
        families: Prompts with their completions; fewer than `PIECES` behind each.
        row_tokens: Most tokens a row may hold. A longer family widens the rows to its own length. None: one row.

    Returns:
        The prompt's piece and the completions' pieces of each family.
    """
    sizes = [len(prompt) + sum(map(len, completions)) for prompt, completions in families]
    rows = [list(range(len(sizes)))] if row_tokens is None else cheapest_rows(sizes, row_tokens)
    return place_rows(families, rows)


def place_rows(families: Sequence[Family], rows: Sequence[Sequence[int]]) -> list[tuple[Piece, list[Piece]]]:
    """Lay each prompt and its completions side by side in given rows.

    Args:
        families: Prompts with their completions; fewer than `PIECES` behind each.
        rows: The families of each row, by number.

    Returns:
        The prompt's piece and the completions' pieces of each family.
    """
    sizes = [len(prompt) + sum(map(len, completions)) for prompt, completions in families]
    placed: dict[int, tuple[Piece, list[Piece]]] = {}
    for row, members in enumerate(rows):
        columns = accumulate((sizes[number] for number in members), initial=0)
        for place, (number, column) in enumerate(zip(members, columns, strict=False)):
            placed[number] = _side_by_side(families[number], row, column, PIECES * place)
    return [placed[number] for number in range(len(families))]


def _side_by_side(family: Family, row: int, column: int, segment: int) -> tuple[Piece, list[Piece]]:
    prompt, completions = family
    start = len(prompt)
    columns = accumulate((len(tokens) for tokens in completions), initial=column + start)
    return Piece(prompt, row, column, 0, segment), [
        Piece(tokens, row, there, start, segment + number)
        for number, (tokens, there) in enumerate(zip(completions, columns, strict=False), start=1)
    ]


def extent(pieces: Sequence[Piece]) -> tuple[int, int]:
    """Return the rows that pieces lie in, and the width that holds them."""
    return 1 + max(piece.row for piece in pieces), max(piece.column + len(piece.tokens) for piece in pieces)


def fill(pieces: Iterable[Piece], pad_id: int, shape: tuple[int, int] | None = None) -> Rows:
    """Write pieces into rows, right-padded with `pad_id` to a shape (R, T). Default: the least that holds them."""
    pieces = list(pieces)
    input_ids = torch.full(shape or extent(pieces), pad_id)
    position_ids, attention_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    segments = torch.full_like(input_ids, -1)
    for piece in pieces:
        there = (piece.row, slice(piece.column, piece.column + len(piece.tokens)))
        input_ids[there] = torch.tensor(piece.tokens, dtype=torch.long)
        position_ids[there] = torch.arange(piece.position, piece.position + len(piece.tokens))
        attention_mask[there] = 1
        segments[there] = piece.segment
    return Rows(input_ids, position_ids, attention_mask, segments)


def last_of(piece: Piece, width: int) -> int:
    """Flat position of a piece's last token."""
    return piece.row * width + piece.column + len(piece.tokens) - 1


def predictors(prompt: Piece, completion: Piece, tokens: int, width: int) -> Tensor:
    """Flat positions whose next tokens are the first `tokens` of a completion: the prompt's last, then its own."""
    start = completion.row * width + completion.column
    return torch.cat([torch.tensor([last_of(prompt, width)]), torch.arange(start, start + tokens - 1)])
