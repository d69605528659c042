"""The learned parts of a latent space: codebook, prior and posterior networks."""

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
    """The logit deviation that a standard normal state causes: the deviation over v of scale w_v e, for e ~ N(0, I).

    E[var_v(w_v e)] is the trace of the covariance of the head's rows. A shift that all logits share does not count:
    softmax does not see it.
    """
    weight = head.weight.detach()
    exact = weight.dtype if weight.dtype == torch.float64 else torch.float32
    deviation = weight.to(exact).var(dim=0, correction=0).sum().sqrt()
    return abs(head.scale) * float(deviation)


def check_codebook(num_codes: int, init_logit_std: float) -> None:
    """Refuse settings of no codebook.

    Raises:
        ValueError: `num_codes` is below 1, or `init_logit_std` is negative.
    """
    if num_codes < 1:
        raise ValueError(f"latent.num_codes: found {num_codes}, expected at least 1.")
    if init_logit_std < 0:
        raise ValueError(f"latent.init_logit_std: found {init_logit_std}, expected at least 0.")


class Codebook(nn.Module):
    """E: one vector for each preference factor."""

    def __init__(self, num_codes: int, width: int, init_logit_std: float, head: LogitHead) -> None:
        """Draw codes from a normal whose effect on the logits has the deviation `init_logit_std`.

        Args:
            num_codes: K.
            width: d.
            init_logit_std: Deviation of LMHead(e_k) over the vocabulary, in logits (nats). 0 makes all codes zero.
            head: The policy's head, which sets the scale of a state against a logit.
        """
        super().__init__()
        scale = init_logit_std / state_deviation(head) if init_logit_std else 0.0
        self.weight = nn.Parameter(scale * torch.randn(num_codes, width))

    def forward(self, weights: Tensor) -> Tensor:
        """z = c E: weights (B, K) over the codes to preference representations (B, d)."""
        return weights.to(self.weight.dtype) @ self.weight


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """What the networks of a latent space share."""

    hidden: int
    """Width of the hidden layer."""
    detach: bool
    """Read the hidden states without sending gradient into the backbone."""
    standardise: bool
    """Read what tells the states apart: see `RunningMoments`."""


class StateNetwork(nn.Module):
    """Two layers on hidden states at unit root mean square, less what all have in common. The second starts at zero.

    Zero makes prior and posterior start alike (uniform), so that an empty codebook is the plain algorithm, KL included.
    The states' scale differs by two orders of magnitude between model families; without the normalisation the same
    learning rate and initialisation would start one family from a uniform prior and another from a one-hot one.
    """

    def __init__(self, inputs: int, width: int, outputs: int, settings: NetworkSettings) -> None:
        """Build the two layers.

        Args:
            inputs: How many states are read side by side.
            width: d, width of each.
            outputs: Width of the output.
            settings: What the networks of a space share.
        """
        super().__init__()
        self.moments = RunningMoments(inputs * width) if settings.standardise else None
        self.first = nn.Linear(inputs * width, settings.hidden)
        self.second = nn.Linear(settings.hidden, outputs)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)
        self.detach = settings.detach

    def forward(self, *states: Tensor) -> Tensor:
        """Hidden states, each (B, d), to (B, outputs), outside autocast in the type of the weights.

        The output is float32 or wider: a softmax in bfloat16 misses a sum of 1 by a percent, which the marginal pays.
        """
        kind = self.first.weight.dtype
        with torch.autocast(states[0].device.type, enabled=False):
            normal = torch.cat([rms_norm(self._read(state).to(kind), state.shape[-1:]) for state in states], dim=-1)
            if self.moments is not None:
                normal = self.moments(normal).to(kind)
            output = self.second(gelu(self.first(normal)))
        return output.to(torch.promote_types(kind, torch.float32))

    def weights(self, name: str) -> dict[str, Tensor]:
        """The layers' tensors, detached, each under `name.` and its own name.

        Standardisation goes into the first layer: its tensors are new, and all are float32 or wider.
        """
        tensors = nn.ModuleDict({"first": self.first, "second": self.second}).state_dict()
        if self.moments is not None:
            tensors["first.weight"], tensors["first.bias"] = self.moments.folded(self.first)
            tensors = {own: tensor.to(self.moments.mean.dtype) for own, tensor in tensors.items()}
        return {f"{name}.{own}": tensor for own, tensor in tensors.items()}

    def _read(self, state: Tensor) -> Tensor:
        return state.detach() if self.detach else state


class Prior(StateNetwork):
    """a_p = MLP_prior(h_x): prior logits from the prompt alone."""

    def __init__(self, width: int, outputs: int, settings: NetworkSettings) -> None:
        """See `StateNetwork`."""
        super().__init__(1, width, outputs, settings)


PosteriorReads = Literal["both", "difference", "sum"]
READS: dict[PosteriorReads, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "both": lambda chosen, rejected: (chosen, rejected),
    "difference": lambda chosen, rejected: (chosen - rejected,),
    "sum": lambda chosen, rejected: (chosen + rejected,),
}
"""What a posterior may be shown of h_w and h_l, (B, d) each: states of the same shape, to be read side by side."""


class Posterior(StateNetwork):
    """a_q = MLP_post([h_w ; h_l]). It sees which answer won, so it exists in training only."""

    def __init__(self, width: int, outputs: int, settings: NetworkSettings, reads: PosteriorReads = "both") -> None:
        """See `StateNetwork`; `reads` says what it is shown, by the names of `READS`.

        Raises:
            ValueError: It is none of these.
        """
        if reads not in READS:
            raise ValueError(f"latent.posterior_reads: found {reads!r}, expected one of {', '.join(READS)}.")
        shown = READS[reads](torch.empty(0), torch.empty(0))
        super().__init__(len(shown), width, outputs, settings)
        self.reads = reads

    def of(self, states: PairStates) -> Tensor:
        """(B, outputs) posterior logits of labelled pairs."""
        return self(*READS[self.reads](states.chosen, states.rejected))
