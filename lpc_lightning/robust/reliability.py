"""Reliabilities of annotators: the probability that a label is correct, as a moving average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lpc_lightning.transfer import to_device


class Reliabilities:
    """One reliability for each annotator.

    Pairs are added in each micro-batch, and the reliabilities change once for each optimizer step:
    `eta = (1 - rate) eta + rate mean(label_correct)`, with the mean over all pairs of the annotator in the step, on all
    devices. Annotators without pairs in the step keep their value. Nothing is read by the CPU.
    """

    def __init__(self, initial: float, rate: float) -> None:
        """Start without annotators.

        Args:
            initial: Reliability of an annotator before the first step.
            rate: Weight of a step in the moving average.
        """
        self.initial, self.rate = initial, rate
        self.names: tuple[str, ...] = ()
        self.values = torch.zeros(0, dtype=torch.float64, device="cpu")
        """(A,) reliabilities, in the order of `names`. float64: a trainer of any precision leaves them alone."""
        self._numbers: dict[str, int] = {}
        self._sums: Tensor | None = None

    def add_names(self, names: Iterable[str]) -> None:
        """Add annotators with the initial reliability, in sorted order. Known annotators are unchanged."""
        new = tuple(sorted(set(names) - set(self.names)))
        if new:
            initial = self.values.new_full((len(new),), self.initial)
            self._set((*self.names, *new), torch.cat([self.values, initial]))

    def of(self, annotators: Sequence[str], device: torch.device) -> Tensor:
        """Return (B,) reliabilities, float64. Unknown annotators have the mean of all, or the initial value."""
        self.values = self.values.to(device)
        other = self.values.mean() if self.names else self.values.new_tensor(self.initial)
        return torch.cat([self.values, other[None]])[self._indices(annotators, device)]

    def observe(self, annotators: Sequence[str], label_correct: Tensor) -> None:
        """Add (B,) probabilities that labels are correct."""
        # A product with zeros and ones: on a GPU, every run gives equal bits.
        numbers = self._indices(annotators, label_correct.device)
        members = (torch.arange(len(self.names), device=label_correct.device)[:, None] == numbers).double()
        probabilities = label_correct.detach().double()
        sums = members @ torch.stack([probabilities, torch.ones_like(probabilities)], dim=1)
        self._sums = sums if self._sums is None else self._sums + sums

    def update(self) -> None:
        """Update all annotators that have pairs since the last update, on any device."""
        if self._sums is None:
            return
        if dist.is_initialized():
            dist.all_reduce(self._sums)
        total, count = self._sums.unbind(1)
        mean = total / count.clamp(min=1)
        updated = (1 - self.rate) * self.values.to(mean.device) + self.rate * mean
        self.values = torch.where(count > 0, updated, self.values.to(mean.device))
        self._sums = None

    def state_dict(self) -> dict[str, Any]:
        """Return names and values. Pairs since the last update are not stored: their steps are repeated."""
        return {"names": list(self.names), "values": self.values.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore names and values."""
        self._set(tuple(state["names"]), state["values"].to(self.values.device).clone())

    def _set(self, names: tuple[str, ...], values: Tensor) -> None:
        self.names, self.values, self._sums = names, values, None
        self._numbers = {name: number for number, name in enumerate(names)}

    def _indices(self, annotators: Sequence[str], device: torch.device) -> Tensor:
        other = len(self.names)
        return to_device([self._numbers.get(name, other) for name in annotators], device, torch.long)
