"""The latent of a context, inferred from that context only. Batching and order do not change it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lpc_lightning.errors import ConfigError
from lpc_lightning.inference.modeling_lpc import InferencePrior
from lpc_lightning.latent import PriorMode
from lpc_lightning.seeding import derive, seed_draws

Latent = Callable[[Tensor, Sequence[Sequence[int]]], Tensor]
"""Function from states (G, d) at the last tokens of G contexts, and the contexts' tokens, to z (G, d)."""


class ContextLatent:
    """z of each context under the prior. In mode `sample`, each context has its own draw."""

    def __init__(self, prior: InferencePrior, mode: PriorMode | None, seed: int) -> None:
        """Store the settings.

        Args:
            prior: The prior, on the policy's device.
            mode: How z is computed from the prior. None: the prior's own setting.
            seed: Base seed. The seed of a draw is derived from it and from the context's tokens.

        Raises:
            ConfigError: The prior does not have this mode.
        """
        self.prior, self.seed = prior, seed
        self.mode = prior.settings["prior_mode"] if mode is None else mode
        try:  # check the mode now, before the benchmarks are loaded
            self(torch.zeros(1, prior.width, device=next(prior.parameters()).device), [()])
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @property
    def is_random(self) -> bool:
        """True if z is sampled."""
        return self.mode == "sample"

    @torch.no_grad()
    def __call__(self, states: Tensor, contexts: Sequence[Sequence[object]]) -> Tensor:
        """Compute z without changing the caller's random state.

        Args:
            states: (G, d) states at the last tokens of the contexts.
            contexts: Tokens of the G contexts, or anything else that identifies each.

        Returns:
            (G, d) z of each context.
        """
        if not self.is_random:
            return self.prior(states, self.mode)
        device = states.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            return torch.cat(
                [self._sample(state[None], context) for state, context in zip(states, contexts, strict=True)]
            )

    def _sample(self, state: Tensor, context: Sequence[object]) -> Tensor:
        seed_draws(derive(self.seed, *context), state.device)
        return self.prior(state, self.mode)
