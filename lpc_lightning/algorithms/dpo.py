"""DPO, with cDPO's label smoothing and rDPO's unbiased loss."""

from __future__ import annotations

from typing import Any

from lpc_lightning.algorithms.base import PreferenceModule
from lpc_lightning.errors import ConfigError
from lpc_lightning.losses import dpo_loss
from lpc_lightning.types import PairLogps, PairLosses


class DPO(PreferenceModule):
    """Direct Preference Optimization (arXiv 2305.18290): see `dpo_loss`."""

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0, robust: bool = False, **module: Any) -> None:
        """Keep the settings.

        Args:
            beta: Scale of the log-ratios, per nat. A larger beta keeps the policy nearer to the reference. Rounding in
                bf16 changes the margin of long answers by about a nat, so use trainer.precision 32-true if beta is
                near 1.
            label_smoothing: Assumed share of flipped labels, 0 to 0.5 (cDPO).
            robust: Use the unbiased loss of rDPO instead of cDPO's. Needs label_smoothing below 0.5.
            module: Settings of `PreferenceModule`.

        Raises:
            ValueError: A setting is out of range.
            ConfigError: `label_smoothing` is set together with `robust_loss`.
        """
        super().__init__(**module)
        if label_smoothing and self.robust_loss is not None:
            raise ConfigError(
                f"model.label_smoothing: found {label_smoothing} together with model.robust_loss, expected only one of "
                "them. ConservativeLoss and UnbiasedLoss are label smoothing and the unbiased loss."
            )
        self.beta, self.label_smoothing, self.robust = beta, label_smoothing, robust
        self.check_settings()

    def preference_loss(self, logps: PairLogps) -> PairLosses:
        """Compute `dpo_loss`."""
        return dpo_loss(logps, self.beta, self.label_smoothing, self.robust)
