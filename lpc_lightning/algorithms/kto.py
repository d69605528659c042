"""KTO, with a constant reference point."""

from __future__ import annotations

from typing import Any

from lpc_lightning.algorithms.base import PreferenceModule
from lpc_lightning.losses import kto_loss
from lpc_lightning.types import PairLogps, PairLosses


class KTO(PreferenceModule):
    """Kahneman-Tversky Optimization (arXiv 2402.01306) of pairs, each answer judged alone: see `kto_loss`."""

    def __init__(
        self,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        reference_point: float = 0.0,
        **module: Any,
    ) -> None:
        """Keep the settings.

        Args:
            beta: Scale of the log-ratios, per nat. A larger beta saturates the loss earlier.
            desirable_weight: Weight of chosen answers, the paper's lambda_D.
            undesirable_weight: Weight of rejected answers, the paper's lambda_U.
            reference_point: z0 in nats, a constant. 0 is APO-zero (TRL's apo_zero_unpaired). The paper estimates the KL
                between policy and reference at every step.
            module: Settings of `PreferenceModule`.

        Raises:
            ValueError: A setting is out of range.
        """
        super().__init__(**module)
        self.beta, self.reference_point = beta, reference_point
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight
        self.check_settings()

    def preference_loss(self, logps: PairLogps) -> PairLosses:
        """Compute `kto_loss`."""
        return kto_loss(logps, self.beta, self.desirable_weight, self.undesirable_weight, self.reference_point)
