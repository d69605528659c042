"""Two ways to lay tokenised pairs out for one backbone pass. Both read the same log-probabilities.

- `padded`: one row a sequence, the prompt in both. Works with any attention kernel.
- `shared_prefix`: the prompt once, then both completions, each seeing the prompt and itself alone, positions restarted;
  several pairs share a row up to a token budget. Needs a kernel that takes a mask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lpc_lightning.types import PIECES, PreferenceBatch, TokenizedPair


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens somewhere in a row: a prompt or a completion."""

    tokens: list[int]
    row: int
    column: int
    position: int
    """Position of the first token in its own sequence."""
    segment: int
    """See `PreferenceBatch.segments`."""


@dataclass(frozen=True, slots=True)
class PlacedPair:
    """Where a pair's pieces lie. The prompt may lie there twice, once before each completion."""

    prompts: tuple[Piece, Piece]
    completions: tuple[Piece, Piece]


class Layout(ABC):
    """Tokenised pairs to a batch: places the pieces, and says where to read."""

    packed: bool
    """Whether a row holds several pieces that must not see each other."""

    def __init__(self, pad_id: int) -> None:
        """Keep the padding token.

        Args:
            pad_id: Token id that fills rows up; masked, so that any id will do.
        """
        self.pad_id = pad_id

    @abstractmethod
    def place(self, pairs: Sequence[TokenizedPair]) -> list[PlacedPair]:
        """Decide where the pieces of each pair lie."""

    def __call__(self, pairs: Sequence[TokenizedPair]) -> PreferenceBatch:
        """Lay `pairs` out (the `collate_fn` of a data loader)."""
        placed = self.place(pairs)
        pieces = [piece for pair in placed for piece in (*pair.prompts, *pair.completions)]
        rows = 1 + max(piece.row for piece in pieces)
        width = max(piece.column + len(piece.tokens) for piece in pieces)
        input_ids = torch.full((rows, width), self.pad_id)
        position_ids, attention_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
        segments = torch.full_like(input_ids, -1)
        for piece in pieces:
            there = (piece.row, slice(piece.column, piece.column + len(piece.tokens)))
            input_ids[there] = torch.tensor(piece.tokens)
            position_ids[there] = torch.arange(piece.position, piece.position + len(piece.tokens))
            attention_mask[there] = 1
            segments[there] = piece.segment

        sequences = [(pair.prompts[side], pair.completions[side]) for side in (0, 1) for pair in placed]
        lengths = torch.tensor([len(completion.tokens) for _, completion in sequences])
        read_at = torch.cat([_read_at(prompt, completion, width) for prompt, completion in sequences])
        return PreferenceBatch(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            segments=segments if self.packed else None,
            read_at=read_at,
            targets=torch.tensor([token for _, completion in sequences for token in completion.tokens]),
            owner=torch.arange(len(sequences)).repeat_interleave(lengths),
            prompt_end=torch.tensor([_last(pair.prompts[0], width) for pair in placed]),
            completion_end=torch.tensor([_last(completion, width) for _, completion in sequences]),
            lengths=lengths,
            flipped=torch.tensor([pair.flipped for pair in pairs]),
            ids=tuple(pair.id for pair in pairs),
            sources=tuple(pair.source for pair in pairs),
            factors=tuple(pair.factor for pair in pairs),
            annotators=tuple(pair.annotator for pair in pairs),
        )


class PaddedLayout(Layout):
    """One row a sequence: the chosen ones, then the rejected ones."""

    packed = False

    def place(self, pairs: Sequence[TokenizedPair]) -> list[PlacedPair]:
        """Prompt and completion side by side in a row of their own."""
        placed = []
        for number, pair in enumerate(pairs):
            rows = (number, len(pairs) + number)
            start = len(pair.prompt_ids)
            prompts = [Piece(pair.prompt_ids, row, 0, 0, 0) for row in rows]
            answers = (pair.chosen_ids, pair.rejected_ids)
            completions = [Piece(ids, row, start, start, 0) for ids, row in zip(answers, rows, strict=True)]
            placed.append(PlacedPair((prompts[0], prompts[1]), (completions[0], completions[1])))
        return placed


class SharedPrefixLayout(Layout):
    """Prompt, chosen and rejected answer in one row; pairs packed into rows of at most about `row_tokens`."""

    packed = True

    def __init__(self, pad_id: int, row_tokens: int) -> None:
        """Set the budget.

        Args:
            pad_id: Token id that fills rows up.
            row_tokens: Most tokens a row may hold. A longer pair widens the rows of its batch to its own length.
        """
        super().__init__(pad_id)
        self.row_tokens = row_tokens

    def place(self, pairs: Sequence[TokenizedPair]) -> list[PlacedPair]:
        """Rows as wide as costs least, pairs side by side in them."""
        sizes = [len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs]
        longest = max(sizes)
        widths = {min(longest * quarters // 4, max(longest, self.row_tokens)) for quarters in range(4, 33)}
        rows = min((pack(sizes, width) for width in sorted(widths)), key=lambda rows: _cost(rows, sizes))
        placed: dict[int, PlacedPair] = {}
        for row, members in enumerate(rows):
            columns = accumulate((sizes[number] for number in members), initial=0)
            for place, (number, column) in enumerate(zip(members, columns, strict=False)):
                placed[number] = _side_by_side(pairs[number], row, column, PIECES * place)
        return [placed[number] for number in range(len(pairs))]


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


ATTENTION_AT = 2048
"""Width of a row, in tokens, at which attention costs about as much as all linear layers (small models on a CPU)."""


def _cost(rows: Sequence[Sequence[int]], sizes: Sequence[int]) -> float:
    """Tokens to compute, padding included, times what attention over the row's width adds to each."""
    width = max(sum(sizes[number] for number in members) for members in rows)
    return len(rows) * width * (1 + width / ATTENTION_AT)


def _side_by_side(pair: TokenizedPair, row: int, column: int, segment: int) -> PlacedPair:
    runs = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    starts = accumulate((len(run) for run in runs), initial=column)
    positions = (0, len(pair.prompt_ids), len(pair.prompt_ids))
    prompt, chosen, rejected = (
        Piece(run, row, start, position, segment + offset)
        for offset, (run, start, position) in enumerate(zip(runs, starts, positions, strict=False))
    )
    return PlacedPair((prompt, prompt), (chosen, rejected))


def _last(piece: Piece, width: int) -> int:
    return piece.row * width + piece.column + len(piece.tokens) - 1


def _read_at(prompt: Piece, completion: Piece, width: int) -> Tensor:
    """The last prompt token predicts the first completion token; each completion token but the last, the next one."""
    start = completion.row * width + completion.column
    within = torch.arange(start, start + len(completion.tokens) - 1)
    return torch.cat([torch.tensor([_last(prompt, width)]), within])
