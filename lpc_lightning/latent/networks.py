"""Learned parts of a latent space: the codebook, and the prior and posterior networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm

from lpc_lightning.latent.moments import RunningMoments
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
        ValueError: `num_codes` is below 1, or `init_logit_std` is negative.
    """
    if num_codes < 1:
        raise ValueError(f"latent.num_codes: found {num_codes}, expected at least 1.")
    if init_logit_std < 0:
        raise ValueError(f"latent.init_logit_std: found {init_logit_std}, expected at least 0.")


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
        """Compute z = c E (B, d) from weights (B, K) over the codes."""
        return weights.to(self.weight.dtype) @ self.weight


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """Settings that the networks of a latent space share."""

    hidden: int
    """Width of the hidden layer."""
    detach: bool
    """True stops the gradient into the backbone."""
    standardise: bool
    """True standardises the input states (see `RunningMoments`)."""


class StateNetwork(nn.Module):
    """Two-layer network on hidden states, which are scaled to unit root mean square and then standardised.

    The second layer starts at zero. So prior and posterior both start uniform, and a codebook of zeros is the plain
    algorithm, KL included. The scale of the states differs by two orders of magnitude between model families. Without
    the normalisation, the same learning rate and initialisation would give a uniform prior in one family and a one-hot
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
        self.moments = RunningMoments(inputs * width) if settings.standardise else None
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

        Standardisation is folded into the first layer. The tensors are then new, and float32 or wider.
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
