"""DPO."""

from __future__ import annotations

from typing import Any

from lpc_lightning.algorithms.base import PreferenceModule
from lpc_lightning.losses import dpo_loss
from lpc_lightning.types import PairLogps, PairLosses


class DPO(PreferenceModule):
    """Direct Preference Optimization (arXiv 2305.18290): see `dpo_loss`."""

    def __init__(self, beta: float = 0.1, **module: Any) -> None:
        """Keep the settings.

        Args:
            beta: Scale of the log-ratios, per nat. A larger beta keeps the policy nearer to the reference. Rounding in
                bf16 changes the margin of long answers by about a nat, so use trainer.precision 32-true if beta is
                near 1.
            module: Settings of `PreferenceModule`.

        Raises:
            ValueError: A setting is out of range.
        """
        super().__init__(**module)
        self.beta = beta
        self.check_settings()

    def preference_loss(self, logps: PairLogps) -> PairLosses:
        """Compute `dpo_loss`."""
        return dpo_loss(logps, self.beta)
