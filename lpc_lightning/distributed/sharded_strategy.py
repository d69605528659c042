"""FSDP2 as a Lightning strategy, with checkpoints that any number of devices can resume."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint import load
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from lpc_lightning.distributed.checkpoint_check import check_on_all_devices
from lpc_lightning.distributed.sharded_checkpoint import (
    INDEX,
    OPTIMIZER,
    REST,
    WEIGHTS,
    SafePlanner,
    ShardReader,
    is_sharded,
    put_in_place,
    read_outline,
    shards_of,
)
from lpc_lightning.files.integrity import digests_of, write_digests

SHARDS = StateDictOptions(cpu_offload=True, ignore_frozen_params=True, strict=False)
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


class FSDP2Strategy(ModelParallelStrategy):
    """Strategy that shards weights, gradients and optimizer state over all devices of all nodes.

    It differs from Lightning's `ModelParallelStrategy` in three points. The module checks a checkpoint before its
    weights are read. Frozen weights are not expected in a checkpoint. Optimizer parameters are numbered in the order of
    the optimizer's groups, not in the order of the module. So a checkpoint written by any number of devices, in one
    file or in shards, can be resumed by any other number, with or without FSDP2.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        """Keep the settings.

        Args:
            save_distributed_checkpoint: True writes a folder with the shards of each device. False writes one file and
                gathers the whole state in the memory of the first process.
            process_group_backend: Communication backend, `nccl` or `gloo`. null chooses by the type of device.
            timeout: Longest wait of a device for the others.
        """
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend, timeout)

    def setup_environment(self) -> None:
        """Split the data over all devices of all nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: Lightning restores the optimizers through `load_optimizer_state_dict`, as on one device."""
        return True

    @property
    def _form(self) -> StateDictOptions:
        return SHARDS if self._save_distributed_checkpoint else WHOLE

    # Saving

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the device's shards of the trained weights, or all in the first process and none in others."""
        return get_model_state_dict(self._module, options=self._form)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state by parameter name (shards), or by number as on one device (whole, in the first process)."""
        optimizer = _bare(optimizer)
        state = get_optimizer_state_dict(self._module, optimizer, options=self._form)
        if self._save_distributed_checkpoint or not state:
            return state
        return _renamed(state, {name: number for number, name in enumerate(self._names(optimizer))})

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write beside the target and rename, so that a run killed meanwhile leaves the old checkpoint."""
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            # Lightning's own method would remove shards at this path before the file is written.
            super(ModelParallelStrategy, self).save_checkpoint(checkpoint, path, storage_options)
            return
        partial = path.with_name(f".{path.name}.partial")
        if self.is_global_zero:
            # Left behind by a killed run. The other devices wait for this one before they write.
            shutil.rmtree(partial, ignore_errors=True)
        super().save_checkpoint(checkpoint, partial, storage_options)
        self._write_digests(partial)
        if self.is_global_zero:
            put_in_place(partial, path)
        self.barrier()

    def _write_digests(self, partial: Path) -> None:
        """Write the SHA-256 of every file. Each device reads its own shards, which it has just written."""
        own = shards_of(partial, self.global_rank)
        if self.is_global_zero:
            own += [partial / REST, partial / INDEX]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, digests_of(own))
        if self.is_global_zero:
            write_digests(partial, {name: digest for each in found for name, digest in each.items()})

    # Loading

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint. The weights of a sharded one are shapes at first, which the module checks."""
        self._path = Path(self.broadcast(checkpoint_path))
        check_on_all_devices(self._path)
        if is_sharded(self._path):
            return read_outline(self._path)
        return dict(torch.load(self._path, weights_only=weights_only, map_location="cpu", mmap=True))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this device's part of the weights."""
        if is_sharded(self._path):
            weights = get_model_state_dict(self._module, options=SHARDS)
            load({WEIGHTS: weights}, storage_reader=ShardReader(self._path), planner=SafePlanner())
            set_model_state_dict(self._module, weights, options=SHARDS)
        else:
            set_model_state_dict(self._module, dict(checkpoint[WEIGHTS]), options=WHOLE)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this device's part of the optimizers' state."""
        for number, optimizer in enumerate(map(_bare, self.optimizers)):
            if is_sharded(self._path):
                shards = {f"{OPTIMIZER}{number}": get_optimizer_state_dict(self._module, optimizer, options=SHARDS)}
                load(shards, storage_reader=ShardReader(self._path), planner=SafePlanner())
                (state,), form = shards.values(), SHARDS
            else:
                numbered, form = checkpoint["optimizer_states"][number], WHOLE
                state = _renamed(numbered, dict(enumerate(self._names(optimizer))))
            set_optimizer_state_dict(self._module, optimizer, state, options=form)

    # Used by saving and loading

    @property
    def _module(self) -> torch.nn.Module:
        assert self.lightning_module is not None
        return self.lightning_module

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Return the names of the optimizer's parameters in its order."""
        names = {parameter: name for name, parameter in self._module.named_parameters()}
        return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Sharding over all devices; see FSDP2Strategy.")


def _bare(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _renamed(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """Return an optimizer state with other keys for its parameters."""
    return {
        "state": {names[key]: value for key, value in state["state"].items()},
        "param_groups": [
            group | {"params": [names[key] for key in group["params"]]} for group in state["param_groups"]
        ],
    }
