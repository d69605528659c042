"""Requests grouped by context, so that the choices of a question share one pass over their context.

A request is a context and a continuation, as tokens. Requests with the same context form a group. The model's input
holds the context once, followed by the distinct continuations. Each continuation attends to the context and to itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lpc_lightning.data.batching.packing import Rows, cheapest_rows, fill, last_of, place_families, predictors
from lpc_lightning.types import PIECES

Request = tuple[Sequence[int], Sequence[int]]
"""Tokens of a context and of a continuation, at least one each."""


@dataclass(frozen=True, slots=True)
class Group:
    """A context with its continuations."""

    full_context: tuple[int, ...]
    """The context before truncation to the model's window. It determines the seed of z."""
    kept: int
    """Number of its last tokens that fit into the window."""
    continuations: tuple[tuple[int, ...], ...]
    """Distinct continuations."""
    requests: tuple[tuple[int, ...], ...]
    """Indices of the requests with each continuation."""

    @property
    def context(self) -> tuple[int, ...]:
        """The context after truncation, as the model reads it."""
        return self.full_context[len(self.full_context) - self.kept :]

    @property
    def longest(self) -> int:
        """Number of input tokens of the longest sequence. The last token of a continuation is not part of the input."""
        return self.kept + max(map(len, self.continuations)) - 1

    @property
    def tokens(self) -> int:
        """Number of input tokens of all sequences. The context counts once."""
        return self.kept + sum(map(len, self.continuations)) - len(self.continuations)

    def split(self, max_tokens: int) -> list[Group]:
        """Split the group where reading the context again is cheaper than attention over a wide row.

        Args:
            max_tokens: Maximum number of tokens of a part. A part with a single continuation may be longer.
        """
        input_lengths = [len(continuation) - 1 for continuation in self.continuations]
        parts = cheapest_rows(input_lengths, max_tokens, shared=self.kept)
        return [
            replace(
                self,
                continuations=tuple(self.continuations[index] for index in members),
                requests=tuple(self.requests[index] for index in members),
            )
            for part in parts
            for members in _chunks(part, PIECES - 1)
        ]


def kept_context_length(request: Request, max_length: int) -> int:
    """Compute how many of its last context tokens a request keeps, so that its input has at most `max_length` tokens.

    Raises:
        ValueError: The continuation is longer than `max_length`, or the context or the continuation is empty.
    """
    context, continuation = request
    if not context or not continuation:
        raise ValueError(
            f"request: found {len(context)} context and {len(continuation)} continuation tokens, expected at least "
            "one each. Use the prefix token as the context if there is none."
        )
    if len(continuation) > max_length:
        raise ValueError(
            f"request: found a continuation of {len(continuation)} tokens, expected at most {max_length}, the model's "
            "window (max_length)."
        )
    return min(len(context), max_length + 1 - len(continuation))


def group_by_context(requests: Iterable[Request], max_length: int) -> list[Group]:
    """Group requests with the same context, and merge equal continuations.

    Args:
        requests: The requests. Groups refer to them by their index.
        max_length: Maximum number of input tokens. If a request is longer, its context loses its first tokens. The
            number of lost tokens depends on the continuation's length, so one context can appear in several groups.
    """
    groups: dict[tuple[tuple[int, ...], int], dict[tuple[int, ...], list[int]]] = {}
    for index, request in enumerate(requests):
        context, continuation = map(tuple, request)
        members = groups.setdefault((context, kept_context_length(request, max_length)), {})
        members.setdefault(continuation, []).append(index)
    return [
        Group(full_context, kept, tuple(members), tuple(map(tuple, members.values())))
        for (full_context, kept), members in groups.items()
    ]


def make_batches(groups: Iterable[Group], max_tokens: int) -> list[list[Group]]:
    """Put groups into batches of about `max_tokens` tokens, largest first. Larger groups are split."""
    parts = [part for group in groups for part in group.split(max_tokens)]
    batches: list[list[Group]] = []
    room = 0
    for part in sorted(parts, key=lambda part: -part.tokens):
        if part.tokens > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(part)
        room -= part.tokens
    return batches


@dataclass(frozen=True, slots=True)
class ContextBatch:
    """Groups as rows of tokens, with the positions to read.

    There are G groups, S continuations in the order of the groups, and N target tokens.
    """

    rows: Rows
    read_at: Tensor
    """(N,) flat positions whose next token is a token of a continuation."""
    targets: Tensor
    """(N,) that token."""
    owner: Tensor
    """(N,) index of its continuation, below S."""
    context_end: Tensor
    """(G,) flat position of each context's last token, where h_x is read."""
    group: Tensor
    """(S,) index of each continuation's group, below G."""


def lay_out(groups: Sequence[Group], max_tokens: int) -> ContextBatch:
    """Place groups in rows of at most about `max_tokens` tokens. The row width with the lowest cost is used."""
    families = [(group.context, [tokens[:-1] for tokens in group.continuations]) for group in groups]
    placed = place_families(families, max_tokens)
    rows = fill((piece for context, pieces in placed for piece in (context, *pieces)), pad_id=0)
    continuations = [tokens for group in groups for tokens in group.continuations]
    lengths = torch.tensor([len(tokens) for tokens in continuations])
    reads = [
        predictors(context, piece, len(piece.tokens) + 1, rows.width) for context, pieces in placed for piece in pieces
    ]
    return ContextBatch(
        rows=rows,
        read_at=torch.cat(reads),
        targets=torch.tensor([token for tokens in continuations for token in tokens]),
        owner=torch.arange(len(continuations)).repeat_interleave(lengths),
        context_end=torch.tensor([last_of(context, rows.width) for context, _ in placed]),
        group=torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group.requests) for group in groups])),
    )


def _chunks(items: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))
