"""What is done with a trained policy: open it, have it answer under its latent, export it."""

from lpc_lightning.inference.modeling_lpc import InferencePrior, LatentLogitsProcessor, latent_causal_lm
from lpc_lightning.inference.opening import OpenedPolicy, open_module, open_policy
from lpc_lightning.inference.prior import inference_prior

__all__ = [
    "InferencePrior",
    "LatentLogitsProcessor",
    "OpenedPolicy",
    "inference_prior",
    "latent_causal_lm",
    "open_module",
    "open_policy",
]
