"""What to build a policy from. A spec is cheap; `build` makes the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lpc_lightning.policy.causal import CausalPolicy, decoder_layers
from lpc_lightning.policy.head import UnsupportedPolicyError, check_vocabulary
from lpc_lightning.policy.lora import LoRA
from lpc_lightning.policy.memory_efficient_layers import make_memory_efficient
from lpc_lightning.policy.segment_attention import SEGMENT

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Attention = Literal["auto", "segment", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]


class PolicySpec(ABC):
    """A causal language model to be trained, and its tokenizer."""

    def __init__(
        self,
        dtype: Dtype = "float32",
        attention: Attention = "auto",
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        """Keep the settings that all policies share.

        Args:
            dtype: Type of the weights. Full fine-tuning in bfloat16 loses updates smaller than 1/256 of a weight; keep
                float32 and let `trainer.precision: bf16-mixed` do the arithmetic in bfloat16.
            attention: Attention kernel: one of transformers, or `segment`, which is made for packed rows: on a CPU it
                computes no more than each piece sees; in compiled layers on a GPU it is flex_attention, which leaves
                out blocks in which nothing is seen; elsewhere it is sdpa. `auto` is segment; or eager for families
                that soft-cap their attention scores, which sdpa cannot.
            lora: Train an adapter in place of the weights. null trains all weights.
            gradient_checkpointing: Keep one state a layer and compute the rest again in the backward pass: less
                memory, about a third more time.
            compile: Have torch.compile make programs of the decoder layers and the head, for training: one for each
                shape of a batch on a GPU, so that a step takes hundreds of kernel launches in place of thousands. The
                first steps take about a minute; a C++ compiler (CPU) or Triton (GPU) has to be there. `auto`: on a
                GPU, for runs of at least 200 micro-batches.
        """
        self.dtype, self.attention = dtype, attention
        self.lora, self.gradient_checkpointing, self.compile = lora, gradient_checkpointing, compile

    @abstractmethod
    def load_config(self) -> PreTrainedConfig:
        """The model's config, as published."""

    @abstractmethod
    def load_model(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """The model with this config and its weights in this type."""

    @abstractmethod
    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to it."""

    def build(self, tokenizer: PreTrainedTokenizerBase | None = None) -> CausalPolicy:
        """Load the model, put the adapter in, and check that it can be served.

        Dropout is off, so that policy and reference differ by training alone (as in the original DPO code); the
        adapter's own dropout is its setting.

        Args:
            tokenizer: Makes the ids that the policy will read; None takes the policy's own.

        Raises:
            UnsupportedPolicyError: No such model, or one that cannot be served.
        """
        config = self.load_config()
        for name, value in vars(config).items():
            if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
                setattr(config, name, 0.0)
        config._attn_implementation = self._kernel(config)
        model = self.load_model(config, getattr(torch, self.dtype))
        check_vocabulary(model, self.load_tokenizer() if tokenizer is None else tokenizer)
        model.eval()
        make_memory_efficient(decoder_layers(model))
        policy = CausalPolicy(model if self.lora is None else self.lora.apply(model))
        if self.gradient_checkpointing:
            policy.set_gradient_checkpointing(True)
        policy.train()
        return policy

    def _kernel(self, config: PreTrainedConfig) -> str:
        # Also where the cap is set to null: such families have no sdpa at all.
        capped = hasattr(config.get_text_config(), "attn_logit_softcapping")
        if self.attention in ("sdpa", SEGMENT) and capped:
            raise UnsupportedPolicyError(
                f"policy.attention: found {self.attention} for {config.model_type}, which soft-caps its attention "
                "scores; sdpa cannot do that. Expected auto, eager or flex_attention."
            )
        if self.attention != "auto":
            return self.attention
        return "eager" if capped else SEGMENT
