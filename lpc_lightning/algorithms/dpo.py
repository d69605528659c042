"""DPO, with cDPO's label smoothing and rDPO's unbiased loss."""

from __future__ import annotations

from typing import Any

from lpc_lightning.algorithms.base import PreferenceModule
from lpc_lightning.losses import dpo_loss
from lpc_lightning.types import PairLogps, PairLosses


class DPO(PreferenceModule):
    """Direct Preference Optimization (arXiv 2305.18290): see `dpo_loss`."""

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0, robust: bool = False, **module: Any) -> None:
        """Keep the settings.

        Args:
            beta: Strength of the pull towards the reference, per nat. Rounding in bf16 puts the margin of long answers
                off by about a nat: with beta near 1, trainer.precision 32-true.
            label_smoothing: Share of labels believed to be flipped, 0 to 0.5 (cDPO).
            robust: With label_smoothing below 0.5, the unbiased loss of rDPO in place of cDPO's.
            module: Settings of `PreferenceModule`.

        Raises:
            ValueError: A setting is out of range.
        """
        super().__init__(**module)
        self.beta, self.label_smoothing, self.robust = beta, label_smoothing, robust
        self.check_settings()

    def preference_loss(self, logps: PairLogps) -> PairLosses:
        """See `dpo_loss`."""
        return dpo_loss(logps, self.beta, self.label_smoothing, self.robust)
