"""The algorithms, as LightningModules over one base and one latent mixin."""

from lpc_lightning.modules.dpo import DPO
from lpc_lightning.modules.ipo import IPO
from lpc_lightning.modules.preference import PreferenceModule
from lpc_lightning.modules.sharded_strategy import FSDP2Strategy
from lpc_lightning.modules.simpo import SimPO

__all__ = ["DPO", "IPO", "FSDP2Strategy", "PreferenceModule", "SimPO"]
