"""Which parts of a module lie on which device."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from lpc_lightning.errors import ConfigError
from lpc_lightning.policy import CausalPolicy

STEPS = ("training_step", "validation_step", "test_step", "predict_step", "reference_step")


def policies_of(module: LightningModule) -> list[CausalPolicy]:
    """The models in a module: the policy, and a reference where it has one of its own."""
    return [child for child in module.modules() if isinstance(child, CausalPolicy)]


def shard(module: LightningModule, mesh: DeviceMesh) -> None:
    """Shard a module's parameters (FSDP2) over the devices of `mesh`, decoder layer by decoder layer.

    What lies outside the layers (embedding, LM head, latent space) is gathered for the whole of a step, since the head
    and the codebook are read outside any `forward`.

    Args:
        module: The module, its policies built.
        mesh: One dimension: the devices that share the data.
    """
    for policy in policies_of(module):
        for layer in policy.layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for step in STEPS:
        register_fsdp_forward_method(module, step)


def check_strategy(strategy: Strategy) -> None:
    """Refuse what would take weights away that are read outside any `forward`.

    Raises:
        ConfigError: DeepSpeed with ZeRO stage 3.
    """
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        raise ConfigError(
            "trainer.strategy: found DeepSpeed with stage 3, which shares out the weights and brings them back for the "
            "`forward` of their own layer only; the LM head and the codebook are read outside it. Expected stage 1 or "
            "2, or fsdp2, which shares out the weights too."
        )


def keeps_weights_elsewhere(strategy: Strategy) -> bool:
    """Weights cannot be set in place: they are shared out, or the optimizer has a copy and writes it over them."""
    return isinstance(strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy))


def tell_micro_batch_size(strategy: Strategy) -> None:
    """Tell DeepSpeed the batch size of a device, which is used for its log of samples per second alone.

    Untold, Lightning would ask the training data, before there is a policy by which batches are laid out. 1 is what it
    takes of a loader that does not say.
    """
    if isinstance(strategy, DeepSpeedStrategy):
        strategy.config.setdefault("train_micro_batch_size_per_gpu", 1)  # type: ignore[union-attr]  # a dictionary


def reshard(module: object) -> None:
    """Give back what a step without gradient has gathered: it would outlive new weights that a checkpoint brings."""
    if isinstance(module, FSDPModule):
        module.reshard()
