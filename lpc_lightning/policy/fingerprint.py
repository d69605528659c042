"""A name for what a policy answers: its weights, to the last bit, and its config."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import torch
from peft import PeftModel
from torch import Tensor

from lpc_lightning.policy.causal import CausalPolicy

UNTOLD = ("_name_or_path", "architectures", "transformers_version")
"""Config fields that say where a model comes from and not what it answers."""


def fingerprint(policy: CausalPolicy, adapter: bool = False) -> str:
    """Name a policy, in about a second a gigabyte and processor.

    Args:
        policy: Whole, on any device.
        adapter: Whether an adapter's weights count. Without them it is the policy as published.

    Returns:
        64 hexadecimal digits, equal for equal weights in one type under one config, wherever they were loaded from.
    """
    model = policy.causal_lm
    adapted = isinstance(policy.model, PeftModel) and not adapter  # which trains the adapter and nothing else
    tensors: list[Tensor] = [parameter for parameter in model.parameters() if not (adapted and parameter.requires_grad)]
    tensors += list(model.buffers())
    config = {name: value for name, value in model.config.to_dict().items() if name not in UNTOLD}
    told = [type(model).__name__, json.dumps(config, sort_keys=True, default=str)]
    with ThreadPoolExecutor() as threads:  # hashing lets other threads run
        digests = threads.map(_digest, tensors)
    return hashlib.sha256("\n".join([*told, *digests]).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{content.dtype} {tuple(content.shape)}".encode())
    digest.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
