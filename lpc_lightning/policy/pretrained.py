"""A policy with published weights: a hub name, a local folder, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lpc_lightning.policy.head import UnsupportedPolicyError
from lpc_lightning.policy.spec import Policy


class PretrainedPolicy(Policy):
    """A model from the hub, from a folder, or from a GGUF file."""

    def __init__(self, path: str, revision: str = "main", tokenizer: str | None = None, **policy: Any) -> None:
        """Say where the weights are.

        Args:
            path: Hub name (`mistralai/Mistral-7B-v0.1`), local folder, or GGUF file (`model.Q4_1.gguf`, dequantised).
            revision: Branch, tag or commit on the hub.
            tokenizer: Hub name or folder of another tokenizer. null takes the model's own.
            policy: Settings of `Policy`.
        """
        super().__init__(**policy)
        self.path, self.revision, self.tokenizer = path, revision, tokenizer

    def load_config(self) -> PreTrainedConfig:
        """The config beside the weights."""
        return self._load(AutoConfig)

    def load_model(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """The weights; those of a GGUF file are dequantised and forget that they ever were quantised."""
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedPolicyError(
                f"policy.path: found {self.path} ({config.model_type}), an encoder-decoder, "
                "expected a decoder-only model."
            )
        model = self._load(AutoModelForCausalLM, config=config, dtype=dtype)
        if not self.path.endswith(".gguf"):
            return model
        # A model that carries a quantisation config refuses to be saved: give its weights to one that has none.
        del model.config.quantization_config
        clean = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
        clean.load_state_dict(model.state_dict())
        clean.generation_config = model.generation_config
        return clean

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the weights, or the one named."""
        if self.tokenizer is not None:
            return AutoTokenizer.from_pretrained(self.tokenizer)
        return self._load(AutoTokenizer)

    def _load(self, kind: Any, **options: Any) -> Any:
        file = Path(self.path)
        name, local = self.path, file.is_dir()
        if file.suffix == ".gguf" and file.is_file():
            name, local, options["gguf_file"] = str(file.parent), True, file.name
        if not local and (file.suffix == ".gguf" or file.is_absolute() or self.path.startswith((".", "models/"))):
            raise UnsupportedPolicyError(
                f"policy.path: found no file or folder {self.path}. Expected a folder with config.json and weights, a "
                "GGUF file, or a hub name. `lpc-lightning prepare` makes models/SmolLM2-135M-Instruct without a hub."
            )
        try:
            return kind.from_pretrained(name, **({} if local else {"revision": self.revision}), **options)
        except (OSError, ValueError) as error:
            where = (
                "in the folder or file" if local else "as a local folder or on the hub (the hub may be out of reach)"
            )
            raise UnsupportedPolicyError(
                f"policy.path: could not load {self.path} {where}: {error}\n"
                "Expected a decoder-only model of transformers."
            ) from error
