"""Fully sharded data parallelism (FSDP2), for policies too large for one device."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from lpc_lightning.policy import CausalPolicy

STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def shard(module: LightningModule, mesh: DeviceMesh) -> None:
    """Shard a module's parameters over the devices of `mesh`, decoder layer by decoder layer.

    What lies outside the layers (embedding, LM head, latent space) is gathered for the whole of a step, since the head
    and the codebook are read outside any `forward`.

    Args:
        module: The module, its policies built.
        mesh: One dimension: the devices that share the data.
    """
    for policy in (child for child in module.modules() if isinstance(child, CausalPolicy)):
        kinds = set(policy.causal_lm._no_split_modules or ())
        for layer in [child for child in policy.modules() if type(child).__name__ in kinds]:
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for step in STEPS:
        register_fsdp_forward_method(module, step)
