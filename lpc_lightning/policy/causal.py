"""A causal language model as the suite sees it: a backbone that yields hidden states, and a head that reads them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lpc_lightning.policy.compiled_layers import CompiledLayers
from lpc_lightning.policy.head import UnsupportedPolicyError, check_head, head_of
from lpc_lightning.policy.logprobs import BatchForward
from lpc_lightning.policy.masks import FORMS, FULL, block_mask, layer_windows
from lpc_lightning.policy.memory_efficient_layers import make_published
from lpc_lightning.policy.segment_attention import SEGMENT, blocks_of
from lpc_lightning.types import LogitHead, PreferenceBatch


class CausalPolicy(nn.Module):
    """A decoder-only model, with or without a LoRA adapter."""

    block_sparse = False
    """True if packed rows are attended to by blocks: a row may be long, since blocks that hide all cost nothing."""
    _compiled: CompiledLayers | None = None
    _compiles_head = False

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        """Wrap a causal LM.

        Args:
            model: The model, on any device.

        Raises:
            UnsupportedPolicyError: Its head cannot be served.
        """
        super().__init__()
        self.model = model
        # It plans each new shape anew, for milliseconds of CPU time a call.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._takes_positions = "position_ids" in inspect.signature(self.backbone.forward).parameters
        with _uncompiled():
            check_head(self.causal_lm, self.backbone)
            self.attends_by_segment = self._attends_by_piece()
            """Whether packed rows on a CPU cost no more attention than their pieces: rows may have any width."""
            self.takes_block_mask = self.attends_by_segment or self._honours_block_mask()
            """Whether rows may hold several pieces: the kernel takes a mask; all layers honour it and the positions."""

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
        return replace(head_of(self.causal_lm), compiled=self._compiles_head)

    @property
    def width(self) -> int:
        """d, the width of a hidden state."""
        return self.head.weight.shape[1]

    def _attends_by_piece(self) -> bool:
        config = self.backbone.config
        if config._attn_implementation != SEGMENT or not self._takes_positions:
            return False
        self.attends_by_segment = layer_windows(config) == {FULL: None}
        # Families that do not pass on what their layers are called with would attend to everything.
        return self.attends_by_segment and self._keeps_pieces_apart()

    def _honours_block_mask(self) -> bool:
        config = self.backbone.config
        masked = config._attn_implementation in FORMS and self._takes_positions
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
        if on:
            # A hook that re-entrant checkpoints would need. It makes frozen embeddings part of the backward pass, and
            # is a local function, with which no policy can be handed from one process to another.
            model.disable_input_require_grads()

    def compile_layers(self, backend: str = "inductor", few_shapes: bool | None = None) -> None:
        """Have torch compile the decoder layers. They stay the modules that they are, under the same names.

        Args:
            backend: Of `torch.compile`.
            few_shapes: See `CompiledLayers`. Default: on a GPU, where layouts make batches of few shapes.
        """
        few_shapes = self.model.device.type == "cuda" if few_shapes is None else few_shapes
        make_published(self.layers)  # a compiler decides by itself what to keep for the backward pass
        self._compiled = CompiledLayers(self.layers, few_shapes, backend)
        kernel = self.backbone.config._attn_implementation
        self.block_sparse = few_shapes and self.takes_block_mask and kernel in (SEGMENT, "flex_attention")
        self._compiles_head = few_shapes

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        return decoder_layers(self.causal_lm)

    def read(self, batch: PreferenceBatch) -> BatchForward:
        """One backbone pass."""
        return BatchForward(self.hidden(batch), batch, self.head)

    def hidden(self, batch: PreferenceBatch) -> Tensor:
        """(R T, d) last hidden states of all tokens, flattened."""
        states = self.states(batch.input_ids, batch.attention_mask, batch.segments, batch.position_ids)
        return states.flatten(0, 1)

    def states(
        self, input_ids: Tensor, attention_mask: Tensor, segments: Tensor | None, position_ids: Tensor
    ) -> Tensor:
        """(R, T, d) last hidden states of tokens laid out as `PreferenceBatch` tells."""
        if input_ids.device.type == "cpu" and torch.is_grad_enabled():
            self._check_trains_on_cpu()
        mask: Any = attention_mask
        options: dict[str, Any] = {"position_ids": position_ids} if self._takes_positions else {}
        if segments is not None:
            config, device = self.backbone.config, input_ids.device.type
            kernel = config._attn_implementation
            compiled = self._compiled is not None and self._compiled.takes(input_ids.shape)
            if compiled and self.block_sparse:
                kernel = "flex_attention"
            if self.attends_by_segment and kernel == SEGMENT and device == "cpu":
                # Four dimensions: transformers takes it for a finished mask and makes none. The blocks stand in for it.
                mask, options["blocks"] = input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool), blocks_of(segments)
            else:
                scores = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.model.dtype
                mask = block_mask(segments, position_ids, config, kernel, scores)
        return self.backbone(input_ids=input_ids, attention_mask=mask, use_cache=False, **options).last_hidden_state

    def _check_trains_on_cpu(self) -> None:
        if self.backbone.config._attn_implementation == "flex_attention":
            raise UnsupportedPolicyError(
                "policy.attention: found flex_attention on a CPU, where torch has no backward pass for it. Expected "
                "auto, sdpa or eager there."
            )
        if getattr(self.causal_lm, "is_loaded_in_4bit", False):
            raise UnsupportedPolicyError(
                "policy.quantization: found weights in 4 bits on a CPU, where bitsandbytes repacks them for inference, "
                "without a backward pass. Expected a GPU, or null."
            )

    @contextmanager
    def as_reference(self) -> Iterator[CausalPolicy]:
        """The policy as published: without gradient, and its adapter, where it has one, off.

        Without an adapter that is the reference as long as the policy has not been trained.
        """
        bare = self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext()
        with torch.no_grad(), bare:
            yield self

    def reference_logps(self, batch: PreferenceBatch) -> Tensor:
        """(2B,) log-probability of each answer under the policy as published; see `as_reference`."""
        with self.as_reference() as reference:
            return reference.read(batch).logps()


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """A model's decoder layers, by the class that transformers says must not be split."""
    kinds = set(model._no_split_modules or ())
    # FSDP2 makes a subclass of each layer's class.
    return [module for module in model.modules() if kinds & {base.__name__ for base in type(module).__mro__}]


@contextmanager
def _uncompiled() -> Iterator[None]:
    """For a handful of tokens `flex_attention` need not be compiled, of which transformers has it warn."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield
