"""Build a model in one process and shard it over all. The other processes never hold more than their own shards."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from lpc_lightning.errors import ConfigError


def build_sharded(
    module: nn.Module, parts: Sequence[str], build: Callable[[], None], shard: Callable[[], None], mesh: DeviceMesh
) -> None:
    """Build parts of a module in the first process, and send each process its shards of the weights.

    The first process reads the weights into its CPU memory. All processes receive a blueprint: the parts with
    parameters that have a shape and no values. The blueprint is sharded, and the values follow one parameter at a time.

    Args:
        module: The module.
        parts: Names of its attributes that `build` sets.
        build: Sets these attributes, unsharded. Called in the first process only. Its errors are raised in all.
        shard: Shards the module's parameters by `fully_shard`.
        mesh: Devices that hold the shards.

    Raises:
        ConfigError: The weights are quantized, and quantized weights cannot be sharded.
    """
    first = dist.get_rank() == 0
    message: list[Any] = [None]
    if first:
        try:
            with torch.device("cpu"):  # Lightning builds models on the run's device, whose memory may be too small
                build()
            message = [_blueprint({name: getattr(module, name) for name in parts})]
        except Exception as error:  # without a message, the other processes would wait for ever
            message = [error]
    dist.broadcast_object_list(message, src=0)
    if isinstance(message[0], Exception):
        raise message[0]
    weights = {name: value.detach() for name, value in module.state_dict().items()} if first else {}
    for name, part in pickle.loads(message[0]).items():
        setattr(module, name, part)
    shard()
    device = torch.device(mesh.device_type)
    # Buffers arrived with their values on the CPU. NCCL sends from GPU memory only.
    module._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
    _scatter(weights, module.state_dict())


@torch.no_grad()
def _scatter(weights: dict[str, Tensor], shares: dict[str, Any]) -> None:
    """Fill the shards of every process from the weights of the first one, one parameter after another."""
    for name, share in shares.items():
        local = share.to_local() if isinstance(share, DTensor) else share
        value = weights[name].to(local.device) if weights else local.new_empty(share.shape)
        dist.broadcast(value, src=0)
        if isinstance(share, DTensor):
            value = distribute_tensor(value, share.device_mesh, share.placements, src_data_rank=None).to_local()
        local.copy_(value)


class _Blueprinter(pickle.Pickler):
    """Pickler that keeps the shape, type and sharing of parameters and drops their values."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, nn.Parameter):
            return NotImplemented
        if not value.is_floating_point():
            raise ConfigError(
                "policy.quantization: found quantized weights with a sharding strategy, expected floating-point "
                "weights. Train on one GPU, or use trainer.strategy ddp."
            )
        return _outline, (value.shape, value.dtype, value.requires_grad)


def _blueprint(parts: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    _Blueprinter(file).dump(parts)
    return file.getvalue()


def _outline(shape: torch.Size, dtype: torch.dtype, trained: bool) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=trained)
