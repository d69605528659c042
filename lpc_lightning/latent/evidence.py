"""What an annotator's earlier pairs say about the codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lpc_lightning.transfer import to_device


def earlier_pairs(annotators: Sequence[str], device: torch.device) -> Tensor:
    """(B, B) bool: pair j stands before pair i, and the same annotator labelled both. `""` is nobody's name."""
    keys = [name or row for row, name in enumerate(annotators)]
    who = to_device([keys.index(key) for key in keys], device, torch.long)
    return (who[:, None] == who).tril(-1)


def given_earlier_pairs(log_prior: Tensor, evidence: Tensor, annotators: Sequence[str]) -> Tensor:
    """log p(k given x_i and the pairs j < i of the same annotator), which is p_k(x_i) prod_j exp(-l_jk), normalised.

    Args:
        log_prior: (B, K) log p_k(x_i).
        evidence: (B, K) -l_ik, what each pair says of each code (`PairLosses.label_log_likelihood`).
        annotators: Who labelled each pair; empty where nobody is known.

    Returns:
        (B, K). The prior, to the last bit, where there is no such pair. Gradient flows through the evidence as well.
    """
    if not any(annotators):
        return log_prior
    earlier = earlier_pairs(annotators, evidence.device)
    # A sum, and not a product of matrices, which autocast or TF32 would round.
    said = torch.where(earlier[:, :, None], evidence, 0.0).sum(1)
    return torch.where(earlier.any(-1, keepdim=True), (log_prior + said).log_softmax(-1), log_prior)
