"""Check that a checkpoint, a file or a folder of shards, has the content that was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from lpc_lightning.distributed.sharded_checkpoint import is_sharded
from lpc_lightning.errors import CheckpointError, DamagedFileError
from lpc_lightning.files.integrity import check_archive, check_digests


def check_checkpoint(path: Path, tensors: bool = True, rank: int = 0, devices: int = 1) -> None:
    """Compare a checkpoint with its checksums.

    Args:
        path: A file, or a folder of shards.
        tensors: False leaves out the numbers of the tensors in a file, and everything in a folder of shards.
        rank: Number of this device. The devices divide the files of a folder. The first one checks a file.
        devices: Number of devices that check the same checkpoint.

    Raises:
        CheckpointError: Its content is not what was written.
    """
    try:
        if is_sharded(path):
            if tensors:
                check_digests(path, slice(rank, None, devices))
        elif rank == 0:
            check_archive(path, tensors)
    except DamagedFileError as error:
        raise CheckpointError(
            f"{error}, expected the content that was written. Take another checkpoint of the run, or copy it again."
        ) from error


def check_on_all_devices(path: Path) -> None:
    """Check a checkpoint on all devices of a process group. Every device raises if one finds damage.

    Raises:
        CheckpointError: The content of the checkpoint is not what was written.
    """
    rank, devices = dist.get_rank(), dist.get_world_size()
    found: list[Any] = [None] * devices
    try:
        check_checkpoint(path, rank=rank, devices=devices)
        dist.all_gather_object(found, None)
    except CheckpointError as error:
        dist.all_gather_object(found, error)
    for damage in filter(None, found):
        raise damage
