"""Sharded checkpoints: a folder with one part of the weights and of the optimizer's state from each device.

The format of the shards is that of `torch.distributed.checkpoint`. The file `meta.pt` beside them is Lightning's. It
holds everything else: settings, counters, schedules.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

REST = "meta.pt"
"""File for everything that is not sharded."""
INDEX = ".metadata"
"""File that torch writes after all shards."""
WEIGHTS, OPTIMIZER = "state_dict", "optimizer_"
"""Prefixes of the weights and of the optimizers (followed by a number) in the shards."""
STATES = "optimizer_states"
"""Key of the optimizer states in a checkpoint of one file."""


INDEX_CLASSES = {
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "torch": ("Size",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.serialization": ("_get_layout",),
}
"""Classes and functions that torch's index of shards needs, by module. Types of numbers come in addition."""


class _IndexUnpickler(pickle.Unpickler):
    """Unpickler that makes objects of `torch.distributed.checkpoint` only. A file must not run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class of the index."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in INDEX_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"found {module}.{name}, expected classes of an index of shards")
        return super().find_class(module, name)


class ShardReader(FileSystemReader):
    """Reader of shards whose index cannot run code. torch's own reader unpickles any class."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index."""
        with Path(self.path, INDEX).open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"found {type(metadata).__name__}, expected an index of shards")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """Planner that reads values other than tensors without running code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Set a value of the state that is no tensor, such as a learning rate."""
        loaded = torch.load(value, weights_only=True)
        name = read_item.dest_index.fqn
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded


def shards_of(path: Path, rank: int) -> list[Path]:
    """Return the files that a device wrote into a sharded checkpoint."""
    return sorted(path.glob(f"__{rank}_*.distcp"))


def is_sharded(path: Path) -> bool:
    """Return whether a path is a complete sharded checkpoint."""
    return (path / REST).is_file() and (path / INDEX).is_file()


def put_in_place(partial: Path, path: Path) -> None:
    """Replace a checkpoint by a new one that is complete. The old one exists until then.

    Args:
        partial: The new checkpoint, a folder or a file in the same folder as `path`.
        path: Target: a folder, a file, or a path that does not exist.
    """
    old = path.with_name(f".{path.name}.old")
    remove_checkpoint(old)  # left behind by a process that was killed here
    if path.exists() and (path.is_dir() or partial.is_dir()):  # a file replaces a file in one step
        os.replace(path, old)
    os.replace(partial, path)
    remove_checkpoint(old)


def remove_checkpoint(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read_outline(path: Path) -> dict[str, Any]:
    """Read a sharded checkpoint without its shards.

    `state_dict` holds tensors on the meta device. `optimizer_states`, if present, is a list of None.
    """
    outline = dict(torch.load(path / REST, weights_only=True, map_location="cpu"))
    stored = ShardReader(path).read_metadata().state_dict_metadata
    outline[WEIGHTS] = {
        name.removeprefix(f"{WEIGHTS}."): torch.empty(about.size, dtype=about.properties.dtype, device="meta")
        for name, about in stored.items()
        if name.startswith(f"{WEIGHTS}.") and isinstance(about, TensorStorageMetadata)
    }
    states = {name.partition(".")[0] for name in stored if name.startswith(OPTIMIZER)}
    return outline | ({STATES: [None] * len(states)} if states else {})


def read_sharded(path: Path, optimizers: bool = True) -> dict[str, Any]:
    """Join the shards in one process. The result is what `torch.load` returns for a checkpoint of one file.

    Args:
        path: The folder.
        optimizers: True reads the optimizers' state as well. With Adam it is twice as large as the weights. Its keys
            are parameter names instead of numbers. torch's optimizers accept both.

    Returns:
        The checkpoint, on the CPU.
    """
    index = ShardReader(path).read_metadata()
    flat = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        if isinstance(about, TensorStorageMetadata)
        else None
        for name, about in index.state_dict_metadata.items()
        if optimizers or name.startswith(f"{WEIGHTS}.")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # `no_dist` is intended
        load(flat, storage_reader=ShardReader(path), planner=SafePlanner(), no_dist=True)
    shards: dict[str, Any] = {}
    for name, value in flat.items():
        _place(shards, index.planner_data[name], value)
    checkpoint = read_outline(path) | {WEIGHTS: shards[WEIGHTS]}
    if states := checkpoint.pop(STATES, []):
        checkpoint |= {STATES: [shards[f"{OPTIMIZER}{number}"] for number in range(len(states))]} if optimizers else {}
    return checkpoint


def _place(tree: dict[str, Any], place: Sequence[str | int], value: Any) -> None:
    """Insert a value at its path: names are keys of dictionaries, numbers are indices of lists, which fill in order."""
    node: Any = tree
    for key, below in pairwise(place):
        empty: Any = [] if isinstance(below, int) else {}
        if isinstance(node, dict):
            node = node.setdefault(key, empty)
        else:
            node.extend([empty] * (key == len(node)))
            node = node[key]
    if isinstance(node, dict):
        node[place[-1]] = value
    else:
        node.append(value)
