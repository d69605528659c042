"""Sharded checkpoints: a folder with one part of the weights and of the optimizer's state from each device.

The format of the shards is that of `torch.distributed.checkpoint`. The file `meta.pt` beside them is Lightning's. It
holds everything else: settings, counters, schedules.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

REST = "meta.pt"
"""File for everything that is not sharded."""
INDEX = ".metadata"
"""File that torch writes after all shards."""
WEIGHTS, OPTIMIZER = "state_dict", "optimizer_"
"""Prefixes of the weights and of the optimizers (followed by a number) in the shards."""
STATES = "optimizer_states"
"""Key of the optimizer states in a checkpoint of one file."""


def is_sharded(path: Path) -> bool:
    """Return whether a path is a complete sharded checkpoint."""
    return (path / REST).is_file() and (path / INDEX).is_file()


def put_in_place(partial: Path, path: Path) -> None:
    """Replace a checkpoint by a new one that is complete. The old one exists until then.

    Args:
        partial: The new checkpoint, in the same folder as `path`.
        path: Target: a folder, a file, or a path that does not exist.
    """
    old = path.with_name(f".{path.name}.old")
    _remove(old)  # left behind by a process that was killed here
    if path.exists():
        os.replace(path, old)
    os.replace(partial, path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read_outline(path: Path) -> dict[str, Any]:
    """Read a sharded checkpoint without its shards.

    `state_dict` holds tensors on the meta device. `optimizer_states`, if present, is a list of None.
    """
    outline = dict(torch.load(path / REST, weights_only=True, map_location="cpu"))
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    outline[WEIGHTS] = {
        name.removeprefix(f"{WEIGHTS}."): _empty(about, "meta")
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
    index = FileSystemReader(path).read_metadata()
    flat = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        if isinstance(about, TensorStorageMetadata)
        else None
        for name, about in index.state_dict_metadata.items()
        if optimizers or name.startswith(f"{WEIGHTS}.")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # `no_dist` is intended
        load(flat, storage_reader=FileSystemReader(path), no_dist=True)
    shards: dict[str, Any] = {}
    for name, value in flat.items():
        _place(shards, index.planner_data[name], value)
    checkpoint = read_outline(path) | {WEIGHTS: shards[WEIGHTS]}
    if states := checkpoint.pop(STATES, []):
        checkpoint |= {STATES: [shards[f"{OPTIMIZER}{number}"] for number in range(len(states))]} if optimizers else {}
    return checkpoint


def _empty(about: TensorStorageMetadata, device: str) -> torch.Tensor:
    return torch.empty(about.size, dtype=about.properties.dtype, device=device)


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
