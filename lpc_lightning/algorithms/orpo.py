"""ORPO, which has no reference."""

from __future__ import annotations

from typing import Any

from lpc_lightning.algorithms.base import PreferenceModule
from lpc_lightning.losses import orpo_loss
from lpc_lightning.types import PairLogps, PairLosses


class ORPO(PreferenceModule):
    """Odds Ratio Preference Optimization (arXiv 2403.07691), without a reference: see `orpo_loss`."""

    needs_reference = False

    def __init__(self, beta: float = 0.1, **module: Any) -> None:
        """Keep the settings.

        Args:
            beta: Weight of the odds ratio beside the SFT term, the paper's lambda.
            module: Settings of `PreferenceModule`.

        Raises:
            ValueError: A setting is out of range.
        """
        # Not settings of ORPO: no reference is built, and the loss has an SFT term.
        super().__init__(reference="live", reference_path=None, nll_weight=0.0, **module)
        self.beta = beta
        self.check_settings()

    def preference_loss(self, logps: PairLogps) -> PairLosses:
        """Compute `orpo_loss`."""
        return orpo_loss(logps, self.beta)
