"""A small policy with random weights: for tests, laptop-size ablations, and trying a config before paying for it."""

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
    """A config-only model of a known family, with a byte-level tokenizer that can write any text."""

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
        """Say how large.

        Args:
            family: Architecture, by transformers' `model_type`.
            width: d, hidden width; the feed-forward layers are twice as wide.
            layers: Transformer layers.
            heads: Attention heads; half as many for keys and values where the family groups them.
            context: Longest sequence in tokens.
            seed: Seed of the random weights, whatever the run's seed: policy and reference start from the same ones.
            reader: Start as a policy whose state at the last prompt token holds the mean of the prompt's tokens: values
                and outputs of attention are rotations (the values of grouped heads a part of one: set
                options.num_key_value_heads to `heads` for the whole), queries and keys as small as ever, and logits
                have a deviation of 1 nat. Otherwise that state says little of the prompt, unlike a pretrained model's.
            options: Further fields of the family's config.
            policy: Settings of `PolicySpec`.

        Raises:
            ConfigError: `reader` with gpt2, whose attention has no values of their own.
        """
        super().__init__(**policy)
        if reader and family == "gpt2":
            raise ConfigError("policy.reader: found true with family gpt2, expected another family, or false.")
        self.reader = reader
        self.family, self.width, self.layers, self.heads = family, width, layers, heads
        self.context, self.seed, self.options = context, seed, options or {}

    def load_config(self) -> PreTrainedConfig:
        """The family's config at this size."""
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
        """Random weights by the seed, the same on every device; the caller's random state is left as it was."""
        device = torch.get_default_device()
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            if self.reader:
                _make_reader(model)
        return model.to(device)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Byte-level BPE of 1024 tokens, learned on the built-in preferences, in the ChatML format."""
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
    """Small queries and keys attend to all tokens alike; what they fetch is to arrive with none of it lost."""
    for name, parameter in model.named_parameters():
        if name.endswith(("v_proj.weight", "o_proj.weight")):
            # In float32, which a trainer of `bf16-true` does not build in: no decomposition is there for bfloat16.
            parameter.copy_(torch.nn.init.orthogonal_(torch.empty(parameter.shape, dtype=torch.float32)))
    head = model.get_output_embeddings().weight
    head.normal_(std=head.shape[1] ** -0.5)
