"""What lm-eval needs of several processes, by `torch.distributed` as Lightning has set it up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


class TorchDistributed:
    """Mix-in for an `lm_eval` model: each rank answers its own documents. Without a process group there is one rank."""

    @property
    def rank(self) -> int:
        """Number of this process."""
        return distributed.get_rank() if _running() else 0

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        return distributed.get_world_size() if _running() else 1

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors of one shape, behind each other; numbers become a vector."""
        if self.world_size == 1:
            return tensor
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        distributed.all_gather(gathered, tensor)
        return torch.cat([torch.atleast_1d(part) for part in gathered])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The ranks' objects on rank `dst`, None on the others."""
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size if self.rank == dst else None
        distributed.gather_object(obj, gathered, dst)
        return gathered

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            distributed.barrier()


def _running() -> bool:
    return distributed.is_available() and distributed.is_initialized()
