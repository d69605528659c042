"""The algorithms: LightningModules that share one base class and one latent mixin."""

from lpc_lightning.algorithms.base import PreferenceModule
from lpc_lightning.algorithms.dpo import DPO
from lpc_lightning.algorithms.ipo import IPO
from lpc_lightning.algorithms.kto import KTO
from lpc_lightning.algorithms.orpo import ORPO
from lpc_lightning.algorithms.simpo import SimPO
from lpc_lightning.distributed.sharded_strategy import FSDP2Strategy

__all__ = ["DPO", "IPO", "KTO", "ORPO", "FSDP2Strategy", "PreferenceModule", "SimPO"]
