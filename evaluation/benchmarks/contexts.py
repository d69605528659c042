"""Contexts that several continuations share (the choices of a question), read once and not once a continuation.

A request is a context and a continuation, as tokens. Requests with the same context form a group: in the rows that the
backbone reads, the context lies once, its distinct continuations behind it, each seeing the context and itself alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lpc_lightning.data.batching.packing import Rows, cheapest_rows, fill, last_of, place_families, predictors
from lpc_lightning.types import PIECES

Request = tuple[Sequence[int], Sequence[int]]
"""Tokens of a context and of a continuation, one or more each."""


@dataclass(frozen=True, slots=True)
class Group:
    """A context and what follows it."""

    whole: tuple[int, ...]
    """The context before the model's window cut it: a draw of z belongs to it."""
    kept: int
    """Last tokens of it that the window holds."""
    continuations: tuple[tuple[int, ...], ...]
    """Distinct continuations."""
    requests: tuple[tuple[int, ...], ...]
    """Numbers of the requests that each continuation answers."""

    @property
    def context(self) -> tuple[int, ...]:
        """What the model reads of the context."""
        return self.whole[len(self.whole) - self.kept :]

    @property
    def longest(self) -> int:
        """Tokens that the model reads of the longest sequence. The last token of a continuation is never read."""
        return self.kept + max(map(len, self.continuations)) - 1

    @property
    def tokens(self) -> int:
        """Tokens that the model reads of all sequences, the context once."""
        return self.kept + sum(map(len, self.continuations)) - len(self.continuations)

    def split(self, most: int) -> list[Group]:
        """Cut the group where reading the context again costs less than attention over a wide row.

        Args:
            most: Most tokens of a part. One continuation makes a part however long it is.
        """
        read = [len(continuation) - 1 for continuation in self.continuations]
        parts = cheapest_rows(read, most, shared=self.kept)
        return [
            replace(
                self,
                continuations=tuple(self.continuations[number] for number in members),
                requests=tuple(self.requests[number] for number in members),
            )
            for part in parts
            for members in _runs(part, PIECES - 1)
        ]


def kept_of(request: Request, max_length: int) -> int:
    """How many of its last context tokens a request keeps, so that what is read of it is at most `max_length` tokens.

    Raises:
        ValueError: The continuation alone is longer than that, or one of the two is empty.
    """
    context, continuation = request
    if not context or not continuation:
        raise ValueError(
            f"request: found {len(context)} context and {len(continuation)} continuation tokens, expected at least "
            "one each. An empty context is told by the prefix token."
        )
    if len(continuation) > max_length:
        raise ValueError(
            f"request: found a continuation of {len(continuation)} tokens, expected at most {max_length}, the model's "
            "window (max_length)."
        )
    return min(len(context), max_length + 1 - len(continuation))


def group_by_context(requests: Iterable[Request], max_length: int) -> list[Group]:
    """Put requests with the same context together, and each distinct continuation once.

    Args:
        requests: The requests. Their numbers are their places here.
        max_length: Most tokens that the model reads. A context that is too long loses its first tokens, as many as its
            continuation needs: continuations of other lengths then have another context.
    """
    found: dict[tuple[tuple[int, ...], int], dict[tuple[int, ...], list[int]]] = {}
    for number, request in enumerate(requests):
        context, continuation = map(tuple, request)
        answers = found.setdefault((context, kept_of(request, max_length)), {})
        answers.setdefault(continuation, []).append(number)
    return [
        Group(whole, kept, tuple(answers), tuple(map(tuple, answers.values())))
        for (whole, kept), answers in found.items()
    ]


def batches(groups: Iterable[Group], most: int) -> list[list[Group]]:
    """Groups in batches of about `most` tokens at once, the largest first; groups larger than that are split."""
    parts = [part for group in groups for part in group.split(most)]
    made: list[list[Group]] = []
    room = 0
    for part in sorted(parts, key=lambda part: -part.tokens):
        if part.tokens > room:
            made.append([])
            room = most
        made[-1].append(part)
        room -= part.tokens
    return made


@dataclass(frozen=True, slots=True)
class ContextBatch:
    """Groups as rows of tokens, and where to read. G groups, S continuations in the order of the groups, N targets."""

    rows: Rows
    read_at: Tensor
    """(N,) flat positions whose next token is one of a continuation."""
    targets: Tensor
    """(N,) that token."""
    owner: Tensor
    """(N,) which of the S continuations it belongs to."""
    context_end: Tensor
    """(G,) flat position of each context's last token: where h_x is."""
    group: Tensor
    """(S,) which of the G groups each continuation belongs to."""


def lay_out(groups: Sequence[Group], most: int) -> ContextBatch:
    """Lay groups side by side in rows of at most about `most` tokens, as wide as costs least."""
    families = [(group.context, [tokens[:-1] for tokens in group.continuations]) for group in groups]
    placed = place_families(families, most)
    rows = fill((piece for context, rest in placed for piece in (context, *rest)), pad_id=0)
    continuations = [tokens for group in groups for tokens in group.continuations]
    lengths = torch.tensor([len(tokens) for tokens in continuations])
    reads = [
        predictors(context, piece, len(piece.tokens) + 1, rows.width) for context, rest in placed for piece in rest
    ]
    return ContextBatch(
        rows=rows,
        read_at=torch.cat(reads),
        targets=torch.tensor([token for tokens in continuations for token in tokens]),
        owner=torch.arange(len(continuations)).repeat_interleave(lengths),
        context_end=torch.tensor([last_of(context, rows.width) for context, _ in placed]),
        group=torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group.requests) for group in groups])),
    )


def _runs(items: Sequence[int], most: int) -> Iterable[Sequence[int]]:
    return (items[start : start + most] for start in range(0, len(items), most))
