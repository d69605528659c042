"""The process interface of an lm-eval model, implemented with the `torch.distributed` group that Lightning sets up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


class TorchDistributed:
    """Mix-in for an `lm_eval` model: each rank answers its own documents. Without a process group there is one rank."""

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return distributed.get_rank() if _is_initialized() else 0

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return distributed.get_world_size() if _is_initialized() else 1

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors of all ranks, which have the same shape. Scalars become a vector."""
        if self.world_size == 1:
            return tensor
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        distributed.all_gather(gathered, tensor)
        return torch.cat([torch.atleast_1d(part) for part in gathered])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the objects of all ranks on rank `dst`, None on the other ranks."""
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size if self.rank == dst else None
        distributed.gather_object(obj, gathered, dst)
        return gathered

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            distributed.barrier()


def _is_initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()
