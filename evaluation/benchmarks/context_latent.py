"""The latent of a context, inferred from the context alone: whatever is batched with it, and in whatever order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lpc_lightning.errors import ConfigError
from lpc_lightning.inference.modeling_lpc import InferencePrior
from lpc_lightning.latent import PriorMode
from lpc_lightning.seeding import derive

Latent = Callable[[Tensor, Sequence[Sequence[int]]], Tensor]
"""States (G, d) at the last tokens of G contexts, and the contexts' tokens, to z (G, d)."""


class ContextLatent:
    """z of each context under the prior. In mode `sample` each context has one draw of its own."""

    def __init__(self, prior: InferencePrior, mode: PriorMode | None, seed: int) -> None:
        """Keep the settings.

        Args:
            prior: The prior, on the policy's device.
            mode: How z is taken from it; None: its own setting.
            seed: Together with a context's tokens, the seed of its draw.

        Raises:
            ConfigError: The prior has no such mode.
        """
        self.prior, self.seed = prior, seed
        self.mode = prior.settings["prior_mode"] if mode is None else mode
        try:  # now, and not after the benchmarks have been loaded
            self(torch.zeros(1, prior.width, device=next(prior.parameters()).device), [()])
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @property
    def draws(self) -> bool:
        """Whether z is random."""
        return self.mode == "sample"

    @torch.no_grad()
    def __call__(self, states: Tensor, contexts: Sequence[Sequence[int]]) -> Tensor:
        """States (G, d) at the last tokens of `contexts` to z (G, d). The caller's random state stays as it is."""
        if not self.draws:
            return self.prior(states, self.mode)
        device = states.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            return torch.cat(
                [self._drawn(state[None], context) for state, context in zip(states, contexts, strict=True)]
            )

    def _drawn(self, state: Tensor, context: Sequence[int]) -> Tensor:
        torch.manual_seed(derive(self.seed, *context))
        return self.prior(state, self.mode)
