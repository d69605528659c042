"""A causal language model as the suite sees it: a backbone that yields hidden states, and a head that reads them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lpc_lightning.policy.head import check_head, head_of
from lpc_lightning.policy.masks import block_mask, layer_windows
from lpc_lightning.readout import Reading
from lpc_lightning.types import LogitHead, PreferenceBatch


class CausalPolicy(nn.Module):
    """A decoder-only model, with or without a LoRA adapter."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        """Wrap a causal LM.

        Args:
            model: The model, on any device.

        Raises:
            UnsupportedPolicyError: Its head cannot be served.
        """
        super().__init__()
        self.model = model
        check_head(self.causal_lm, self.backbone)
        self._takes_positions = "position_ids" in inspect.signature(self.backbone.forward).parameters
        self.takes_block_mask = self._honours_block_mask()
        """Whether rows may hold several pieces: the kernel takes a mask, and all layers honour it and the positions."""

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model; an adapter's layers sit inside it."""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return cast(PreTrainedModel, model)

    @property
    def backbone(self) -> PreTrainedModel:
        """Tokens to hidden states after the final norm."""
        return cast(PreTrainedModel, self.causal_lm.get_decoder())

    @property
    def head(self) -> LogitHead:
        """Hidden states to logits."""
        return head_of(self.causal_lm)

    @property
    def width(self) -> int:
        """d, the width of a hidden state."""
        return self.head.weight.shape[1]

    def _honours_block_mask(self) -> bool:
        config = self.backbone.config
        masked = config._attn_implementation in ("eager", "sdpa") and self._takes_positions
        return masked and layer_windows(config) is not None and self._keeps_pieces_apart()

    @torch.no_grad()
    def _keeps_pieces_apart(self) -> bool:
        """Two completions behind one prompt, in one row and in two: layers with a memory of their own would differ."""
        device = self.model.device
        prompt, chosen, rejected = [1, 2, 3], [4, 5], [6, 7, 8]
        tokens = torch.tensor([prompt + chosen + rejected], device=device) % self.head.weight.shape[0]
        segments = torch.tensor([[0] * 3 + [1] * 2 + [2] * 3], device=device)
        positions = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5]], device=device)
        together = self.states(tokens, torch.ones_like(tokens), segments, positions)[0]
        alone = torch.cat([tokens[:, :3], tokens[:, 5:]], dim=1)
        apart = self.states(alone, torch.ones_like(alone), None, torch.arange(6, device=device)[None])[0]
        tolerance = 0.1 if self.model.dtype in (torch.bfloat16, torch.float16) else 1e-3
        return bool((together[5:] - apart[3:]).abs().max() <= tolerance * apart.abs().max())

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Whether the backward pass computes each layer's states again, from one that is kept."""
        model, verb = self.causal_lm, "enable" if on else "disable"
        # transformers 5.23 has renamed both.
        new = f"activation_checkpointing_{verb}"
        change = getattr(model, new if hasattr(model, new) else f"gradient_checkpointing_{verb}")
        change(*([{"use_reentrant": False}] if on else []))

    def read(self, batch: PreferenceBatch) -> Reading:
        """One backbone pass."""
        return Reading(self.hidden(batch), batch, self.head)

    def hidden(self, batch: PreferenceBatch) -> Tensor:
        """(R T, d) last hidden states of all tokens, flattened."""
        states = self.states(batch.input_ids, batch.attention_mask, batch.segments, batch.position_ids)
        return states.flatten(0, 1)

    def states(
        self, input_ids: Tensor, attention_mask: Tensor, segments: Tensor | None, position_ids: Tensor
    ) -> Tensor:
        """(R, T, d) last hidden states of tokens laid out as `PreferenceBatch` tells."""
        mask: Tensor | dict[str, Tensor] = attention_mask
        if segments is not None:
            config, device = self.backbone.config, input_ids.device.type
            scores = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.model.dtype
            mask = block_mask(segments, position_ids, config, config._attn_implementation, scores)
        places = {"position_ids": position_ids} if self._takes_positions else {}
        return self.backbone(input_ids=input_ids, attention_mask=mask, use_cache=False, **places).last_hidden_state

    @contextmanager
    def as_reference(self) -> Iterator[CausalPolicy]:
        """The policy with its adapter off and without gradient: the reference of a LoRA policy."""
        if not isinstance(self.model, PeftModel):
            raise TypeError(
                "as_reference: found a policy without an adapter, expected LoRA; keep a frozen copy instead."
            )
        with torch.no_grad(), self.model.disable_adapter():
            yield self
