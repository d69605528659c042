"""Align language models on preference pairs with Latent Preference Coding (Gong et al., ICML 2025)."""

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lpc_lightning.algorithms import DPO, IPO, KTO, ORPO, PreferenceModule, SimPO
    from lpc_lightning.data import (
        MixtureSource,
        PreferenceData,
        PreferenceDataModule,
        PreferenceMixture,
        SyntheticPreferences,
    )
    from lpc_lightning.inference import TrainedPolicy
    from lpc_lightning.latent import ExpectedSpace, GumbelSpace, LatentSpace, MarginalSpace
    from lpc_lightning.policy import LoRA, PretrainedPolicy, TinyPolicy

__all__ = [
    "DPO",
    "IPO",
    "KTO",
    "ORPO",
    "ExpectedSpace",
    "GumbelSpace",
    "LatentSpace",
    "LoRA",
    "MarginalSpace",
    "MixtureSource",
    "PreferenceData",
    "PreferenceDataModule",
    "PreferenceMixture",
    "PreferenceModule",
    "PretrainedPolicy",
    "SimPO",
    "SyntheticPreferences",
    "TinyPolicy",
    "TrainedPolicy",
]

# The threads of GNU OpenMP spin at each barrier, by default so long that one busy process beside a fit makes it many
# times slower. A shorter spin costs more time on an idle machine (benchmarks/neighbour.py). The library reads
# this variable when it is loaded with torch, so nothing imports torch before. Child processes inherit it. The OpenMP of
# Intel and LLVM yields the processor while it spins and keeps its default: with a short KMP_BLOCKTIME even steps
# without a neighbour are slower there.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "1500"

# transformers and peft import bitsandbytes if it is installed. On some processors it then warns that a CPU kernel for
# 4-bit weights is missing, which matters only with a GPU. The filter must be set before those imports.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
)


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `import lpc_lightning.losses` must not import transformers."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for package in ("algorithms", "data", "latent", "policy", "inference"):
        module = import_module(f"{__name__}.{package}")
        if name in module.__all__:
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
