"""Fingerprint of a policy: a hash of its weights and its config."""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from lpc_lightning.policy.causal import CausalPolicy
from lpc_lightning.policy.start_adapter import frozen_scales

IGNORED_FIELDS = ("_name_or_path", "architectures", "transformers_version")
"""Config fields that do not change the model's outputs."""


def policy_fingerprint(policy: CausalPolicy, adapter: bool = False) -> str:
    """Hash a policy. It takes about a second per gigabyte and processor.

    Args:
        policy: The policy, unsharded, on any device.
        adapter: True to include an adapter that changes outputs. Before training, no adapter of LoRA does. Without the
            adapter, the hash is that of the published policy.

    Returns:
        64 hexadecimal digits. They are equal for equal weights in one type with one config, from any source.
    """
    model = policy.causal_lm
    left_out = policy.has_adapter and not (adapter and _changes_outputs(model))
    # If there is an adapter, only its parameters require gradients.
    tensors: list[Tensor] = [each for each in model.parameters() if not (left_out and each.requires_grad)]
    tensors += [*model.buffers(), *_other_state(model)]
    config = {name: value for name, value in model.config.to_dict().items() if name not in IGNORED_FIELDS}
    header = [type(model).__name__, json.dumps(config, sort_keys=True, default=str), *frozen_scales(model)]
    with ThreadPoolExecutor() as threads:  # hashing releases the interpreter lock
        digests = threads.map(_digest, tensors)
    return hashlib.sha256("\n".join([*header, *digests]).encode()).hexdigest()


def _changes_outputs(model: nn.Module) -> bool:
    """Return whether a model's trained adapter may change outputs: False if all second factors of LoRA are zero."""
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    second = [each for name, each in trained.items() if re.search(r"\.lora_(embedding_)?B\b", name)]
    first = [each for name, each in trained.items() if re.search(r"\.lora_(embedding_)?A\b", name)]
    return len(first) + len(second) < len(trained) or any(bool(each.any()) for each in second)


def _other_state(model: nn.Module) -> list[Tensor]:
    """Return the tensors of the state that are neither parameters nor buffers: the scales of quantized weights."""
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return [value for name, value in model.state_dict().items() if name not in known and isinstance(value, Tensor)]


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{content.dtype} {tuple(content.shape)}".encode())
    digest.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
