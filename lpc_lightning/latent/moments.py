"""Mean and deviation of what a network reads, over the last few thousand pairs of all devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class RunningMoments(nn.Module):
    """Brings features to mean 0 and deviation 1, by the moments of the pairs that training has seen last.

    The states at the last prompt token are nearly one vector for all prompts, for all of them end in the same tokens of
    the chat template: of a state's square, what tells prompts apart is a few percent, or less than one. Unless the rest
    is taken away, a network of two layers hardly sees the prompt.

    What is read in training mode joins the moments when `close_window` is called, before an optimizer step, and not
    earlier: what a network says of a pair does not depend on the other pairs of its batch, micro-batches that are
    accumulated are one large batch, and a checkpoint holds the moments of the last step as it holds its weights. No
    gradient goes through the moments.

    Attributes:
        pairs: Pairs that the moments stand for, at most `PAIRS`.
        mean: (features,).
        variance: (features,), with divisor `pairs`.
    """

    PAIRS = 4096
    """So far back the moments reach. They are those of all pairs up to this number; from there on each step's pairs
    join so many: an exponential mean."""

    pairs: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, features: int) -> None:
        """Start with no pair: features pass unchanged.

        Args:
            features: Width of what is read.
        """
        super().__init__()
        # The type by name: a trainer of `bf16-true` has modules built in bfloat16 (see `_apply`).
        self.register_buffer("pairs", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float32))
        self.register_buffer("variance", torch.zeros(features, dtype=torch.float32))
        self._met: Tensor | None = None

    @property
    def deviation(self) -> Tensor:
        """(features,), as if one more pair had been seen, at a distance of 1 from the mean in every feature.

        The features have a mean square of 1. In the first few pairs some of them hardly differ, and would explode in
        the next pair.
        """
        return ((self.pairs * self.variance + 1) / (self.pairs + 1)).sqrt()

    def forward(self, features: Tensor) -> Tensor:
        """(B, features) to the same, in the type of the moments: float32 or wider."""
        apart = features.to(self.mean.dtype) - self.mean
        if self.training:
            self._meet(apart.detach())
        return apart / self.deviation

    @torch.no_grad()
    def close_window(self, alike: bool = False) -> None:
        """Have all that was read in training mode since the last time, on all devices, join the moments.

        Args:
            alike: All devices have read the same, which counts once.
        """
        if self._met is None:
            return
        if dist.is_initialized() and not alike:
            dist.all_reduce(self._met)
        counts, apart, square = self._met
        pairs = self.pairs + counts[0]
        step = apart / pairs
        self.mean += step
        self.variance.mul_(self.pairs).add_(square).div_(pairs).sub_(step.square()).clamp_(min=0)
        self.pairs.copy_(pairs.clamp(max=self.PAIRS))
        self._met = None

    @torch.no_grad()
    def folded(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight and bias of one layer in place of this and `layer` behind it, in the type of the moments.

        W (x - mean) / deviation + b = W' x + b', with W' = W / deviation and b' = b - W' mean.
        """
        weight = layer.weight / self.deviation
        return weight, layer.bias - weight @ self.mean

    def _meet(self, apart: Tensor) -> None:
        """Add up number, differences from the mean and their squares: raw squares would lose a small variance."""
        sums = torch.stack([torch.ones_like(apart), apart, apart.square()]).sum(1)
        self._met = sums if self._met is None else self._met + sums

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> RunningMoments:
        """As torch does (`to`, `half` ...), but the moments stay in float32 or wider.

        In bfloat16 a step towards new pairs, a thousandth of the way, would be rounded off.
        """

        def wide(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            narrow = changed.is_floating_point() and changed.itemsize < torch.float32.itemsize
            return tensor.to(changed.device) if narrow else changed

        super()._apply(wide, *args, **kwargs)
        return self
