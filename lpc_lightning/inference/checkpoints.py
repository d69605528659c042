"""Read a checkpoint: its weights, the settings of its module, and the run that wrote it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.pytorch.cli import instantiate_module

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.data.tokenization.templates import TemplateSettings
from lpc_lightning.distributed.checkpoint_check import check_checkpoint
from lpc_lightning.distributed.sharded_checkpoint import is_sharded, read_outline, read_sharded
from lpc_lightning.errors import CheckpointError, ConfigError, one_line
from lpc_lightning.files.integrity import is_archive
from lpc_lightning.files.yaml_files import read_yaml
from lpc_lightning.inference.checkpoint_entries import check_classes, check_entries
from lpc_lightning.inference.model_places import find_models

EXAMPLE = "runs/version_0/checkpoints/best.ckpt"
TRAINER = ("precision", "max_steps", "max_epochs", "gradient_clip_val", "accumulate_grad_batches", "devices")
"""Trainer settings that affect the result."""


def read_checkpoint(path: Path, weights: bool = True) -> dict[str, Any]:
    """Read a checkpoint. Its tensors, the optimizer's included, stay on disk until they are used.

    The weights of a sharded checkpoint are joined in memory. Its optimizer state is not read.

    Args:
        path: A file, or a folder of shards.
        weights: False reads only the shapes of a sharded checkpoint's weights, and does not check the weights.

    Raises:
        CheckpointError: The checkpoint is missing or cannot be read, or its content is not what was written.
    """
    sharded = is_sharded(path)
    if path.is_dir() and not sharded:
        raise CheckpointError(f"{path} is a folder without shards, expected a checkpoint such as {EXAMPLE}.")
    if not path.exists():
        raise CheckpointError(f"found no file {path}, expected a checkpoint such as {EXAMPLE}.")
    if not sharded and not is_archive(path):
        raise CheckpointError(f"{path} is no checkpoint, or one that was cut short, expected one such as {EXAMPLE}.")
    check_checkpoint(path, tensors=weights)
    try:
        if sharded:
            checkpoint = read_sharded(path, optimizers=False) if weights else read_outline(path)
        else:
            checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # a file of another format can raise any exception
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {reason}), expected a checkpoint that this suite wrote. "
            "Take another one of the run."
        ) from error
    check_entries(checkpoint, path)
    return dict(checkpoint)


def build_module(
    checkpoint: dict[str, Any], path: Path, change: Callable[[PreferenceModule], None]
) -> PreferenceModule:
    """Build the checkpoint's module and load its weights, in eval mode.

    Args:
        checkpoint: Result of `read_checkpoint`.
        path: Path of the checkpoint, for errors.
        change: Called with the module before its models are built.

    Raises:
        CheckpointError: It holds no module settings, its weights do not fit, or a model that it needs is gone.
        UnsupportedPolicyError: Its policy cannot be loaded.
    """
    module = make_module(find_models(module_settings(checkpoint, path), path), path)
    change(module)
    with torch.random.fork_rng(devices=[]):  # building draws new weights with the run's seed
        module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    return module.eval()


def module_settings(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the settings of the checkpoint's module, including `_class_path`.

    Raises:
        CheckpointError: It holds no settings.
    """
    settings = dict(checkpoint.get("hyper_parameters") or {})
    settings.pop("_instantiator", None)
    if "_class_path" not in settings or "state_dict" not in checkpoint:
        raise CheckpointError(
            f"{path} has no record of its policy and algorithm, expected a checkpoint of `lpc-lightning "
            "fit`. A module that was built in code is loaded in code: `DPO.load_from_checkpoint(path, policy=..., "
            "latent=...)`."
        )
    return settings


def make_module(settings: dict[str, Any], path: Path) -> PreferenceModule:
    """Make a checkpoint's module from its settings. Its models are not built.

    Raises:
        CheckpointError: The settings are not those of a module.
    """
    check_classes(settings, path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*``(ArgumentParser.add_instantiator|instantiate_classes)``")
        try:
            return instantiate_module(PreferenceModule, settings)  # type: ignore[type-abstract]  # a subclass is built
        except (ArgumentError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = one_line(error)
            raise CheckpointError(
                f"{path}: found settings that {settings['_class_path']} refuses ({reason}), expected those of the run. "
                "Take another checkpoint of the run."
            ) from error


def run_folder(path: Path) -> Path:
    """Return the folder of the run that wrote a checkpoint."""
    folder = path.absolute().parent
    return folder.parent if folder.name == "checkpoints" else folder


def run_config(path: Path) -> dict[str, Any]:
    """Read the run's `config.yaml`. Empty if the file is missing.

    Raises:
        ConfigError: The file is damaged.
    """
    file = run_folder(path) / "config.yaml"
    if not file.is_file():
        return {}
    config = read_yaml(file)
    for name in ("data", "trainer"):
        value = config.get(name) if isinstance(config, dict) else None
        if not isinstance(config, dict) or not isinstance(value, dict | None):
            raise ConfigError(
                f"{file}: found {type(value if isinstance(config, dict) else config).__name__} as "
                f"{name if isinstance(config, dict) else 'its content'}, expected the settings of the run. Restore the "
                "file, or take the checkpoint out of its folder."
            )
    return config


def checkpoint_origin(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """Describe a checkpoint in JSON values, for `results.json` and the model card."""
    settings = module_settings(checkpoint, path)
    own = {name: value for name, value in settings.items() if name not in ("_class_path", "policy", "latent")}
    config = run_config(path)
    return {
        "path": str(path),
        "algorithm": settings["_class_path"].rpartition(".")[2],
        "settings": own,
        "policy": settings["policy"],
        "latent": settings["latent"],
        "step": checkpoint.get("global_step"),
        "epoch": checkpoint.get("epoch"),
        "seed": config.get("seed_everything"),
        "training_pairs": checkpoint.get("training_data", {}).get("pairs"),
        "template": checkpoint.get("template"),
        "data": config.get("data"),
        "data_folder": checkpoint.get("data_folder"),
        "data_rows": checkpoint.get("data_rows"),
        "trainer": {name: value for name, value in (config.get("trainer") or {}).items() if name in TRAINER},
    }


def trained_template(origin: Mapping[str, Any]) -> TemplateSettings:
    """Return the template of training. Defaults if it is not recorded.

    Args:
        origin: Result of `checkpoint_origin`, or `training.json` of an exported folder under the key `training`.

    Raises:
        CheckpointError: The record is not that of a template.
    """
    recorded = origin.get("training", origin).get("template") or {}
    if not isinstance(recorded, dict) or not set(recorded) <= set(TemplateSettings._fields):
        raise CheckpointError(
            f"template: found {str(recorded)[:80]}, expected {', '.join(TemplateSettings._fields)}. Take another "
            "checkpoint of the run."
        )
    return TemplateSettings(**recorded)
