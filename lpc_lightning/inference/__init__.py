"""Use of a trained policy: open it, generate answers under its latent, export it."""

from lpc_lightning.inference.modeling_lpc import InferencePrior, LatentLogitsProcessor, latent_causal_lm
from lpc_lightning.inference.opening import OpenedPolicy, inference_prior, open_module, open_policy
from lpc_lightning.inference.trained_policy import TrainedPolicy

__all__ = [
    "InferencePrior",
    "LatentLogitsProcessor",
    "OpenedPolicy",
    "TrainedPolicy",
    "inference_prior",
    "latent_causal_lm",
    "open_module",
    "open_policy",
]
