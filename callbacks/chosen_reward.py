"""Warning if the policy gives chosen answers less probability than the reference does."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.algorithms.base import is_optimizer_step
from lpc_lightning.errors import ConfigError

METRIC = "train/rewards/chosen"


class ChosenRewardWarning(Callback):
    """Callback that warns, once in a run, if `train/rewards/chosen` stays below zero.

    Preference losses depend on the difference between two answers. They often make both answers less likely than under
    the reference (Pal et al., 2024, arXiv 2402.13228). `model.nll_weight` counters this. Algorithms without a reference
    are not checked.
    """

    def __init__(self, patience: int = 10) -> None:
        """Start without logged steps.

        Args:
            patience: Number of consecutive logged steps below zero that cause the warning. Steps are logged every
                trainer.log_every_n_steps.

        Raises:
            ConfigError: `patience` is less than 1.
        """
        if patience < 1:
            raise ConfigError(f"ChosenRewardWarning.patience: found {patience}, expected at least 1 logged step.")
        self.patience = patience
        self.below = 0
        """Consecutive logged steps below zero. After the warning it stays at `patience`."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step if it is logged, at its last micro-batch, which logs the metric."""
        is_checked = isinstance(pl_module, PreferenceModule) and pl_module.needs_reference
        if self.below == self.patience or not (
            is_checked and outputs["logged"] and is_optimizer_step(trainer, batch_idx)
        ):
            return
        reward = float(trainer.callback_metrics[METRIC])
        self.below = self.below + 1 if reward < 0 else 0
        if self.below == self.patience:
            rank_zero_warn(
                f"{METRIC}: found {reward:.3f}, below 0 in the last {self.patience} logged steps. The policy "
                "gives chosen answers less probability than the reference does. This is common, and accuracy may still "
                "rise. If you generate from this policy, compare its answers with the reference's, or set "
                "model.nll_weight (1.0 in RPO)."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the count, so that a resumed run does not warn again."""
        return {"below": self.below}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the count."""
        self.below = state_dict["below"]
