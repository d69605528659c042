"""Low-rank adapters of peft."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lpc_lightning.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class LoRA:
    """A low-rank adapter (Hu et al., 2021, arXiv 2106.09685). The policy without this adapter is the reference.

    Args:
        rank: Rank r of each update.
        alpha: Scale of the updates: they are multiplied by alpha / r.
        dropout: Probability of dropout on the adapter's input.
        target_modules: Names of the layers with an adapter, or `all-linear`: every linear layer except the LM head.

    Raises:
        ConfigError: `rank` or `alpha` is not a positive number, or `dropout` is not in [0, 1).
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        """Check the numbers. peft names no setting, and takes NaN and a scale of 0, with which nothing is learned."""
        if not self.rank >= 1:
            raise ConfigError(f"policy.lora.rank: found {self.rank}, expected at least 1.")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"policy.lora.alpha: found {self.alpha}, expected a number above 0.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"policy.lora.dropout: found {self.dropout}, expected a number from 0 to below 1.")

    def apply(self, model: PreTrainedModel) -> PeftModel:
        """Freeze `model` and add adapters to its layers.

        Raises:
            ConfigError: No layer has a name of `target_modules`.
        """
        self._check_targets(model)
        from peft import LoraConfig, get_peft_model  # the import takes a second: only where there is an adapter

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            # GPT-2's layers store their weights transposed.
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            task_type="CAUSAL_LM",
        )
        with torch.device("cpu"):  # equal first values on every device; peft moves them to the layer's device
            return get_peft_model(model, config)

    def _check_targets(self, model: PreTrainedModel) -> None:
        """Refuse names that no layer has. peft refuses them only if all names are such."""
        targets = [] if isinstance(self.target_modules, str) else self.target_modules
        names = [f".{name}" for name, _ in model.named_modules()]
        if unknown := [name for name in targets if not any(each.endswith(f".{name}") for each in names)]:
            layers = model.get_decoder().named_modules()
            linear = {name.rpartition(".")[2] for name, layer in layers if isinstance(layer, nn.Linear | Conv1D)}
            raise ConfigError(
                f"policy.lora.target_modules: found {', '.join(unknown)}, which no layer of the model is called, "
                f"expected names of its layers: {', '.join(sorted(linear))}."
            )


def merge(adapted: PeftModel) -> PreTrainedModel:
    """Add the updates of all active adapters to the weights. If layers share an adapted weight, no layer shares one.

    With tied embeddings, an adapter of the input embeddings would change the LM head as well. transformers ties either
    all weights that a family may share (embeddings, and whole blocks in Zamba2) or none.

    Args:
        adapted: The model with adapters, unquantized. Its layers are changed.

    Returns:
        The model without adapters.
    """
    model: Any = adapted.get_base_model()
    owners = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    adapted_layers = filter(None, (getattr(module, "base_layer", None) for module in model.modules()))
    if any(owners[id(weight)] > 1 for layer in adapted_layers for weight in layer.parameters(recurse=False)):
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                if owners[id(weight)] > 1:
                    setattr(module, name, nn.Parameter(weight.detach().clone(), weight.requires_grad))
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged
