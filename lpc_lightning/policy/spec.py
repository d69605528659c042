"""Settings of a policy. `build` makes the model from them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lpc_lightning.errors import ConfigError, UnsupportedPolicyError, one_line
from lpc_lightning.policy.attention_kernel import Attention, kernel_of
from lpc_lightning.policy.causal import CausalPolicy, decoder_layers
from lpc_lightning.policy.head import check_vocabulary
from lpc_lightning.policy.lora import LoRA
from lpc_lightning.policy.memory_efficient_layers import make_memory_efficient

if TYPE_CHECKING:
    from peft import PeftModel

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


def dropout_rates(config: PreTrainedConfig) -> dict[str, float]:
    """Return the fields of a config that drop states or whole layers at random in training.

    Those of a config inside it are under a path, such as `text_config.attention_dropout`.
    """
    parts = ("dropout", "pdrop", "layerdrop")
    rates: dict[str, float] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            rates |= {f"{name}.{inner}": rate for inner, rate in dropout_rates(value).items()}
        elif isinstance(value, float) and any(part in name for part in parts):
            rates[name] = value
    return rates


def set_dropout_rates(config: PreTrainedConfig, rates: Mapping[str, float]) -> None:
    """Set fields of a config, and of configs inside it, by the names that `dropout_rates` gives them."""
    for path, rate in rates.items():
        *owners, name = path.split(".")
        setattr(reduce(getattr, owners, config), name, rate)


class PolicySpec(ABC):
    """Settings of a causal language model and its tokenizer. A subclass defines where the weights come from."""

    trust_remote_code: bool = False
    """Whether Python code that comes with the model is run. A policy without such code ignores it."""
    quantization: Literal["nf4"] | None = None
    """Form of quantized weights. A policy that cannot quantize its weights ignores it."""
    upcast: bool = False
    """Whether weights are converted to float32 after they have been loaded in `dtype`."""

    def __init__(
        self,
        dtype: Dtype = "float32",
        attention: Attention = "auto",
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        compile: bool | Literal["auto"] = "auto",
        cuda_graphs: bool | Literal["auto"] = "auto",
        trainable: bool = True,
        frozen_states_gib: float = 0.0,
    ) -> None:
        """Keep the settings that all policies share.

        Args:
            dtype: Type of the weights. Full fine-tuning with bfloat16 weights loses updates below 1/256 of a weight.
                For bfloat16 arithmetic, keep float32 here and set `trainer.precision: bf16-mixed`.
            attention: Attention kernel: one of transformers, or `segment`, which is made for packed rows. On a CPU,
                `segment` computes visible blocks only. In compiled layers on a GPU it is flex_attention, which skips
                blocks without visible tokens. Everywhere else it is sdpa. `auto` is segment, or eager for families
                whose attention sdpa cannot compute: with soft caps, sinks or biases of positions, or of an old class.
            lora: Adapter that is trained in place of the weights. null trains all weights.
            gradient_checkpointing: Keep one state per layer, and recompute the others in the backward pass. This
                takes less memory and about a third more time.
            compile: Compile the decoder layers and the head with torch.compile, for training. A GPU gets one program
                for each shape of a batch, so that a step takes hundreds of kernel launches instead of thousands. The
                first steps take about a minute. It needs a C++ compiler (CPU) or Triton (GPU). `auto` compiles on a
                GPU, in runs of at least 200 micro-batches, if torch can trace the layers, and not with
                trainer.deterministic: compiled runs have not been shown to be equal to the last bit.
            cuda_graphs: Replay the compiled backbone from CUDA graphs in training on one GPU, so that a small model
                does not wait for Python. Memory holds the gradients twice, and activations apart from everything
                else. Not used with gradient_checkpointing, nor with a strategy such as ddp. `auto` is true for models
                of less than 500 million weights: 135 million train 3.4 times as fast on an H200, 1.2 billion no faster.
            trainable: False freezes the policy, and only the latent space is trained. There is then no backward pass
                through the backbone, and a checkpoint holds no weights of the policy.
            frozen_states_gib: Memory in GiB for the states after the layers below the first trained one: all layers of
                a frozen policy, or those below the adapters of `lora.target_modules`. A prompt or answer that occurs
                again, in another pair or epoch, skips these layers. Runs share the states in data.cache_dir. 0: these
                layers run at every batch. For a fit on a CPU.

        Raises:
            ConfigError: An adapter is frozen, or `frozen_states_gib` is no size.
        """
        if lora is not None and not trainable:
            raise ConfigError("policy.trainable: found false together with policy.lora, expected only one of them.")
        if not 0 <= frozen_states_gib < math.inf:
            raise ConfigError(f"policy.frozen_states_gib: found {frozen_states_gib}, expected a number of at least 0.")
        self.dtype, self.attention = dtype, attention
        self.lora, self.gradient_checkpointing = lora, gradient_checkpointing
        self.compile, self.cuda_graphs = compile, cuda_graphs
        self.trainable, self.frozen_states_gib = trainable, frozen_states_gib

    @abstractmethod
    def load_config(self) -> PreTrainedConfig:
        """Load the model's published config."""

    @abstractmethod
    def load_model(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """Load the model with this config, and its weights in this type."""

    @abstractmethod
    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer of the model."""

    def adapt(self, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """Add the adapter that is trained, if there is one."""
        return model if self.lora is None else self.lora.apply(model)

    @property
    def start(self) -> str:
        """Name of the weights that a fit starts from, for messages."""
        return type(self).__name__

    @property
    def adapter_base(self) -> str | None:
        """Hub name or folder of the model that an adapter in training belongs to. None: no folder holds its weights."""
        return None

    @property
    def trained_template(self) -> Mapping[str, Any] | None:
        """Settings of the template that the weights were trained with. None: not recorded."""
        return None

    def restore_latent(self, space: nn.Module | None) -> None:  # noqa: B027  # optional
        """Load the latent that belongs to the weights into a new space. By default there is none.

        Called after `build`.
        """

    def check_start(self) -> None:  # noqa: B027  # optional
        """Check the weights as the start of a fit. By default there is nothing to check."""

    def build(self, tokenizer: PreTrainedTokenizerBase | None = None) -> CausalPolicy:
        """Load the model, add the adapter, and check that the model is supported.

        The model's dropout is off, so that policy and reference differ only by training (as in the original DPO code).
        The adapter's dropout is a setting of its own.

        Args:
            tokenizer: Tokenizer of the policy's inputs. Default: the policy's own.

        Raises:
            UnsupportedPolicyError: The model does not exist, or is not supported.
        """
        config = self.load_config()
        set_dropout_rates(config, dict.fromkeys(dropout_rates(config), 0.0))
        config._attn_implementation = kernel_of(self.attention, config)
        try:
            model = self.load_model(config, getattr(torch, self.dtype))
        except ImportError as error:
            if self.attention == "auto":
                raise
            raise UnsupportedPolicyError(
                f"policy.attention: found {self.attention}, which cannot be used here ({one_line(error)}), expected "
                "auto, segment, sdpa or eager, or the package of this kernel."
            ) from error
        if self.upcast:
            model = model.float()
        check_vocabulary(model, self.load_tokenizer() if tokenizer is None else tokenizer)
        model.eval()
        make_memory_efficient(decoder_layers(model))
        policy = CausalPolicy(self.adapt(model))
        if self.gradient_checkpointing:
            try:
                policy.set_gradient_checkpointing(True)
            except ValueError as error:
                raise UnsupportedPolicyError(
                    f"policy.gradient_checkpointing: found true for {config.model_type}, which does not support it in "
                    "transformers, expected false. For less memory, lower data.batch_size and raise "
                    "trainer.accumulate_grad_batches."
                ) from error
        policy.train()
        if not self.trainable:
            policy.requires_grad_(False)
        if self.frozen_states_gib:
            policy.keep_frozen_states(self.frozen_states_gib)
        return policy
