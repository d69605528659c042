"""What a step of a module returns."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

from lpc_lightning.algorithms.latent_mixin import BatchScorer
from lpc_lightning.latent import LatentTerms
from lpc_lightning.types import PairStates


class TrainingOutput(TypedDict):
    """Output of a training step, for the trainer and for callbacks."""

    loss: Tensor
    """Value to minimize, with gradient."""
    losses: Tensor
    """(B,) loss of each pair plus the latent's penalty, without its weight and without gradient."""
    margins: Tensor
    """(B,) reward margins, without gradient."""
    logged: bool
    """True if this step is logged (see `is_logged`)."""


class EvaluationOutput(TypedDict):
    """Output of a validation or test step, for callbacks. They can score other z without another backbone pass."""

    terms: LatentTerms
    """Losses, rewards and log-probabilities under the prior."""
    states: PairStates
    """Hidden states h_x, h_w and h_l."""
    score: BatchScorer
    """Losses, rewards and log-probabilities under any other z."""
