"""Llama models of real sizes with random weights, built on the device of the run."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from lpc_lightning.policy import PolicySpec, TinyPolicy

SHAPES: dict[str, dict[str, Any]] = {
    # SmolLM2-135M.
    "135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
    },
    # TinyLlama's layers with SmolLM2's vocabulary, as benchmarks.random_llama has it.
    "1.17B": {
        "vocab_size": 49152,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    # For `--tiny`.
    "tiny": {
        "vocab_size": 1536,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
}
Shape = Literal["135M", "1.17B", "tiny"]


def config_of(shape: str) -> LlamaConfig:
    """Return the config of a shape, with the special ids of the tiny tokenizer."""
    fields = dict(SHAPES[shape])
    theta = fields.pop("rope_theta", 10_000.0)
    tokenizer = tokenizer_of()
    return LlamaConfig(
        **fields,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tokenizer_of() -> PreTrainedTokenizerBase:
    """Return the tokenizer of `TinyPolicy`. The pairs are token ids already, so that it only names special tokens."""
    return TinyPolicy().load_tokenizer()


def random_model(config: LlamaConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """Build a model with random weights on torch's default device.

    Args:
        config: Of the model.
        dtype: Type of the weights.
        seed: Equal seeds give equal weights on one kind of device.
    """
    device = torch.get_default_device()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


class RandomLlama(PolicySpec):
    """A Llama of one of `SHAPES` with random weights."""

    def __init__(self, shape: Shape, seed: int = 0, **policy: Any) -> None:
        """Keep the settings.

        Args:
            shape: Name of the shape.
            seed: Seed of the weights.
            policy: Settings of `PolicySpec`.
        """
        super().__init__(**policy)
        self.shape, self.seed = shape, seed

    def load_config(self) -> LlamaConfig:
        """Return the shape's config."""
        return config_of(self.shape)

    def load_model(self, config: Any, dtype: torch.dtype) -> PreTrainedModel:
        """Return random weights, on the default device."""
        return random_model(config, dtype, self.seed)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tiny tokenizer."""
        return tokenizer_of()
