"""IPO, with the sum or the mean over tokens."""

from __future__ import annotations

from typing import Any

from lpc_lightning.algorithms.base import PreferenceModule
from lpc_lightning.losses import ipo_loss
from lpc_lightning.types import PairLogps, PairLosses


class IPO(PreferenceModule):
    """Identity Preference Optimization (arXiv 2310.12036): see `ipo_loss`."""

    def __init__(self, beta: float = 0.1, length_average: bool = False, **module: Any) -> None:
        """Keep the settings.

        Args:
            beta: The paper's tau. The target margin is 1 / (2 beta) nats.
            length_average: Divide each answer's log-ratio by its number of tokens first, as TRL does.
            module: Settings of `PreferenceModule`.

        Raises:
            ValueError: A setting is out of range.
        """
        super().__init__(**module)
        self.beta, self.length_average = beta, length_average
        self.check_settings()

    def preference_loss(self, logps: PairLogps) -> PairLosses:
        """Compute `ipo_loss`."""
        return ipo_loss(logps, self.beta, self.length_average)
