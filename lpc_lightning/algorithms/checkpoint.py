"""Contents of a checkpoint, and the check that they fit the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lpc_lightning.errors import CheckpointError
from lpc_lightning.files.plain_values import plain
from lpc_lightning.latent import LatentSpace

PLAIN = (bool, int, float, str, Tensor)
"""Types of values, besides None and containers of them, that `torch.load` reads without running code."""


def is_plain(value: Any) -> bool:
    """Return True if `torch.load` reads a value after `plain` has converted it."""
    value = plain(value)
    if type(value) is dict:
        return all(is_plain(each) for item in value.items() for each in item)
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in PLAIN


def without_defaults(objects: Mapping[str, Any], constructor: Callable[..., Any]) -> list[str]:
    """Return the names of the objects that are not the defaults of a constructor."""
    defaults = inspect.signature(constructor).parameters
    return [name for name, value in objects.items() if name not in defaults or value is not defaults[name].default]


def report_left_out(module: type, objects: Sequence[str]) -> None:
    """Report which objects of a module that was built in Python its checkpoints do not hold."""
    given = ", ".join(f"{name}=..." for name in objects)
    rank_zero_info(
        f"checkpoint: the module was built in Python, and its checkpoints leave out {', '.join(objects)}. To load or "
        f"resume one, give equal objects: {module.__name__}.load_from_checkpoint(path, {given}). Commands such as "
        "`lpc-lightning evaluate` open only checkpoints of `lpc-lightning fit`."
    )


def trained_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Return names and shapes of everything that training changes. The reference is not part of it.

    These are the weights that are not frozen, and the whole state of a latent space, which has running moments too.
    """
    weights = {name: p for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    spaces = ((name, part) for name, part in module.named_modules() if isinstance(part, LatentSpace))
    states = [space.state_dict(prefix=f"{name}.") for name, space in spaces]
    return {name: value.shape for part in (weights, *states) for name, value in part.items()}


def check_same_architecture(expected: Mapping[str, torch.Size], weights: Mapping[str, Tensor]) -> None:
    """Compare the names and shapes of weights.

    Args:
        expected: Shapes of the model's trained weights.
        weights: Weights in the checkpoint.

    Raises:
        CheckpointError: Names or shapes differ. The message lists the first differences.
    """
    missing = sorted(set(expected) - set(weights))
    surplus = sorted(set(weights) - set(expected))
    shapes = [
        f"{name}: found {tuple(weights[name].shape)}, expected {tuple(expected[name])}"
        for name in sorted(set(weights) & set(expected))
        if weights[name].shape != expected[name]
    ]
    problems = [
        *(
            f"{len(names)} {what} (first: {names[0]})"
            for names, what in ((missing, "missing"), (surplus, "unknown"))
            if names
        ),
        *shapes[:3],
    ]
    if problems:
        raise CheckpointError(
            f"checkpoint: its weights are of another architecture: {'; '.join(problems)}. Expected the {len(expected)} "
            "trained weights of this policy and latent space. Use the settings policy, lora and latent of the run that "
            "wrote the checkpoint. They are in its config.yaml."
        )
