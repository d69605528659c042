"""What a checkpoint holds, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lpc_lightning.latent import LatentSpace


class CheckpointError(ValueError):
    """A checkpoint that does not belong to the model that is to take it."""


def trained_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Names and shapes of what training changes: weights that are not frozen, and all that a latent space keeps.

    So without the reference. A latent space has moments beside its weights.
    """
    weights = {name: p for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    spaces = ((name, part) for name, part in module.named_modules() if isinstance(part, LatentSpace))
    kept = [space.state_dict(prefix=f"{name}.") for name, space in spaces]
    return {name: value.shape for part in (weights, *kept) for name, value in part.items()}


def rewind_to_last_step(loops: Mapping[str, Any], window: int, batches: float) -> int:
    """Set the trainer's counts of batches back to the last optimizer step: no checkpoint holds the gradients since.

    Args:
        loops: The checkpoint's own `loops`, which are changed.
        window: Batches that are accumulated for a step.
        batches: Batches in an epoch, whose last one closes its window.

    Returns:
        Batches of the epoch that the steps so far have used.
    """
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]
    done = progress["current"]["processed"]
    since = 0 if done == batches else done % window
    if since:
        for counts in (progress["current"], progress["total"]):
            step = counts["processed"] - since
            counts.update(ready=step, started=step, processed=step, completed=step)
    return int(done - since)


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
