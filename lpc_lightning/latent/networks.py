"""The learned parts of a latent space: codebook, prior and posterior networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lpc_lightning.types import LogitHead, PairStates


def state_deviation(head: LogitHead) -> float:
    """The logit deviation that a standard normal state causes: the deviation over v of scale w_v e, for e ~ N(0, I).

    E[var_v(w_v e)] is the trace of the covariance of the head's rows. A shift that all logits share does not count:
    softmax does not see it.
    """
    weight = head.weight.detach()
    exact = weight.dtype if weight.dtype == torch.float64 else torch.float32
    spread = weight.to(exact).var(dim=0, correction=0).sum().sqrt()
    return abs(head.scale) * float(spread)


class Codebook(nn.Module):
    """E: one vector for each preference factor."""

    def __init__(self, codes: int, width: int, spread: float, head: LogitHead) -> None:
        """Draw codes from a normal whose effect on the logits has the deviation `spread`.

        Args:
            codes: K.
            width: d.
            spread: Deviation of LMHead(e_k) over the vocabulary, in logits (nats). 0 makes all codes zero.
            head: The policy's head, which sets the scale of a state against a logit.
        """
        super().__init__()
        scale = spread / state_deviation(head) if spread else 0.0
        self.weight = nn.Parameter(scale * torch.randn(codes, width))

    def forward(self, weights: Tensor) -> Tensor:
        """z = c E: weights (B, K) over the codes to preference representations (B, d)."""
        return weights.to(self.weight.dtype) @ self.weight


class StateNetwork(nn.Module):
    """Two layers on hidden states, which are first brought to unit root mean square. The second one starts at zero.

    Zero makes prior and posterior start alike (uniform), so that an empty codebook is the plain algorithm, KL included.
    The states' scale differs by two orders of magnitude between model families; without the normalisation the same
    learning rate and initialisation would start one family from a uniform prior and another from a one-hot one.
    """

    def __init__(self, inputs: int, width: int, hidden: int, outputs: int, detach: bool) -> None:
        """Build the two layers.

        Args:
            inputs: How many states are read side by side.
            width: d, width of each.
            hidden: Width of the hidden layer.
            outputs: Width of the output.
            detach: Read the states without sending gradient into the backbone.
        """
        super().__init__()
        self.first = nn.Linear(inputs * width, hidden)
        self.second = nn.Linear(hidden, outputs)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)
        self.detach = detach

    def forward(self, *states: Tensor) -> Tensor:
        """Hidden states, each (B, d), to (B, outputs), outside autocast in the type of the weights.

        The output is float32 or wider: a softmax in bfloat16 misses a sum of 1 by a percent, which the marginal pays.
        """
        kind = self.first.weight.dtype
        with torch.autocast(states[0].device.type, enabled=False):
            normal = [nn.functional.rms_norm(self._read(state).to(kind), state.shape[-1:]) for state in states]
            output = self.second(nn.functional.gelu(self.first(torch.cat(normal, dim=-1))))
        return output.to(torch.promote_types(kind, torch.float32))

    def weights(self, name: str) -> dict[str, Tensor]:
        """The layers' tensors, detached, each under `name.` and its own name."""
        return {f"{name}.{own}": tensor for own, tensor in self.state_dict().items()}

    def _read(self, state: Tensor) -> Tensor:
        return state.detach() if self.detach else state


class Prior(StateNetwork):
    """a_p = MLP_prior(h_x): prior logits from the prompt alone."""

    def __init__(self, width: int, hidden: int, outputs: int, detach: bool) -> None:
        """See `StateNetwork`."""
        super().__init__(1, width, hidden, outputs, detach)


class Posterior(StateNetwork):
    """a_q = MLP_post([h_w ; h_l]). It sees which answer won, so it exists in training only."""

    def __init__(self, width: int, hidden: int, outputs: int, detach: bool) -> None:
        """See `StateNetwork`."""
        super().__init__(2, width, hidden, outputs, detach)

    def of(self, states: PairStates) -> Tensor:
        """(B, outputs) posterior logits of labelled pairs."""
        return self(states.chosen, states.rejected)
