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
    """Standard error of the gain. Pairs of one prompt are not independent. None for a single prompt.

    If pairs were held out without regard to prompts, it is over different pairs: copies of a pair are not independent.
    """
    needed: float | None
    """Gain that is needed: the quantile of Student's t times the standard error."""
    pairs: int
    """Number of deciding pairs."""
    prompts: int
    """Number of their prompts."""
    different_pairs: int | None = None
    """Number of different pairs among them, if pairs were held out without regard to prompts."""

    def __str__(self) -> str:
        of = f"{self.prompts} prompts" if self.different_pairs is None else f"{self.different_pairs} different pairs"
        found = f"{self.pairs} held-out pairs of {of} are likelier by {self.gain:.4f} nats a pair"
        if self.standard_error is None or self.needed is None:
            single = "prompt" if self.different_pairs is None else "pair"
            return f"kept the plain start, because a single {single} cannot decide ({found})."
        found += f" (standard error {self.standard_error:.4f}, needed {self.needed:.4f})"
        return f"kept the fitted codes: {found}." if self.installed else f"kept the plain start: {found}."

    def record(self) -> dict[str, Any]:
        """Return the decision as JSON values, with its reason as text."""
        return {**asdict(self), "reason": str(self)}


def decide(
    space: LatentSpace,
    pairs: LinearizedPairs,
    prompts: Sequence[Hashable],
    pairs_per_annotator: int | None = None,
    contents: Sequence[Hashable] | None = None,
) -> Decision:
    """Test a fitted space on pairs that nothing else has read.

    Args:
        space: The fitted space.
        pairs: The deciding pairs.
        prompts: (N,) prompts of the pairs.
        pairs_per_annotator: See `fit`.
        contents: (N,) contents of the pairs, if they were held out without regard to prompts. None: whole prompts.
    """
    gains = likelihood_gains(space, pairs, pairs_per_annotator).double().cpu().numpy()
    clusters = prompts if contents is None else contents
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    counts = len(gains), len(set(prompts)), None if contents is None else len(numbers)
    gain, owners = float(gains.mean()), [numbers[cluster] for cluster in clusters]
    error = standard_error(gains, owners)
    if error is None:
        return Decision(False, gain, None, None, *counts)
    needed = float(stats.t.ppf(1 - SIGNIFICANCE, degrees_of_freedom(shares(owners).values()))) * error
    return Decision(gain > needed, gain, error, needed, *counts)


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
