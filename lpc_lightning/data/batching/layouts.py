"""Two ways to lay tokenised pairs out for one backbone pass. Both read the same log-probabilities.

- `padded`: one row a sequence, the prompt in both. Works with any attention kernel.
- `shared_prefix`: the prompt once, then both completions, each seeing the prompt and itself alone, positions restarted;
  several pairs share a row, up to a token budget where there is one. Needs a kernel that takes a mask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lpc_lightning.data.batching.packing import Piece, fill, last_of, place_families, predictors
from lpc_lightning.types import PreferenceBatch, TokenizedPair


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
        rows = fill(pieces, self.pad_id)
        sequences = [(pair.prompts[side], pair.completions[side]) for side in (0, 1) for pair in placed]
        lengths = torch.tensor([len(completion.tokens) for _, completion in sequences])
        reads = [predictors(prompt, answer, len(answer.tokens), rows.width) for prompt, answer in sequences]
        return PreferenceBatch(
            input_ids=rows.input_ids,
            position_ids=rows.position_ids,
            attention_mask=rows.attention_mask,
            segments=rows.segments if self.packed else None,
            read_at=torch.cat(reads),
            targets=torch.tensor([token for _, completion in sequences for token in completion.tokens]),
            owner=torch.arange(len(sequences)).repeat_interleave(lengths),
            prompt_end=torch.tensor([last_of(pair.prompts[0], rows.width) for pair in placed]),
            completion_end=torch.tensor([last_of(completion, rows.width) for _, completion in sequences]),
            lengths=lengths,
            flipped=torch.tensor([pair.flipped for pair in pairs]),
            ids=tuple(pair.id for pair in pairs),
            sources=tuple(pair.source for pair in pairs),
            factors=tuple(pair.factor for pair in pairs),
            annotators=tuple(pair.annotator for pair in pairs),
            tokens=int(rows.attention_mask.sum()),
            reference_bits=_reference_bits(pairs),
        )


def _reference_bits(pairs: Sequence[TokenizedPair]) -> Tensor | None:
    """(2B,) `PreferenceBatch.reference_bits`."""
    known = [pair.reference_logps for pair in pairs if pair.reference_logps is not None]
    if len(known) != len(pairs):
        return None
    return torch.tensor(known, dtype=torch.float64).T.flatten().view(torch.int64)


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
    """Prompt, chosen and rejected answer in one row, pairs side by side."""

    packed = True

    def __init__(self, pad_id: int, row_tokens: int | None) -> None:
        """Set the budget.

        Args:
            pad_id: Token id that fills rows up.
            row_tokens: Most tokens a row may hold. A longer pair widens the rows of its batch to its own length. None
                puts all pairs into one row, without padding.
        """
        super().__init__(pad_id)
        self.row_tokens = row_tokens

    def place(self, pairs: Sequence[TokenizedPair]) -> list[PlacedPair]:
        """All in one row, or rows as wide as costs least."""
        families = [(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids)) for pair in pairs]
        return [
            PlacedPair((prompt, prompt), (chosen, rejected))
            for prompt, (chosen, rejected) in place_families(families, self.row_tokens)
        ]
