"""Decision whether a fitted latent space replaces the plain start.

Scale and epoch are selected on held-out pairs. On pure noise the best of many candidates still seems better than no
latent there. So pairs that neither the fit nor the selection has read decide.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from lpc_lightning.algorithms.warm_start.fit import batches_of
from lpc_lightning.algorithms.warm_start.linearized_policy import LinearizedPairs
from lpc_lightning.clustered_means import degrees_of_freedom, shares, standard_error
from lpc_lightning.latent import LatentSpace

SIGNIFICANCE = 0.05
"""Largest probability of keeping a space that is no better. It is 1.645 standard errors for many prompts."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A one-sided t-test of whether the fitted space makes the deciding labels likelier than the plain policy."""

    installed: bool
    """True if the fitted space is used, False if the latent space stays as it was."""
    gain: float
    """Mean log-likelihood of a label under the fitted space minus that without a latent, in nats."""
    standard_error: float | None
    """Standard error of the gain. Pairs of one prompt are not independent. None for a single prompt."""
    needed: float | None
    """Gain that is needed: the quantile of Student's t times the standard error."""
    pairs: int
    """Number of deciding pairs."""
    prompts: int
    """Number of their prompts."""

    def __str__(self) -> str:
        found = f"{self.pairs} held-out pairs of {self.prompts} prompts are likelier by {self.gain:.4f} nats a pair"
        if self.standard_error is None or self.needed is None:
            return f"kept the plain start, because a single prompt cannot decide ({found})."
        found += f" (standard error {self.standard_error:.4f}, needed {self.needed:.4f})"
        return f"kept the fitted codes: {found}." if self.installed else f"kept the plain start: {found}."

    def record(self) -> dict[str, Any]:
        """Return the decision as JSON values, with its reason as text."""
        return {**asdict(self), "reason": str(self)}


def decide(
    space: LatentSpace, pairs: LinearizedPairs, prompts: Sequence[Hashable], pairs_per_annotator: int | None = None
) -> Decision:
    """Test a fitted space on pairs that nothing else has read.

    Args:
        space: The fitted space.
        pairs: The deciding pairs.
        prompts: (N,) prompts of the pairs.
        pairs_per_annotator: See `fit`.
    """
    gains = likelihood_gains(space, pairs, pairs_per_annotator).double().cpu().numpy()
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    count, gain = len(numbers), float(gains.mean())
    if count < 2:
        return Decision(False, gain, None, None, len(gains), count)
    owners = [numbers[prompt] for prompt in prompts]
    error = standard_error(gains, owners)
    assert error is not None
    needed = float(stats.t.ppf(1 - SIGNIFICANCE, degrees_of_freedom(shares(owners).values()))) * error
    return Decision(gain > needed, gain, error, needed, len(gains), count)


@torch.no_grad()
def likelihood_gains(space: LatentSpace, pairs: LinearizedPairs, pairs_per_annotator: int | None = None) -> Tensor:
    """Compute (N,) log-likelihoods of the labels under the space minus those without a latent, in nats.

    With a codebook, this is the exact evidence of the label, given the annotator's earlier pairs of the batch if the
    space pools them. Without codes, z is that of inference.
    """
    space.eval()
    gains = pairs.plain.new_zeros(len(pairs))
    for indices in batches_of(pairs.annotators, pairs_per_annotator, torch.arange(len(pairs))):
        states, score = pairs.select(indices)
        likelihood = space.label_log_likelihood(states, score)
        gains[indices.to(gains.device)] = likelihood - score.under(None)[0].label_log_likelihood
    return gains
