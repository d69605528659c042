"""A published adapter as the start of a fit: merged into the weights, or kept frozen beside the adapter in training."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lpc_lightning.errors import UnsupportedPolicyError, one_line
from lpc_lightning.policy.lora import merge

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

ADAPTER = "adapter_config.json"
"""File of peft's in the folder of an adapter."""
TRAINED, START = "default", "start"
"""peft's names of the adapter in training, and of a frozen adapter that the fit starts from."""


def is_adapter(path: str) -> bool:
    """Return whether a path is a folder with an adapter and without a model."""
    folder = Path(path)
    return (folder / ADAPTER).is_file() and not (folder / "config.json").is_file()


def base_of(adapter: str) -> tuple[str, str | None]:
    """Return the base model that the folder of an adapter names, and its revision. None: not recorded.

    Raises:
        UnsupportedPolicyError: The folder names none.
    """
    try:
        settings = json.loads((Path(adapter) / ADAPTER).read_text(encoding="utf-8"))
        base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    except (OSError, ValueError, AttributeError) as error:
        raise UnsupportedPolicyError(
            f"policy.path: could not read {Path(adapter) / ADAPTER}: {error}. Expected the settings of an adapter."
        ) from error
    if not base:
        raise UnsupportedPolicyError(
            f"policy.path: found no base_model_name_or_path in {Path(adapter) / ADAPTER}, expected the adapter's base "
            "model. Set policy.path to that model and policy.adapter to this folder."
        )
    return str(base), None if revision is None else str(revision)


def merge_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """Add the updates of an adapter to the weights of its base model.

    Args:
        model: The base model, unquantized. It is changed.
        adapter: Folder or hub name.

    Raises:
        UnsupportedPolicyError: The adapter is no LoRA, or does not fit.
    """
    from peft import PeftModel  # the import takes a second: only where there is an adapter

    _check_adapter(adapter)
    with _explaining(adapter), torch.device("cpu"):
        merged = merge(PeftModel.from_pretrained(model, adapter, torch_device="cpu"))
    merged.requires_grad_(True)  # peft froze them
    return merged


def keep_adapter(model: PeftModel, adapter: str) -> None:
    """Add a second adapter, which stays frozen and drops nothing. The model then computes with both.

    Args:
        model: The base model with the adapter in training.
        adapter: Folder or hub name of the second adapter.

    Raises:
        UnsupportedPolicyError: The adapter is no LoRA, does not fit, or replaces whole layers.
    """
    replaced = getattr(_check_adapter(adapter), "modules_to_save", None)
    if replaced:
        raise UnsupportedPolicyError(
            f"policy.merge_adapter: found false for {adapter}, which replaces whole layers ({', '.join(replaced)}). "
            "Expected true."
        )
    with _explaining(adapter), torch.device("cpu"):
        if missing := model.load_adapter(adapter, START, torch_device="cpu").missing_keys:
            raise ValueError(f"Found missing adapter keys: {missing}.")
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", {})
        if START in dropouts:  # that of its own training: policy and reference would differ by their masks
            dropouts[START] = nn.Identity()
    _activate_both(model)


@contextmanager
def trained_adapter_off(model: PeftModel) -> Iterator[None]:
    """Turn off the adapter in training. A frozen adapter stays on."""
    if START not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    tuner: Any = model.base_model
    tuner.set_adapter(START, inference_mode=True)
    try:
        yield
    finally:
        _activate_both(model)


def frozen_scales(model: nn.Module) -> list[str]:
    """Return the scales of the updates of a frozen adapter, layer by layer. They are no parameters."""
    scalings = (getattr(module, "scaling", None) for module in model.modules())
    return [str(each[START]) for each in scalings if isinstance(each, dict) and START in each]


def _activate_both(model: PeftModel) -> None:
    tuner: Any = model.base_model
    tuner.set_adapter([START, TRAINED])
    for name, parameter in model.named_parameters():
        if START in name.split("."):  # last for an embedding, whose factors are parameters and not layers
            parameter.requires_grad_(False)


def _check_adapter(adapter: str) -> PeftConfig:
    from peft import PeftConfig, PeftType

    with _explaining(adapter):
        config: PeftConfig = PeftConfig.from_pretrained(adapter)
    if config.peft_type != PeftType.LORA:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UnsupportedPolicyError(
            f"policy.adapter: found an adapter of the kind {kind} in {adapter}, expected LORA, whose updates can be "
            "added to the weights."
        )
    return config


@contextmanager
def _explaining(adapter: str) -> Iterator[None]:
    """Turn errors of peft into one that names the setting. peft only warns of missing weights."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            yield
    except (OSError, ValueError, RuntimeError, UserWarning) as error:
        reason = one_line(error)
        raise UnsupportedPolicyError(
            f"policy.adapter: could not load {adapter}: {reason[:500]} Expected a LoRA adapter that was trained on the "
            "model in policy.path."
        ) from error
