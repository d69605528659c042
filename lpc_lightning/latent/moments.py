"""Running mean and standard deviation of a network's inputs, over the last few thousand pairs of all devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class RunningMoments(nn.Module):
    """Standardise features to mean 0 and deviation 1, by the moments of the most recent training pairs.

    The states at the last prompt token are nearly the same vector for all prompts, because all prompts end in the same
    tokens of the chat template. Only a few percent of a state's squared norm, or less than one percent, differ between
    prompts. Without standardisation, a network of two layers receives almost no information about the prompt.

    Features read in training mode are added to the moments by `update`, before an optimizer step. So the output
    for a pair does not depend on the other pairs of its batch, accumulated micro-batches count as one large batch, and
    a checkpoint holds the moments of the last step together with the weights. No gradient flows through the moments.

    Attributes:
        pairs: Number of pairs that the moments represent, at most `PAIRS`.
        mean: (features,).
        variance: (features,), with divisor `pairs`.
    """

    PAIRS = 4096
    """Maximum number of pairs that the moments represent. Up to this number they are the moments of all pairs. Beyond
    it, they are an exponential moving average: each step's pairs are averaged with this many earlier pairs."""

    pairs: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, features: int) -> None:
        """Start without pairs. Features then pass unchanged.

        Args:
            features: Number of features.
        """
        super().__init__()
        # The dtype is explicit, because a trainer with precision `bf16-true` builds modules in bfloat16 (see `_apply`).
        self.register_buffer("pairs", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float32))
        self.register_buffer("variance", torch.zeros(features, dtype=torch.float32))
        self._sums: Tensor | None = None

    @property
    def deviation(self) -> Tensor:
        """Standard deviation (features,), computed with one added pair at distance 1 from the mean in every feature.

        The features have a mean square of 1. Some of them differ very little among the first few pairs. Without the
        added pair, they would become very large for the next pair.
        """
        return ((self.pairs * self.variance + 1) / (self.pairs + 1)).sqrt()

    def forward(self, features: Tensor) -> Tensor:
        """Standardise features (B, features). The output has the dtype of the moments, which is float32 or wider."""
        differences = features.to(self.mean.dtype) - self.mean
        if self.training:
            self._accumulate(differences.detach())
        return differences / self.deviation

    @torch.no_grad()
    def update(self, alike: bool = False) -> None:
        """Add all features read in training mode since the last call, on all devices, to the moments.

        Args:
            alike: True if all devices have read the same pairs. They then count once.
        """
        if self._sums is None:
            return
        if dist.is_initialized() and not alike:
            dist.all_reduce(self._sums)
        counts, differences, squares = self._sums
        pairs = self.pairs + counts[0]
        step = differences / pairs
        self.mean += step
        self.variance.mul_(self.pairs).add_(squares).div_(pairs).sub_(step.square()).clamp_(min=0)
        self.pairs.copy_(pairs.clamp(max=self.PAIRS))
        self._sums = None

    @torch.no_grad()
    def folded(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """Compute weight and bias of one layer equal to this module followed by `layer`, in the dtype of the moments.

        W (x - mean) / deviation + b = W' x + b', with W' = W / deviation and b' = b - W' mean.
        """
        weight = layer.weight / self.deviation
        return weight, layer.bias - weight @ self.mean

    def _accumulate(self, differences: Tensor) -> None:
        """Add to the sums of counts, differences from the mean, and squared differences.

        Sums of raw squares would lose a small variance to rounding.
        """
        sums = torch.stack([torch.ones_like(differences), differences, differences.square()]).sum(1)
        self._sums = sums if self._sums is None else self._sums + sums

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> RunningMoments:
        """Apply `fn` as torch does (`to`, `half` ...), but keep the moments in float32 or wider.

        In bfloat16 a small update of the mean, about a thousandth of the difference, would be lost to rounding.
        """

        def wide(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            narrow = changed.is_floating_point() and changed.itemsize < torch.float32.itemsize
            return tensor.to(changed.device) if narrow else changed

        super()._apply(wide, *args, **kwargs)
        return self
