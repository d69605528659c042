"""Preference losses: pure functions from `PairLogps` to `PairLosses`."""

from lpc_lightning.losses.dpo import dpo_loss
from lpc_lightning.losses.ipo import ipo_loss
from lpc_lightning.losses.simpo import simpo_loss

__all__ = ["dpo_loss", "ipo_loss", "simpo_loss"]
