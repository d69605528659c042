"""FSDP2 as a Lightning strategy: Lightning's own, with checkpoints that any number of devices can take up."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
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

from lpc_lightning.distributed.sharded_checkpoint import OPTIMIZER, WEIGHTS, is_sharded, put_in_place, read_outline

SHARDS = StateDictOptions(cpu_offload=True, ignore_frozen_params=True, strict=False)
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


class FSDP2Strategy(ModelParallelStrategy):
    """Weights, gradients and optimizer state sharded over all devices of all nodes.

    Lightning's `ModelParallelStrategy` reads a checkpoint before the module can refuse it, expects the frozen weights
    in it that ours do not hold, and numbers the optimizer's parameters in the order of the module, where the optimizer
    goes by the order of its groups. Here all of this is as on one device, so that a checkpoint written by any number of
    devices, in one file or in shards, is taken up by any other number, FSDP2 or not.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        """Keep the settings.

        Args:
            save_distributed_checkpoint: A checkpoint is a folder into which each device writes its shards. False: one
                file, for which the whole state is gathered in the memory of the first process.
            process_group_backend: How devices talk: `nccl`, `gloo`. null: by the kind of device.
            timeout: How long a device waits for the others.
        """
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend, timeout)

    def setup_environment(self) -> None:
        """All devices of all nodes share the data."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimizers are restored as Lightning does it for one device, by `load_optimizer_state_dict`."""
        return True

    @property
    def _form(self) -> StateDictOptions:
        return SHARDS if self._save_distributed_checkpoint else WHOLE

    # Saving

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained weights: this device's shards; or all of them in the first process, and nothing in others."""
        return get_model_state_dict(self._module, options=self._form)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State by parameter name (shards), or by number as on one device (whole, in the first process)."""
        optimizer = _bare(optimizer)
        state = get_optimizer_state_dict(self._module, optimizer, options=self._form)
        if self._save_distributed_checkpoint or not state:
            return state
        return _renamed(state, {name: number for number, name in enumerate(self._names(optimizer))})

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write beside the target and move into place, so that a run killed meanwhile leaves the old checkpoint."""
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        partial = path.with_name(f".{path.name}.partial")
        if self.is_global_zero:
            # What a killed run has left. The others wait for the first device before they write.
            shutil.rmtree(partial, ignore_errors=True)
        super().save_checkpoint(checkpoint, partial, storage_options)
        if self.is_global_zero:
            put_in_place(partial, path)
        self.barrier()

    # Loading

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint. Of a sharded one the weights are shapes for now: the module first says if they fit."""
        self._path = Path(self.broadcast(checkpoint_path))
        if is_sharded(self._path):
            return read_outline(self._path)
        return dict(torch.load(self._path, weights_only=weights_only, map_location="cpu", mmap=True))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give each device its part of the weights."""
        if is_sharded(self._path):
            weights = get_model_state_dict(self._module, options=SHARDS)
            load({WEIGHTS: weights}, checkpoint_id=self._path)
            set_model_state_dict(self._module, weights, options=SHARDS)
        else:
            set_model_state_dict(self._module, dict(checkpoint[WEIGHTS]), options=WHOLE)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each device its part of the optimizers' state."""
        for number, optimizer in enumerate(map(_bare, self.optimizers)):
            if is_sharded(self._path):
                shards = {f"{OPTIMIZER}{number}": get_optimizer_state_dict(self._module, optimizer, options=SHARDS)}
                load(shards, checkpoint_id=self._path)
                (state,), form = shards.values(), SHARDS
            else:
                numbered, form = checkpoint["optimizer_states"][number], WHOLE
                state = _renamed(numbered, dict(enumerate(self._names(optimizer))))
            set_optimizer_state_dict(self._module, optimizer, state, options=form)

    # What both need

    @property
    def _module(self) -> torch.nn.Module:
        assert self.lightning_module is not None
        return self.lightning_module

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Names of the optimizer's parameters, in its order."""
        names = {parameter: name for name, parameter in self._module.named_parameters()}
        return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Everything sharded over all devices; see FSDP2Strategy.")


def _bare(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _renamed(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """Optimizer state with its parameters called otherwise."""
    return {
        "state": {names[key]: value for key, value in state["state"].items()},
        "param_groups": [
            group | {"params": [names[key] for key in group["params"]]} for group in state["param_groups"]
        ],
    }
