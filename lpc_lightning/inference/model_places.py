"""Places of the models that a run starts from, so that its checkpoints open from another working directory."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lpc_lightning.errors import CheckpointError

PLACES = ("path", "tokenizer", "adapter")
"""Settings of a policy that are a folder, a file or a hub name."""


def make_places_absolute(settings: Any) -> None:
    """Make the files and folders of models in the settings of a module absolute. Names on the hub stay as they are.

    Args:
        settings: Settings as a checkpoint stores them. They are changed.
    """
    policy = settings.get("policy", {}).get("init_args", {})
    for name in PLACES:
        _make_absolute(policy, name)
    _make_absolute(settings, "reference_path")


def _make_absolute(settings: Any, name: str) -> None:
    place = settings.get(name)
    if isinstance(place, str) and Path(place).exists():
        settings[name] = str(Path(place).absolute())


def find_models(settings: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Return the settings of a checkpoint's module with places of models that exist.

    A folder that is not where it was is looked for under the end of its path in the working directory: for
    `/data/models/llama` as `data/models/llama`, `models/llama` and `llama`.

    Args:
        settings: Settings of the module.
        checkpoint: Path of the checkpoint, for errors.

    Raises:
        CheckpointError: A model of the policy is at none of these places.
    """
    policy = settings.get("policy")
    if not isinstance(policy, dict) or not isinstance(policy.get("init_args"), dict):
        return dict(settings)
    found = dict(policy["init_args"])
    for name in PLACES:
        if _is_missing(found.get(name)) and not _move(found, name, checkpoint):
            place = Path(found[name])
            raise CheckpointError(
                f"{checkpoint} needs {place}, the {name} of its policy: found no such file or folder, and no "
                f"{place.name} in {Path.cwd()}. Move the model back, or link it: `ln -s NEW_PLACE {place.name}`."
            )
    moved = {**settings, "policy": {**policy, "init_args": found}}
    if _is_missing(moved.get("reference_path")):
        _move(moved, "reference_path", checkpoint)  # not every command needs it
    return moved


def _is_missing(place: Any) -> bool:
    return isinstance(place, str) and Path(place).is_absolute() and not Path(place).exists()


def _move(settings: MutableMapping[str, Any], name: str, checkpoint: Path) -> bool:
    """Replace a place by the one in the working directory with the same end. Return whether there is one."""
    old = Path(settings[name])
    ends = [Path(*old.parts[first:]) for first in range(1, len(old.parts))]
    new = next((end for end in ends if end.exists()), None)
    if new is None:
        return False
    rank_zero_warn(f"{checkpoint}: found no {old}, its {name}, and takes {new.absolute()} in its place.")
    settings[name] = str(new.absolute())
    return True
