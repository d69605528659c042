"""A small policy with random weights, for tests, ablations on a laptop, and trials of a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lpc_lightning.errors import ConfigError
from lpc_lightning.policy.spec import PolicySpec

TOKENIZER = Path(__file__).with_name("tiny_tokenizer.json")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class TinyPolicy(PolicySpec):
    """A small model of a known family with random weights, and a byte-level tokenizer for any text."""

    def __init__(
        self,
        family: Literal["llama", "mistral", "qwen2", "gpt2", "gemma2"] = "llama",
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        context: int = 2048,
        seed: int = 0,
        reader: bool = False,
        options: dict[str, Any] | None = None,
        **policy: Any,
    ) -> None:
        """Keep the settings.

        Args:
            family: Architecture, by transformers' `model_type`.
            width: Hidden width d. The feed-forward layers are twice as wide.
            layers: Number of transformer layers.
            heads: Number of attention heads. Families with grouped heads have half as many for keys and values.
            context: Longest sequence in tokens.
            seed: Seed of the random weights, independent of the run's seed. Policy and reference start equal.
            reader: Start with weights whose state at the last prompt token contains the mean of the prompt's tokens, as
                the state of a pretrained model does. Otherwise it depends little on the prompt. The value and output
                weights of attention are rotations, and the logits have a standard deviation of 1 nat. With grouped
                heads, the values are a part of a rotation: set options.num_key_value_heads to `heads` for a whole one.
            options: Further fields of the family's config.
            policy: Settings of `PolicySpec`.

        Raises:
            ConfigError: A size is below 1, there are more heads than the width, or `reader` is set for gpt2, which has
                no separate weights for values.
        """
        super().__init__(**policy)
        for name, size in {"width": width, "layers": layers, "heads": heads, "context": context}.items():
            if size < 1:
                raise ConfigError(f"policy.{name}: found {size}, expected at least 1.")
        if heads > width:
            raise ConfigError(f"policy.heads: found {heads}, expected at most policy.width, which is {width}.")
        if reader and family == "gpt2":
            raise ConfigError("policy.reader: found true with family gpt2, expected another family, or false.")
        self.reader = reader
        self.family, self.width, self.layers, self.heads = family, width, layers, heads
        self.context, self.seed, self.options = context, seed, options or {}

    def load_config(self) -> PreTrainedConfig:
        """Make the family's config at this size."""
        tokenizer = self.load_tokenizer()
        fields = {
            "vocab_size": len(tokenizer),
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.context,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        if self.family != "gpt2":
            fields["intermediate_size"] = 2 * self.width
            fields["num_key_value_heads"] = max(1, self.heads // 2)
            fields["head_dim"] = self.width // self.heads
        return AutoConfig.for_model(self.family, **(fields | self.options))

    def load_model(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """Make random weights from the seed, equal on every device. The random state stays unchanged."""
        device = torch.get_default_device()
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            if self.reader:
                _make_reader(model)
        return model.to(device)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load a byte-level BPE tokenizer of 1024 tokens, trained on the built-in pairs, with the ChatML template."""
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(TOKENIZER),
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            pad_token="<|pad|>",
            model_max_length=self.context,
        )
        tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer


@torch.no_grad()
def _make_reader(model: PreTrainedModel) -> None:
    """Make values and outputs of attention rotations, so that the mean of the tokens is kept.

    Small queries and keys attend to all tokens equally.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("v_proj.weight", "o_proj.weight")):
            # torch has no QR decomposition for bfloat16, the type in which a `bf16-true` trainer builds models.
            parameter.copy_(torch.nn.init.orthogonal_(torch.empty(parameter.shape, dtype=torch.float32)))
    head = model.get_output_embeddings().weight
    head.normal_(std=head.shape[1] ** -0.5)
