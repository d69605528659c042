"""Check the entries of a checkpoint before use: their types, and the classes that they name."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.errors import CheckpointError
from lpc_lightning.latent import LatentSpace
from lpc_lightning.latent.schedules import Schedule
from lpc_lightning.policy import PolicySpec
from lpc_lightning.robust import RobustLoss

TYPES: dict[str, type | tuple[type, ...]] = {
    "state_dict": dict,
    "hyper_parameters": dict,
    "callbacks": dict,
    "loops": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
    "training_data": dict,
    "run_length": dict,
    "template": dict,
    "data_folder": str,
    "data_rows": dict,
    "position": dict,
    "warm_start": dict,
    "code_range": float,
    "robust_loss": dict,
    "validation_before": dict,
    "validation_after": dict,
}
"""Type of each entry."""
RESUMED = ("state_dict", "callbacks", "loops", "optimizer_states", "lr_schedulers", "epoch", "global_step")
"""Entries that a resumed run needs."""
PROGRESS = ("epoch_progress", "epoch_loop.batch_progress")
"""Counts of the training loop that a resumed run needs. Lightning would start at 0 without them."""
COUNTS = ("ready", "started", "processed", "completed")
"""Numbers of the training loop's counts."""
BASES: dict[str, type] = {
    "policy": PolicySpec,
    "latent": LatentSpace,
    "robust_loss": RobustLoss,
    "optimizer": Optimizer,
}
"""Base class of the classes that a module's settings name."""
IMPORTED = ("lpc_lightning", "torch.optim", "bitsandbytes.optim", "transformers.optimization")
"""Packages that a checkpoint may cause to be imported. Their import has no effects."""


def check_entries(checkpoint: Any, path: Path) -> None:
    """Check the types of a checkpoint's entries.

    Args:
        checkpoint: What was read.
        path: Path of the checkpoint, for errors.

    Raises:
        CheckpointError: An entry has another type than a checkpoint of this suite.
    """
    advice = "expected {}, as in a checkpoint that this suite wrote. Take another one of the run."
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: found {_name(checkpoint)}, {advice.format('dict')}")
    for name, kind in TYPES.items():
        value = checkpoint.get(name)
        if name in checkpoint and (not isinstance(value, kind) or isinstance(value, bool)):
            expected = kind.__name__ if isinstance(kind, type) else " or ".join(each.__name__ for each in kind)
            raise CheckpointError(f"{path}: found {_name(value)} as its entry {name}, {advice.format(expected)}")
    for name, value in checkpoint.get("state_dict", {}).items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: found {_name(value)} as the weight {name!r}, {advice.format('a tensor with a name')}"
            )


def check_resumable(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Check that a checkpoint has everything that a resumed run needs.

    Raises:
        CheckpointError: An entry is missing, or the counts of the training loop are.
    """
    if missing := [name for name in RESUMED if name not in checkpoint]:
        raise CheckpointError(
            f"{path}: found no entry {', '.join(missing)}, expected the full state of a run. A checkpoint with weights "
            "only cannot be resumed. Take another one of the run."
        )
    loop = checkpoint["loops"].get("fit_loop")
    for name in PROGRESS:
        progress = loop.get(name) if isinstance(loop, dict) else None
        parts = [progress.get(part) for part in ("total", "current")] if isinstance(progress, dict) else [None]
        if not all(isinstance(part, dict) and all(_is_count(part.get(each)) for each in COUNTS) for part in parts):
            raise CheckpointError(
                f"{path}: found no counts in loops.fit_loop.{name}, expected the numbers {', '.join(COUNTS)} of the "
                "training loop. Take another one of the run."
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_classes(settings: Mapping[str, Any], path: Path) -> None:
    """Check the classes that a module's settings name, before anything is imported for them.

    A class must belong to a module that has been imported, or to one of the packages in `IMPORTED`, and derive from the
    base class of its setting. A file must not cause an import of other code. Lightning has the same rule.

    Args:
        settings: Settings of a module in a checkpoint, including `_class_path`.
        path: Path of the checkpoint, for errors.

    Raises:
        CheckpointError: A class path is none of these.
    """
    _check_class(settings["_class_path"], PreferenceModule, "_class_path", path)
    for name, base in BASES.items():
        value = settings.get(name)
        if value is None:
            continue
        _check_class(value.get("class_path") if isinstance(value, dict) else value, base, name, path)
        if not isinstance(value, dict) or not isinstance(value.get("init_args", {}), dict):
            raise CheckpointError(
                f"{path}: found {_name(value)} as its {name}, expected class_path and init_args. Take another "
                "checkpoint of the run."
            )
    bases = (*BASES.values(), Schedule)
    for place, class_path in _class_paths(settings):
        _check_class(class_path, bases, place, path)


def _class_paths(value: Any, place: str = "hyper_parameters") -> Iterator[tuple[str, Any]]:
    """Yield every class path in nested settings, with its place."""
    if isinstance(value, dict):
        if "class_path" in value:
            yield place, value["class_path"]
        for name, part in value.items():
            yield from _class_paths(part, f"{place}.{name}")
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _class_paths(part, place)


def _check_class(class_path: Any, base: type | tuple[type, ...], place: str, path: Path) -> None:
    home, _, name = class_path.rpartition(".") if isinstance(class_path, str) else ("", "", "")
    module = sys.modules.get(home)
    if module is None and any(home == package or home.startswith(f"{package}.") for package in IMPORTED):
        try:
            module = import_module(home)
        except ImportError:
            module = None
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        bases = base if isinstance(base, tuple) else (base,)
        what = " or ".join(each.__name__ for each in bases)
        raise CheckpointError(
            f"{path} names {class_path!r} as its {place}, which is no imported class of the kind {what}. A checkpoint "
            "cannot import code. If the class is yours, import its module before, as in `python -c 'import "
            "my_module; from lpc_lightning.cli import main; main()' generate ...`."
        )


def _name(value: Any) -> str:
    return type(value).__name__
