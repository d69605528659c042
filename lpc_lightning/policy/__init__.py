"""Policies: settings, and the causal language models that they build."""

from lpc_lightning.policy.causal import CausalPolicy
from lpc_lightning.policy.fingerprint import policy_fingerprint
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
    "policy_fingerprint",
]
