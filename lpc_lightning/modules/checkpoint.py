"""What a checkpoint holds, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A checkpoint that does not belong to the model that is to take it."""


def trained_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Names and shapes of what training changes: all but frozen weights, and so without the reference."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {name: parameter.shape for name, parameter in parameters if parameter.requires_grad}


def check_same_architecture(expected: Mapping[str, torch.Size], found: Mapping[str, Tensor]) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: They differ; says the first differences.
    """
    missing = sorted(set(expected) - set(found))
    surplus = sorted(set(found) - set(expected))
    shapes = [
        f"{name}: found {tuple(found[name].shape)}, expected {tuple(expected[name])}"
        for name in sorted(set(found) & set(expected))
        if found[name].shape != expected[name]
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
            "trained weights of this policy and latent space: take the settings (policy, lora, latent) of the run that "
            "wrote it, which are in its config.yaml."
        )
