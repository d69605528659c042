"""SimPO, which has no reference."""

from __future__ import annotations

from typing import Any

from lpc_lightning.algorithms.base import PreferenceModule
from lpc_lightning.losses import simpo_loss
from lpc_lightning.types import PairLogps, PairLosses


class SimPO(PreferenceModule):
    """Simple Preference Optimization (arXiv 2405.14734), without a reference: see `simpo_loss`."""

    needs_reference = False

    def __init__(self, beta: float = 2.0, gamma_beta_ratio: float = 0.5, **module: Any) -> None:
        """Keep the settings.

        Args:
            beta: Scale of the length-averaged log-probabilities.
            gamma_beta_ratio: Target margin gamma, divided by beta.
            module: Settings of `PreferenceModule`.

        Raises:
            ValueError: A setting is out of range.
        """
        super().__init__(reference="live", reference_path=None, **module)  # not settings of SimPO; none is built
        self.beta, self.gamma_beta_ratio = beta, gamma_beta_ratio
        self.check_settings()

    def preference_loss(self, logps: PairLogps) -> PairLosses:
        """Compute `simpo_loss`."""
        return simpo_loss(logps, self.beta, self.gamma_beta_ratio)
