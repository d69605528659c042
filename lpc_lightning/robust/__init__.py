"""Preference losses that tolerate wrong labels, made from the loss of any algorithm."""

from lpc_lightning.robust.base import RobustLoss
from lpc_lightning.robust.dr_dpo import DrDPO
from lpc_lightning.robust.holder_dpo import HolderDPO
from lpc_lightning.robust.re_po import REPO
from lpc_lightning.robust.smoothing import ConservativeLoss, UnbiasedLoss

__all__ = ["REPO", "ConservativeLoss", "DrDPO", "HolderDPO", "RobustLoss", "UnbiasedLoss"]
