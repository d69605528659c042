"""Learned parts of a latent space: the codebook, and the prior and posterior networks with standardized inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm

from lpc_lightning.types import LogitHead, PairStates


def state_deviation(head: LogitHead) -> float:
    """Compute the standard deviation over the vocabulary of the logits of a standard normal state.

    This is the deviation over v of scale w_v e, for e ~ N(0, I). E[var_v(w_v e)] is the trace of the covariance of the
    head's rows. A shift common to all logits is not counted, because it does not change the softmax.
    """
    weight = head.weight.detach()
    exact = weight.dtype if weight.dtype == torch.float64 else torch.float32
    deviation = weight.to(exact).var(dim=0, correction=0).sum().sqrt()
    return abs(head.scale) * float(deviation)


def check_codebook(num_codes: int, init_logit_std: float) -> None:
    """Check the settings of a codebook.

    Raises:
        ValueError: `num_codes` is below 1, or `init_logit_std` is negative or not finite.
    """
    if num_codes < 1:
        raise ValueError(f"latent.num_codes: found {num_codes}, expected at least 1.")
    if not 0 <= init_logit_std < math.inf:
        raise ValueError(f"latent.init_logit_std: found {init_logit_std}, expected a number of at least 0.")


class Codebook(nn.Module):
    """Codebook E, with one vector for each preference factor."""

    def __init__(self, num_codes: int, width: int, init_logit_std: float, head: LogitHead) -> None:
        """Draw the codes from a normal distribution, scaled so that their logits have the deviation `init_logit_std`.

        Args:
            num_codes: K.
            width: d.
            init_logit_std: Standard deviation of LMHead(e_k) over the vocabulary, in logits (nats). 0 makes all codes
                zero.
            head: The policy's head, which determines the scale of logits relative to states.
        """
        super().__init__()
        scale = init_logit_std / state_deviation(head) if init_logit_std else 0.0
        self.weight = nn.Parameter(scale * torch.randn(num_codes, width))

    def forward(self, weights: Tensor) -> Tensor:
        """Compute z = c E (B, d) from weights (B, K) over the codes, outside autocast in the type of the codes."""
        with torch.autocast(weights.device.type, enabled=False):
            return weights.to(self.weight.dtype) @ self.weight


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """Settings that the networks of a latent space share."""

    hidden: int
    """Width of the hidden layer."""
    detach: bool
    """True stops the gradient into the backbone."""
    standardize: bool
    """True standardizes the input states (see `RunningMoments`)."""


class RunningMoments(nn.Module):
    """Standardize features to mean 0 and deviation 1, by the moments of the most recent training pairs.

    The states at the last prompt token are nearly the same vector for all prompts, because all prompts end in the same
    tokens of the chat template. Only a few percent of a state's squared norm, or less than one percent, differ between
    prompts. Without standardization, a network of two layers receives almost no information about the prompt.

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
        # `pairs` is no integer, because an average of weights (EMAWeightAveraging) would round it down at each step.
        self.register_buffer("pairs", torch.zeros((), dtype=torch.float32))
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
        """Standardize features (B, features). The output has the dtype of the moments, which is float32 or wider."""
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

    def forget_unread(self) -> None:
        """Forget all features read in training mode since the last `update`."""
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
        super()._apply(at_least_float32(fn), *args, **kwargs)
        return self


def at_least_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function that moves tensors like `fn`, but converts none to a floating-point type below float32."""

    def wide(tensor: Tensor) -> Tensor:
        changed = fn(tensor)
        narrow = changed.is_floating_point() and changed.itemsize < torch.float32.itemsize
        return tensor.to(changed.device) if narrow else changed

    return wide


class StateNetwork(nn.Module):
    """Two-layer network on hidden states, which are scaled to unit root mean square and then standardized.

    The second layer starts at zero. So prior and posterior both start uniform, and a codebook of zeros is the plain
    algorithm, KL included. The scale of the states differs by two orders of magnitude between model families. Without
    the normalization, the same learning rate and initialization would give a uniform prior in one family and a one-hot
    prior in another.
    """

    def __init__(self, inputs: int, width: int, outputs: int, settings: NetworkSettings) -> None:
        """Build the two layers.

        Args:
            inputs: Number of states that are concatenated.
            width: d, the width of each state.
            outputs: Width of the output.
            settings: Settings that the networks of a space share.
        """
        super().__init__()
        self.moments = RunningMoments(inputs * width) if settings.standardize else None
        self.first = nn.Linear(inputs * width, settings.hidden)
        self.second = nn.Linear(settings.hidden, outputs)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)
        self.detach = settings.detach

    def forward(self, *states: Tensor) -> Tensor:
        """Compute outputs (B, outputs) from hidden states, each (B, d), outside autocast in the dtype of the weights.

        The output is float32 or wider. The sum of a softmax in bfloat16 differs from 1 by about one percent, which
        would be an error of the marginal loss.
        """
        dtype = self.first.weight.dtype
        with torch.autocast(states[0].device.type, enabled=False):
            features = [rms_norm(self._input(state).to(dtype), state.shape[-1:]) for state in states]
            normal = torch.cat(features, dim=-1)
            if self.moments is not None:
                normal = self.moments(normal).to(dtype)
            output = self.second(gelu(self.first(normal)))
        return output.to(torch.promote_types(dtype, torch.float32))

    def weights(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors of both layers, detached, with names that start with `prefix.`.

        Standardization is folded into the first layer. The tensors are then new, and float32 or wider.
        """
        tensors = nn.ModuleDict({"first": self.first, "second": self.second}).state_dict()
        if self.moments is not None:
            tensors["first.weight"], tensors["first.bias"] = self.moments.folded(self.first)
            tensors = {name: tensor.to(self.moments.mean.dtype) for name, tensor in tensors.items()}
        return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}

    def _input(self, state: Tensor) -> Tensor:
        return state.detach() if self.detach else state


class Prior(StateNetwork):
    """Prior network: logits a_p = MLP_prior(h_x) from the prompt alone."""

    def __init__(self, width: int, outputs: int, settings: NetworkSettings) -> None:
        """See `StateNetwork`."""
        super().__init__(1, width, outputs, settings)


PosteriorReads = Literal["both", "difference", "sum"]
READS: dict[PosteriorReads, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "both": lambda chosen, rejected: (chosen, rejected),
    "difference": lambda chosen, rejected: (chosen - rejected,),
    "sum": lambda chosen, rejected: (chosen + rejected,),
}
"""Inputs of a posterior, by setting: functions from h_w and h_l, (B, d) each, to the states that it concatenates."""


class Posterior(StateNetwork):
    """Posterior network: logits a_q = MLP_post([h_w ; h_l]). It reads the label, so it is used in training only."""

    def __init__(self, width: int, outputs: int, settings: NetworkSettings, reads: PosteriorReads = "both") -> None:
        """See `StateNetwork`. `reads` is a key of `READS` and selects the input.

        Raises:
            ValueError: `reads` is unknown.
        """
        if reads not in READS:
            raise ValueError(f"latent.posterior_reads: found {reads!r}, expected one of {', '.join(READS)}.")
        inputs = READS[reads](torch.empty(0), torch.empty(0))
        super().__init__(len(inputs), width, outputs, settings)
        self.reads = reads

    def logits(self, states: PairStates) -> Tensor:
        """Compute the posterior logits (B, outputs) of labelled pairs."""
        return self(*READS[self.reads](states.chosen, states.rejected))
