"""Shard a module, and check that a strategy supports it."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from lpc_lightning.errors import ConfigError
from lpc_lightning.policy import CausalPolicy

STEPS = ("training_step", "validation_step", "test_step", "predict_step", "reference_step", "scoring_step")


def policies_of(module: LightningModule) -> list[CausalPolicy]:
    """Return the models in a module: the policy, and the reference if it is a model of its own."""
    return [child for child in module.modules() if isinstance(child, CausalPolicy)]


def shard(module: LightningModule, mesh: DeviceMesh) -> None:
    """Shard a module's parameters (FSDP2) over the devices of `mesh`, decoder layer by decoder layer.

    Parameters outside the layers (embedding, LM head, latent space) are gathered for a whole step, because the head and
    the codebook are used outside any `forward`.

    Args:
        module: The module with its policies built.
        mesh: One-dimensional mesh of the data-parallel devices.
    """
    for policy in policies_of(module):
        for layer in policy.layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for step in STEPS:
        register_fsdp_forward_method(module, step)


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that release weights which are used outside any `forward`.

    Raises:
        ConfigError: The strategy is DeepSpeed with ZeRO stage 3.
    """
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        raise ConfigError(
            "trainer.strategy: found DeepSpeed with stage 3, which gathers sharded weights only in the `forward` of "
            "their own layer. The LM head and the codebook are used outside it. Expected stage 1 or 2, or fsdp2, which "
            "shards the weights too."
        )


def check_frozen_states(gib: float, strategy: Strategy) -> None:
    """Refuse to keep states of frozen layers where they cannot be looked up.

    Args:
        gib: `policy.frozen_states_gib`.
        strategy: Strategy of a fit.

    Raises:
        ConfigError: The weights are sharded, or the device is no CPU.
    """
    device = strategy.root_device.type
    if gib and (keeps_weights_elsewhere(strategy) or device != "cpu"):
        raise ConfigError(
            f"policy.frozen_states_gib: found {gib:g} with {type(strategy).__name__} on {device}, expected 0. States "
            "are kept on a CPU alone, with all weights on each process (trainer.strategy auto or ddp)."
        )


def keeps_weights_elsewhere(strategy: Strategy) -> bool:
    """Return whether weights cannot be set in place: they are sharded, or the optimizer overwrites them from a copy."""
    return isinstance(strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy))


def set_micro_batch_size(strategy: Strategy) -> None:
    """Set the batch size that DeepSpeed uses in its log of samples per second, and nowhere else.

    Without it Lightning reads the training loader, at a time when there is no policy to lay batches out for. 1 is its
    default for a loader without a batch size.
    """
    if isinstance(strategy, DeepSpeedStrategy):
        strategy.config.setdefault("train_micro_batch_size_per_gpu", 1)  # type: ignore[union-attr]  # a dictionary


def reshard(module: object) -> None:
    """Release weights gathered by a step without gradient. They would outlive weights from a checkpoint."""
    if isinstance(module, FSDPModule):
        module.reshard()
