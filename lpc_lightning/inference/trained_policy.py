"""A policy that this suite has trained, as the start of a new fit."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lpc_lightning.algorithms.checkpoint import check_same_architecture
from lpc_lightning.errors import CheckpointError, ConfigError, one_line
from lpc_lightning.inference.checkpoints import make_module, module_settings, read_checkpoint
from lpc_lightning.inference.model_places import find_models
from lpc_lightning.inference.modeling_lpc import CONFIG_KEY, LATENT_FILE
from lpc_lightning.policy import PolicySpec, PretrainedPolicy
from lpc_lightning.policy.lora import merge
from lpc_lightning.policy.pretrained import ORIGIN

WEIGHTS, LATENT = "policy.model.", "latent."
"""Prefixes of the entries of a checkpoint's `state_dict`."""


class TrainedPolicy(PolicySpec):
    """A policy that this suite has trained: the plain policy (z = 0) of a checkpoint or an export, adapters merged."""

    def __init__(self, path: str, keep_latent: bool = True, trust_remote_code: bool = False, **policy: Any) -> None:
        """Keep the settings.

        Args:
            path: A checkpoint (`runs/version_0/checkpoints/best.ckpt`) or an exported folder. Optimizer, schedules and
                data start anew. The file must stay where it is: checkpoints of the new fit name it.
            keep_latent: Start with the latent in `path`, if there is one. `latent` must then be set as in that run.
                false makes a new latent, or none.
            trust_remote_code: Run Python code that comes with the base model or its tokenizer. Read it first.
            policy: Settings of `PolicySpec`. They hold for the new fit. With `lora`, a new adapter is trained.
        """
        super().__init__(**policy)
        self.path, self.keep_latent, self.trust_remote_code = path, keep_latent, trust_remote_code
        self._latent: Mapping[str, Tensor] = {}

    def load_config(self) -> PreTrainedConfig:
        """Load the config of the base model."""
        return self._base.load_config()

    def load_model(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """Load the base model and the trained weights, and merge adapters.

        Raises:
            CheckpointError: The checkpoint cannot be read, its weights are not those of its settings, or the latent of
                an export is missing.
        """
        base, folder = self._base, Path(self.path)
        model = base.load_model(config, dtype)
        if _is_export(folder):
            self._latent = self._exported_latent(config) if self.keep_latent else {}
            return model
        state = read_checkpoint(folder)["state_dict"]
        self._latent = _part(state, LATENT)
        adapted = base.adapt(model)
        if not base.trainable:  # the checkpoint then holds no weights of the policy
            adapted.requires_grad_(False)
        trained = {name: p for name, p in adapted.named_parameters(remove_duplicate=False) if p.requires_grad}
        weights = _part(state, WEIGHTS)
        try:
            check_same_architecture({name: weight.shape for name, weight in trained.items()}, weights)
        except CheckpointError as error:
            raise CheckpointError(f"policy.path: {self.path}: {error}") from error
        adapted.load_state_dict(weights, strict=False)
        merged = adapted if isinstance(adapted, PreTrainedModel) else merge(adapted)
        return merged.requires_grad_(True)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer of the run."""
        return self._base.load_tokenizer()

    @property
    def start(self) -> str:
        """Path of the checkpoint or export."""
        return f"{self.path} without latent"

    @property
    def trained_template(self) -> Mapping[str, Any] | None:
        """See `PolicySpec.trained_template`."""
        base, path = self._base, Path(self.path)
        return base.trained_template if _is_export(path) else read_checkpoint(path, weights=False).get("template")

    def restore_latent(self, space: nn.Module | None) -> None:
        """Load the latent of the checkpoint or export into a new space, if `keep_latent` is set.

        Raises:
            ConfigError: The space is none, has other weights, or would be replaced by a warm start.
        """
        if not self.keep_latent or not self._latent:
            return
        drop = "or policy.keep_latent to false for a new latent"
        if space is None:
            raise ConfigError(
                f"latent: found null and a latent in {self.path}, expected the latent of that run. Set latent as "
                "there, or policy.keep_latent to false to leave it out."
            )
        pairs = getattr(space, "warm_start_pairs", 0)
        if pairs:
            raise ConfigError(
                f"latent.warm_start_pairs: found {pairs} with the latent of {self.path}, which a warm start would "
                f"replace. Set it to 0, {drop}."
            )
        expected = space.state_dict()
        stored = {"codebook.weight" if name == "codebook" else name: value for name, value in self._latent.items()}
        shapes = [
            f"{name}: found {tuple(stored[name].shape)}, expected {tuple(value.shape)}"
            for name, value in expected.items()
            if name in stored and stored[name].shape != value.shape
        ]
        missing = [f"{name}: not found" for name in expected if name not in stored]
        surplus = [f"{name}: found, not expected" for name in stored if name not in expected]
        if differences := [*shapes, *missing, *surplus]:
            reason = (
                "An export has no posterior and no running moments: start from the checkpoint"
                if _is_export(Path(self.path)) and missing
                else "Set latent as in that run"
            )
            raise ConfigError(
                f"latent: the latent in {self.path} does not fit {type(space).__name__} "
                f"({'; '.join(differences[:3])}). {reason}, {drop}."
            )
        space.load_state_dict(stored)

    def _exported_latent(self, config: PreTrainedConfig) -> dict[str, Tensor]:
        file = Path(self.path) / LATENT_FILE
        if not hasattr(config, CONFIG_KEY) and not file.is_file():
            return {}
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"policy.path: {file}: found no latent that can be read ({one_line(error)}), expected the one that "
                "config.json names. Export the checkpoint again, or set policy.keep_latent to false to leave it out."
            ) from error

    @cached_property
    def _base(self) -> PolicySpec:
        """Settings of the policy that the weights belong to."""
        path = Path(self.path)
        spec: PolicySpec
        if _is_export(path):
            spec = PretrainedPolicy(self.path)
        elif path.suffix == ".ckpt":
            try:
                checkpoint = read_checkpoint(path, weights=False)
                spec = make_module(find_models(module_settings(checkpoint, path), path), path).policy_spec
            except CheckpointError as error:
                raise CheckpointError(f"policy.path: {error}") from error
        else:
            raise ConfigError(
                f"policy.path: found {self.path}, expected a checkpoint (.ckpt) or an exported folder with {ORIGIN}. "
                "PretrainedPolicy opens other models."
            )
        spec.trust_remote_code = self.trust_remote_code
        spec.quantization = None  # updates cannot be added to quantized weights
        spec.frozen_states_gib = 0.0  # a setting of the earlier fit
        return spec


def _is_export(folder: Path) -> bool:
    return (folder / ORIGIN).is_file()


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
