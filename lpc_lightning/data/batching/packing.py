"""Packing of prompts and completions into rows. A completion attends to its own prompt and to itself only."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lpc_lightning.types import PIECES

ATTENTION_AT = 2048
"""Row width in tokens at which attention costs as much as all linear layers, for small models on a CPU."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Prompt or completion at a position in a row."""

    tokens: Sequence[int]
    row: int
    column: int
    position: int
    """Position of the first token in its sequence."""
    segment: int
    """See `PreferenceBatch.segments`."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Inputs of the backbone, each (R, T). See the fields with the same names in `PreferenceBatch`."""

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    segments: Tensor

    @property
    def width(self) -> int:
        """Row width T."""
        return self.input_ids.shape[1]


def pack(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Pack items into rows by first-fit decreasing: the largest item first, each into the first row with room.

    Args:
        sizes: Size of each item, at most `width`.
        width: Maximum total size of the items of a row.

    Returns:
        Indices of the items of each row.
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
    """Pack items into rows of the cheapest width.

    Args:
        sizes: Number of tokens of each item.
        most: Maximum number of tokens in a row. A longer item widens the rows to its length.
        shared: Number of tokens that every row has in addition to its items.

    Returns:
        Indices of the items of each row.
    """
    longest = shared + max(sizes)
    widths = {min(longest * quarters // 4, max(longest, most)) for quarters in range(4, 33)}
    options = (pack(sizes, width - shared) for width in sorted(widths))
    return min(options, key=lambda rows: _cost(rows, sizes, shared))


def _cost(rows: Sequence[Sequence[int]], sizes: Sequence[int], shared: int) -> float:
    """Estimate the cost: number of tokens with padding, times a factor for attention over the row width."""
    width = shared + max(sum(sizes[number] for number in members) for members in rows)
    return len(rows) * width * (1 + width / ATTENTION_AT)


Family = tuple[Sequence[int], Sequence[Sequence[int]]]
"""Tokens of a prompt, and tokens of each of its completions."""


@dataclass(frozen=True, slots=True)
class SharedPieces:
    """Families of a batch, in which equal completions of equal prompts are one piece.

    A completion is given as (pair, side): 1 is the chosen one, and 2 the rejected one.
    """

    families: list[list[tuple[int, int]]]
    """Completions of each family. Its prompt is that of their pairs. The first pairs have the first families."""
    places: list[tuple[tuple[int, int], tuple[int, int]]]
    """Of each pair, (family, index among its completions) of the chosen and the rejected completion."""

    def sizes(self, lengths: Sequence[Sequence[int]]) -> list[int]:
        """Return the number of tokens of each family, of pairs with pieces of the given lengths (pairs, 3)."""
        prompts = [lengths[family[0][0]][0] for family in self.families]
        return [own + sum(lengths[p][s] for p, s in family) for own, family in zip(prompts, self.families, strict=True)]


def share_pieces(
    keys: Sequence[Sequence[Hashable]], lengths: Sequence[Sequence[int]], most: int | None = None
) -> SharedPieces:
    """Find the prompts and completions that several pairs of a batch have.

    Args:
        keys: (pairs, 3) equal keys for equal prompts, and for equal completions of equal prompts.
        lengths: (pairs, 3) number of tokens of each prompt, chosen completion and rejected completion.
        most: Maximum number of tokens in a family. A prompt with more is in several families. A pair whose pieces are
            longer is not split. None: no limit.
    """
    families: list[list[tuple[int, int]]] = []
    places: list[tuple[tuple[int, int], tuple[int, int]]] = []
    last: dict[Hashable, tuple[int, int]] = {}  # the last family of a prompt, and its number of tokens
    known: dict[tuple[Hashable, Hashable], tuple[int, int]] = {}
    for pair, (prompt, chosen, rejected) in enumerate(keys):
        completions = {rejected: 2, chosen: 1}
        sides = sorted(side for key, side in completions.items() if (prompt, key) not in known)
        family, tokens = last.get(prompt, (-1, 0))
        added = sum(lengths[pair][side] for side in sides)
        is_full = family < 0 or (most is not None and tokens + added > most) or len(families[family]) + 2 >= PIECES
        if sides and is_full:
            family, tokens = len(families), lengths[pair][0]
            families.append([])
        for side in sides:
            known[prompt, keys[pair][side]] = family, len(families[family])
            families[family].append((pair, side))
        last[prompt] = family, tokens + added
        places.append((known[prompt, chosen], known[prompt, rejected]))
    return SharedPieces(families, places)


def place_families(families: Sequence[Family], row_tokens: int | None) -> list[tuple[Piece, list[Piece]]]:
    """Place each prompt and its completions next to each other, with several families in rows of the cheapest width.

    Args:
        families: Prompts with their completions, fewer than `PIECES` completions each.
        row_tokens: Maximum number of tokens in a row. A longer family widens the rows to its length. None: one row.

    Returns:
        Prompt piece and completion pieces of each family.
    """
    sizes = [len(prompt) + sum(map(len, completions)) for prompt, completions in families]
    rows = [list(range(len(sizes)))] if row_tokens is None else cheapest_rows(sizes, row_tokens)
    return place_rows(families, rows)


def place_rows(families: Sequence[Family], rows: Sequence[Sequence[int]]) -> list[tuple[Piece, list[Piece]]]:
    """Place each prompt and its completions next to each other in the given rows.

    Args:
        families: Prompts with their completions, fewer than `PIECES` completions each.
        rows: Indices of the families of each row.

    Returns:
        Prompt piece and completion pieces of each family.
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
    """Return the number of rows that the pieces need, and the width that they need."""
    return 1 + max(piece.row for piece in pieces), max(piece.column + len(piece.tokens) for piece in pieces)


def fill(pieces: Iterable[Piece], pad_id: int, shape: tuple[int, int] | None = None) -> Rows:
    """Write pieces into rows, right-padded with `pad_id` to a shape (R, T). Default: the smallest shape."""
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
    """Return the flat position of the last token of a piece."""
    return piece.row * width + piece.column + len(piece.tokens) - 1


def predictors(prompt: Piece, completion: Piece, tokens: int, width: int) -> Tensor:
    """Return the flat positions that predict the first `tokens` tokens of a completion.

    The first one is the last position of the prompt. The others are in the completion.
    """
    start = completion.row * width + completion.column
    return torch.cat([torch.tensor([last_of(prompt, width)]), torch.arange(start, start + tokens - 1)])
