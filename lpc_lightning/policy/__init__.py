"""Policies: from a spec to a causal language model that yields hidden states and a head."""

from lpc_lightning.policy.causal import CausalPolicy
from lpc_lightning.policy.fingerprint import fingerprint
from lpc_lightning.policy.head import UnsupportedPolicyError
from lpc_lightning.policy.lora import LoRA
from lpc_lightning.policy.pretrained import PretrainedPolicy
from lpc_lightning.policy.spec import PolicySpec
from lpc_lightning.policy.tiny import TinyPolicy

__all__ = [
    "CausalPolicy",
    "LoRA",
    "PolicySpec",
    "PretrainedPolicy",
    "TinyPolicy",
    "UnsupportedPolicyError",
    "fingerprint",
]
