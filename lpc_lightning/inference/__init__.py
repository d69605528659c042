"""Use of a trained policy: open it, generate answers under its latent, export it."""

from lpc_lightning.inference.modeling_lpc import InferencePrior, LatentLogitsProcessor, latent_causal_lm
from lpc_lightning.inference.opening import OpenedPolicy, inference_prior, open_module, open_policy

__all__ = [
    "InferencePrior",
    "LatentLogitsProcessor",
    "OpenedPolicy",
    "inference_prior",
    "latent_causal_lm",
    "open_module",
    "open_policy",
]
