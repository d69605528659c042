"""Loss and accuracies of pairs with flipped labels, apart from those of the others."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lpc_lightning.algorithms.metrics import accuracies

KINDS = ("clean", "flipped")
NAMES = ("loss", "accuracy_true", "accuracy_noisy")


class NoiseMetrics(Metric):
    """Mean loss and accuracies of clean and of flipped pairs, separately. A kind without pairs has no metrics."""

    full_state_update = False

    def __init__(self) -> None:
        """Start without pairs."""
        super().__init__()
        self.add_state("sums", torch.zeros(2, 4, dtype=torch.float64), dist_reduce_fx="sum")
        self.sums: Tensor

    def update(self, losses: Tensor, margins: Tensor, flipped: Tensor) -> None:
        """Add a batch.

        Args:
            losses: (B,) losses under the noisy labels.
            margins: (B,) reward margins of the answers labelled as chosen.
            flipped: (B,) bool, true for flipped pairs.
        """
        noisy = accuracies(margins)
        true = torch.where(flipped, 1 - noisy, noisy)
        values = torch.stack([torch.ones_like(noisy), losses, true, noisy], dim=1).double()
        # A mask as an index would make the CPU wait for the GPU, to learn the number of pairs of each kind.
        kinds = torch.stack([~flipped, flipped])
        self.sums += torch.where(kinds[..., None], values, 0.0).sum(1)

    def compute(self) -> dict[str, Tensor]:
        """Return the means by name, on the CPU."""
        kinds = {kind: sums for kind, sums in zip(KINDS, self.sums.cpu(), strict=True) if sums[0]}
        return {
            f"{kind}/{name}": value / sums[0]
            for kind, sums in kinds.items()
            for name, value in zip(NAMES, sums[1:], strict=True)
        }
