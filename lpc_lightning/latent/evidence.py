"""Distribution over the codes given the annotator's earlier pairs in a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lpc_lightning.transfer import to_device


def earlier_pairs(annotators: Sequence[str], device: torch.device) -> Tensor:
    """Return a (B, B) bool mask: True at (i, j) if pair j precedes pair i and both have the same annotator.

    Pairs with the annotator "" have no earlier pairs.
    """
    keys = [name or row for row, name in enumerate(annotators)]
    numbers = to_device([keys.index(key) for key in keys], device, torch.long)
    return (numbers[:, None] == numbers).tril(-1)


def given_earlier_pairs(log_prior: Tensor, log_likelihoods: Tensor, annotators: Sequence[str]) -> Tensor:
    """Compute log p(k given x_i and the pairs j < i of the same annotator).

    The probability is p_k(x_i) prod_j exp(-l_jk), normalised over the codes.

    Args:
        log_prior: (B, K) log p_k(x_i).
        log_likelihoods: (B, K) -l_ik, the log-likelihood of each label under each code
            (`PairLosses.label_log_likelihood`).
        annotators: Annotator of each pair. Empty if no annotator is known.

    Returns:
        (B, K). For a pair without earlier pairs this is exactly the prior. Gradient flows through the log-likelihoods
        as well.
    """
    if not any(annotators):
        return log_prior
    earlier = earlier_pairs(annotators, log_likelihoods.device)
    # Autocast and TF32 round matrix products, so this is a sum.
    total = torch.where(earlier[:, :, None], log_likelihoods, 0.0).sum(1)
    return torch.where(earlier.any(-1, keepdim=True), (log_prior + total).log_softmax(-1), log_prior)
