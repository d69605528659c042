"""Low-rank adapters, by peft."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass
class LoRA:
    """Train a low-rank adapter (Hu et al., 2021, arXiv 2106.09685); the policy with the adapter off is the reference.

    Args:
        rank: r, rank of each update.
        alpha: Updates are scaled by alpha / r.
        dropout: Dropout on the adapter's input, a probability.
        target_modules: Names of the layers that get one, or `all-linear`: every linear layer but the LM head.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def apply(self, model: PreTrainedModel) -> PeftModel:
        """Freeze `model` and put adapters into it."""
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            # GPT-2's layers are linear ones with the weight transposed.
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            task_type="CAUSAL_LM",
        )
        with torch.device("cpu"):  # the same first values on every device; peft then moves them to the layer's own
            return get_peft_model(model, config)
