"""A trial of torch's tracer on a policy's layers, before a run depends on their compilation."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lpc_lightning.errors import one_line
from lpc_lightning.policy.block_sparse import uncompiled_attention
from lpc_lightning.policy.checks import packed_row
from lpc_lightning.policy.compiled_layers import CompiledLayers
from lpc_lightning.policy.masks import SPARSE
from lpc_lightning.policy.memory_efficient_layers import restore_published
from lpc_lightning.policy.segment_attention import SEGMENT
from lpc_lightning.seeding import own_random_state

if TYPE_CHECKING:
    from lpc_lightning.policy.causal import CausalPolicy

LONGEST = 300
"""Characters of a quoted error."""


def fault_of_compilation(policy: CausalPolicy) -> str | None:
    """Return why torch cannot make whole programs of the decoder layers, in one line, or None.

    A copy of one layer of each structure is traced on a few packed tokens, in seconds. Kernels are not made, so that
    one that torch cannot make is not found.

    Args:
        policy: A policy that takes packed rows, with its weights.
    """
    with own_random_state(policy.model.device):
        for layer, args, options in _calls(policy):
            try:
                trial = deepcopy(layer)
                restore_published([trial])
                states = args[0] if args else options["hidden_states"]
                CompiledLayers([trial], few_shapes=True, backend="eager").runs(states.shape[:2], planned=True)
                # On a CPU, where FSDP2 builds a policy, torch refuses gradients of flex_attention.
                with torch.set_grad_enabled(states.is_cuda):
                    trial(*args, **options)
            except Exception as error:  # of the tracer, or of code that it runs on tensors without values
                return f"{type(error).__name__}: {one_line(error)[:LONGEST]}"
    return None


def _calls(policy: CausalPolicy) -> list[tuple[nn.Module, Any, Any]]:
    """Run a few packed tokens, and return the call of one layer of each structure."""
    calls: dict[Any, tuple[nn.Module, Any, Any]] = {}

    def keep(layer: nn.Module, args: Any, options: Any) -> None:
        structure = tuple((name, type(part)) for name, part in layer.named_modules())
        calls.setdefault(structure, (layer, args, options))

    kernel = policy.backbone.config._attn_implementation
    if kernel == SEGMENT:  # what it is in compiled layers on a GPU
        kernel = SPARSE if policy.takes_sparse_mask else "sdpa"
    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in policy.layers]
    try:
        with torch.no_grad(), uncompiled_attention():
            policy.states(*packed_row(policy), kernel)
    finally:
        for hook in hooks:
            hook.remove()
    return list(calls.values())
