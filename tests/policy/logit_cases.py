"""Random states, heads and codes, and their log-probabilities one token and one code at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lpc_lightning.policy import logprobs
from lpc_lightning.types import LogitHead

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 1.5},
    "all": {"bias": True, "scale": 3.0, "softcap": 2.0},
}
every_head = pytest.mark.parametrize("kind", list(HEADS))
linear_head = pytest.mark.parametrize("kind", [kind for kind, settings in HEADS.items() if "softcap" not in settings])
every_chunking = pytest.mark.parametrize("tokens_at_once", [1, 3, 100])


class Case:
    """Random states, targets, head and codes. `leaves` are the tensors with a gradient."""

    def __init__(
        self,
        kind: str = "plain",
        tokens: int = 7,
        vocabulary: int = 11,
        width: int = 5,
        codes: int = 4,
        dtype: torch.dtype = torch.float64,
        code_scale: float = 0.7,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

        settings = dict(HEADS[kind])
        bias = draw(vocabulary) if settings.pop("bias", False) else None
        self.hidden, self.codes = draw(tokens, width), draw(codes, width, scale=code_scale)
        self.head = LogitHead(draw(vocabulary, width), bias, **settings)
        self.targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
        self.weights = torch.randn(tokens, codes, generator=generator, dtype=torch.float64)

    @property
    def leaves(self) -> list[Tensor]:
        bias = [] if self.head.bias is None else [self.head.bias]
        return [self.hidden, self.codes, self.head.weight, *bias]

    def in_float64(self) -> Case:
        exact = Case.__new__(Case)
        exact.targets, exact.weights = self.targets, self.weights
        exact.hidden, exact.codes = (x.detach().double().requires_grad_() for x in (self.hidden, self.codes))
        head = {name: value.detach().double().requires_grad_() for name, value in self._head_tensors().items()}
        exact.head = replace(self.head, **head)
        return exact

    def _head_tensors(self) -> dict[str, Tensor]:
        found = {"weight": self.head.weight, "bias": self.head.bias}
        return {name: value for name, value in found.items() if value is not None}

    def naive(self) -> Tensor:
        """Compute (N, K) one token and one code at a time."""
        rows = []
        for state, target in zip(self.hidden, self.targets.tolist(), strict=True):
            row = []
            for code in self.codes:
                logits = self.head.weight @ (state + code)
                if self.head.bias is not None:
                    logits = logits + self.head.bias
                logits = self.head.scale * logits
                if self.head.softcap is not None:
                    logits = self.head.softcap * torch.tanh(logits / self.head.softcap)
                row.append(torch.log_softmax(logits, dim=-1)[target])
            rows.append(torch.stack(row))
        return torch.stack(rows)

    def gradients(self, logps: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((self.weights.to(logps.dtype) * logps).sum(), self.leaves)


def chunk(monkeypatch: pytest.MonkeyPatch, tokens: int, vocabulary: int = 11) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", tokens * vocabulary + vocabulary - 1)


def assert_all_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
