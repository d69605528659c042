"""Atomic checkpoints: a file is complete or absent."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lpc_lightning.distributed.checkpoint_check import check_checkpoint
from lpc_lightning.distributed.sharded_checkpoint import is_sharded, put_in_place, read_sharded, remove_checkpoint


class CheckpointWriteError(OSError):
    """Raised when a checkpoint cannot be written. Earlier checkpoints are intact."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint writer that writes beside the target, flushes to disk and renames. Reads sharded checkpoints as well.

    Lightning writes into the system's temporary folder and moves the file. Across file systems a move is a copy, and a
    full disk leaves a part of it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save to a local path. Other targets (`s3://...`) are left to Lightning.

        Raises:
            CheckpointWriteError: The disk is full or not writable.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_checkpoint(partial)  # shards that a killed run has left behind
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(partial, target)
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError of its zip writer.
            with contextlib.suppress(OSError):
                remove_checkpoint(partial)
            size = sum(value.nbytes for value in _tensors(checkpoint))
            raise CheckpointWriteError(
                f"checkpoint: could not write {target} (about {size / 2**20:.0f} MiB): {error}. Expected a "
                "folder with enough space: free some, or change trainer.default_root_dir. Earlier checkpoints are "
                "intact."
            ) from error

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Load a file, or join the shards of a folder for a strategy that does not shard.

        Raises:
            CheckpointError: The content of a local checkpoint is not what was written.
        """
        if "://" not in str(path) and Path(path).exists():
            check_checkpoint(Path(path))
            if is_sharded(Path(path)):
                return read_sharded(Path(path))
        return super().load_checkpoint(path, *args, **options)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []
