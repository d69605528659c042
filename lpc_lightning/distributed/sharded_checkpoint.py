"""Sharded checkpoints: a folder into which each device writes its own part of the weights and of the optimizer's state.

The shards are those of `torch.distributed.checkpoint`. Beside them lies `meta.pt`, as Lightning has it: everything that
is no shard (settings, counters, schedules).
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
"""What is not sharded."""
INDEX = ".metadata"
"""What torch writes once all shards are there."""
WEIGHTS, OPTIMIZER = "state_dict", "optimizer_"
"""How weights and optimizers (by number) are called in the shards."""
STATES = "optimizer_states"
"""Under this name a checkpoint of one file lists the states of its optimizers."""


def is_sharded(path: Path) -> bool:
    """Whether there is a sharded checkpoint."""
    return (path / REST).is_file() and (path / INDEX).is_file()


def put_in_place(partial: Path, path: Path) -> None:
    """Have a checkpoint that is whole take the place of the one before, which is there until then.

    Args:
        partial: Where it was written, beside its place.
        path: Its place; a folder, a file or nothing.
    """
    old = path.with_name(f".{path.name}.old")
    _remove(old)  # a process that was killed here may have left it
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
    """A sharded checkpoint without its shards.

    `state_dict` holds names, types and shapes, on the meta device; `optimizer_states`, where there are any, nothing.
    """
    outline = dict(torch.load(path / REST, weights_only=True, map_location="cpu"))
    found = FileSystemReader(path).read_metadata().state_dict_metadata
    outline[WEIGHTS] = {
        name.removeprefix(f"{WEIGHTS}."): _empty(about, "meta")
        for name, about in found.items()
        if name.startswith(f"{WEIGHTS}.") and isinstance(about, TensorStorageMetadata)
    }
    states = {name.partition(".")[0] for name in found if name.startswith(OPTIMIZER)}
    return outline | ({STATES: [None] * len(states)} if states else {})


def read_sharded(path: Path, optimizers: bool = True) -> dict[str, Any]:
    """Put the shards together, in one process: what `torch.load` gives for a checkpoint of one file.

    Args:
        path: The folder.
        optimizers: Whether to read the optimizers' state too: with Adam, twice as much as the weights. It stands under
            the names of parameters and not under their numbers; torch's optimizers take either, by the order of their
            groups.

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
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for
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
    """Put a value where it stood: names are keys of dictionaries, numbers are places in lists, which fill in order."""
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
