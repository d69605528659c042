"""The parts of a preference module (policy, reference, latent space), how they are built, and their optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins import DeepSpeedPrecision, DoublePrecision, MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from lpc_lightning.algorithms.checkpoint import check_same_architecture, trained_shapes
from lpc_lightning.algorithms.latent_mixin import LatentMixin
from lpc_lightning.algorithms.metrics import PreferenceMetrics
from lpc_lightning.algorithms.refused_callbacks import check_averages, check_callbacks
from lpc_lightning.algorithms.run_length import total_steps
from lpc_lightning.data.trainer_data import preference_data
from lpc_lightning.distributed.build_sharded import build_sharded
from lpc_lightning.distributed.sharding import (
    check_frozen_states,
    check_strategy,
    policies_of,
    set_micro_batch_size,
    shard,
)
from lpc_lightning.errors import ConfigError, one_line
from lpc_lightning.policy import CausalPolicy, PolicySpec, policy_fingerprint
from lpc_lightning.policy.compile_trial import fault_of_compilation
from lpc_lightning.policy.precision import PRECISION_ADVICE, WEIGHTS_ADVICE, warn_of_slow_products
from lpc_lightning.reference.cached import OtherReference, OwnReference, computation_key
from lpc_lightning.reference.live import FrozenModel, Reference, live_reference
from lpc_lightning.reference.other_model import build_other
from lpc_lightning.reference.pair_cache import entry_folder
from lpc_lightning.seeding import derive, run_seed
from lpc_lightning.types import PreferenceBatch

PARTS = ("policy", "reference", "latent")
"""Attributes of the module that are built in `configure_model`."""
WEIGHTS = ("state_dict", "current_model_state")
"""Entries of a checkpoint with weights. The second one is that of Lightning's `WeightAveraging`."""
COMPILED_FROM = 200
"""Smallest number of micro-batches of a run for which compilation saves time."""
GRAPHED_BELOW = 500_000_000
"""Number of weights from which CUDA graphs are not worth their memory, between the sizes that were measured."""
REFERENCES: dict[str, Callable[..., Reference]] = {"cached": OwnReference, "live": live_reference}
"""Kinds of references by name."""


class PolicyModule(LatentMixin, LightningModule):
    """A policy with its reference and latent space, built from the settings, on one device or sharded."""

    needs_reference = True
    policy: CausalPolicy
    reference: Reference | None
    policy_spec: PolicySpec
    reference_kind: str
    reference_path: str | None
    make_optimizer: OptimizerCallable
    latent_lr: float
    lr_schedule: str
    warmup_ratio: float
    _built = _starting = False
    _steps: int
    _tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, loaded at the first use."""
        if self._tokenizer is None:
            self._tokenizer = self.policy_spec.load_tokenizer()
        return self._tokenizer

    def configure_callbacks(self) -> list[Callback]:
        """Give the tokenizer to the DataModule. This is a run's first hook, and `prepare_data` needs the tokenizer."""
        if (data := preference_data(self.trainer)) is not None:
            data.set_tokenizer(self.tokenizer)
        return []

    def setup(self, stage: str) -> None:
        """Check callbacks and strategy, and set up the strategy. The DataModule of the run has been set up before."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connector
        check_callbacks(callbacks)
        if stage == "fit":
            check_averages(callbacks, str(self.trainer.precision), self.policy_spec.dtype)
            check_frozen_states(self.policy_spec.frozen_states_gib, self.trainer.strategy)
            self.policy_spec.check_start()
            if self.needs_reference:
                rank_zero_info(f"reference: {self.reference_path or self.policy_spec.start}")
        self._warn_of_slow_precision(stage)
        check_strategy(self.trainer.strategy)
        set_micro_batch_size(self.trainer.strategy)
        self._starting = True

    def _warn_of_slow_precision(self, stage: str) -> None:
        device, precision = self.trainer.strategy.root_device.type, str(self.trainer.precision)
        if precision.startswith(("bf16", "16")):
            warn_of_slow_products(device, "bfloat16" if precision.startswith("bf16") else "float16", PRECISION_ADVICE)
        elif stage == "fit" and precision.startswith("32"):  # the type of trained weights is that of the checkpoint
            warn_of_slow_products(device, self.policy_spec.dtype, WEIGHTS_ADVICE)

    def configure_model(self) -> None:
        """Build policy, reference and latent space once, and prepare the reference for each run."""
        fresh = not self._built
        if fresh:
            self._build()
        if self._starting:
            data = preference_data(self.trainer)
            names: tuple[str, ...] = ()
            if data is not None:
                data.set_policy(self.policy)
                names = data.source_names
            for metrics in (self.val_metrics, self.test_metrics):
                metrics.split_by_source(names)
        if self._starting:
            self._share_frozen_states()
        if self._starting and self.reference is not None:
            never_trained = self.policy_spec.lora is not None or not self.policy_spec.trainable
            self.reference.prepare(self, untouched=fresh or never_trained)
        self._starting = False

    def _share_frozen_states(self) -> None:
        """Share the states of frozen layers with other runs of the same policy and precision."""
        data, kept = preference_data(self.trainer), self.policy.frozen_states
        if data is not None and kept is not None:
            key = computation_key(policy_fingerprint(self.policy), self.policy, self.trainer)
            kept.share(entry_folder("frozen_states", [key, kept.depth], data.cache_dir))

    def teardown(self, stage: str) -> None:
        """Write the last states of frozen layers, and release CUDA graphs."""
        if self._built and self.policy.frozen_states is not None:
            self.policy.frozen_states.store.write()
        for policy in policies_of(self):
            policy.release_graphs()

    def _build(self) -> None:
        if self.device_mesh is None:
            self._make_parts()
            self._compile()
        else:
            mesh = self.device_mesh["data_parallel"]
            build_sharded(self, PARTS, self._make_parts, partial(self._shard, mesh), mesh)
        codes = self.latent.num_codes if self.latent is not None and self.latent.has_codes else None
        self.train_metrics, self.val_metrics, self.test_metrics = (PreferenceMetrics(codes) for _ in range(3))
        self._trained = trained_shapes(self)
        self._built = True

    def _make_parts(self) -> None:
        torch.manual_seed(derive("weights", run_seed()))
        self.policy = self.policy_spec.build(self.tokenizer)
        self.reference = self._make_reference() if self.needs_reference else None
        device = torch.get_default_device()
        default = torch.get_default_dtype()
        if self.latent is not None:
            self.latent.narrow = self.device_mesh is not None
            torch.set_default_dtype(default if self.latent.narrow else torch.promote_types(default, torch.float32))
        try:
            with torch.device("cpu"):  # equal initial values on every kind of device
                self.build_latent(self.policy.width, self.policy.head)
                self.policy_spec.restore_latent(self.latent)
        finally:
            torch.set_default_dtype(default)
        if self.latent is not None:
            self.latent.to(device)
        self._try_compilation()

    def _make_reference(self) -> Reference:
        if self.reference_path is None:
            return REFERENCES[self.reference_kind](self.policy, self.policy_spec)
        if self.reference_kind == "cached" and self.device_mesh is not None:
            raise ConfigError(
                "model.reference: found cached with model.reference_path and a strategy that shards the weights, "
                "expected live."
            )
        other, spec = build_other(self.reference_path, self.policy_spec, self.tokenizer)
        return FrozenModel(other) if self.reference_kind == "live" else OtherReference(other, spec)

    def _should_compile(self) -> bool:
        """Return whether to compile. `auto` compiles on a GPU, in a run of at least `COMPILED_FROM` micro-batches.

        Compilation takes about a minute and saves tenths of a second in each step. It has not been shown that compiled
        runs are equal to the last bit, which `trainer.deterministic: true` is for.
        """
        if self.policy_spec.compile != "auto":
            return self.policy_spec.compile
        trainer: Any = self._trainer
        if not self._on_gpu or trainer is None or torch.are_deterministic_algorithms_enabled():
            return False
        data = preference_data(trainer)
        return data is not None and data.micro_batches() >= COMPILED_FROM

    def _try_compilation(self) -> None:
        """Find layers that cannot be compiled, before the layout of batches and the reference depend on them.

        `true` compiles without a trial, so that torch's own error shows the cause.
        """
        if self.policy_spec.compile != "auto" or not (self._on_gpu and self._should_compile() and self._packs):
            return
        for policy in policies_of(self):
            fault = fault_of_compilation(policy) if policy.takes_block_mask else None
            if fault is not None:
                policy.compiles = False
                rank_zero_warn(
                    f"policy.compile: found auto for {type(policy.backbone).__name__}, whose layers torch cannot "
                    f"compile whole ({fault}). It trains uncompiled, which takes more time. Set policy.compile to "
                    "false to leave out this trial, or to true to compile in spite of it."
                )

    @property
    def _on_gpu(self) -> bool:
        device = self.device if self._trainer is None else self._trainer.strategy.root_device
        return device.type == "cuda"

    @property
    def _packs(self) -> bool:
        data = None if self._trainer is None else preference_data(self._trainer)
        return self.policy.takes_block_mask if data is None else data.packs(self.policy)

    def _compile(self) -> None:
        if not self._should_compile():
            return
        whole = self._packs or not self._on_gpu
        if not whole:
            rank_zero_info(
                "policy.compile: found rows of one prompt and answer each, which have many shapes. Only the LM head is "
                "compiled. Compiled layers need data.layout auto, and a policy.attention that takes a block mask."
            )
        for policy in policies_of(self):
            if not whole:
                policy.compile_head()
            elif policy.compiles:
                policy.compile_layers(few_shapes=self._on_gpu, cuda_graphs=self._replays(policy))

    def _replays(self, policy: CausalPolicy) -> bool:
        """Return whether a compiled policy trains with CUDA graphs. Launches cost a large model no time.

        A graph reads the weights where they were at its capture. A sharded layer gathers them elsewhere in each step.
        DDP, even on one device, waits for gradients on a stream outside the capture, which ends it.
        """
        setting = self.policy_spec.cuda_graphs
        single = self._trainer is None or isinstance(self._trainer.strategy, SingleDeviceStrategy)
        alone = self.device_mesh is None and single
        is_on = sum(map(torch.numel, policy.parameters())) < GRAPHED_BELOW if setting == "auto" else setting
        return is_on and self._on_gpu and alone and not self.policy_spec.gradient_checkpointing

    def _shard(self, mesh: DeviceMesh) -> None:
        shard(self, mesh)
        self._compile()

    def reference_step(self, batch: PreferenceBatch) -> Tensor:
        """Return (2B,) log-probabilities under the published weights: untrained, or with the adapter off."""
        return self.policy.reference_logps(batch)

    def configure_optimizers(self) -> Any:
        """Create the optimizer over two parameter groups, and its schedule of warm-up and decay per optimizer step.

        Raises:
            ConfigError: The optimizer refuses its settings.
        """
        from transformers import get_scheduler  # the import takes a second, and only training needs it

        backbone = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [{"params": backbone, "name": "backbone"}] if backbone else []
        if latent := self.latent_parameters():
            groups.append({"params": latent, "name": "latent", "lr": self.latent_lr})
        try:
            optimizer = self.make_optimizer(groups)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"model.optimizer: {one_line(error)}") from error
        self._steps = steps = self._total_steps()
        schedule = get_scheduler(self.lr_schedule, optimizer, round(self.warmup_ratio * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by `trainer.gradient_clip_val`: each entry, or policy and latent space each by their own norm.

        In one norm, the larger gradient of one of them would scale down the steps of the other.

        Lightning refuses to clip gradients for a fused optimizer under mixed precision, because the loss scaler of
        float16 unscales inside such an optimizer. bfloat16 has no scaler, and for other optimizers the gradients are
        unscaled before this hook, so each group can be clipped. DeepSpeed clips by itself.
        """
        plugin = self.trainer.precision_plugin
        scaled = isinstance(plugin, MixedPrecision) and plugin.scaler is not None
        unscales_later = scaled and getattr(optimizer, "_step_supports_amp_scaling", False)  # as torch's scaler does
        if unscales_later or isinstance(plugin, DeepSpeedPrecision):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            clip = clip_grad_value_ if gradient_clip_algorithm == "value" else clip_grad_norm_
            for group in optimizer.param_groups:
                clip(group["params"], gradient_clip_val)

    def _total_steps(self) -> int:
        steps = total_steps(self.trainer)
        if steps == float("inf"):
            raise ConfigError(
                "trainer: found no end of training, expected max_steps or max_epochs. The schedules of the learning "
                "rate, g and tau need the number of steps."
            )
        return int(steps)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained weights alone: those of the policy or its adapter, and those of the latent space."""
        for key in set(WEIGHTS) & set(checkpoint):
            checkpoint[key] = {name: value for name, value in checkpoint[key].items() if name in self._trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture. DeepSpeed loads its own weights before this check.

        Raises:
            CheckpointError: Names or shapes of the weights differ.
        """
        if not self._built:
            self._build()
        if self._trainer is not None and isinstance(self._trainer.precision_plugin, DoublePrecision):
            self.double()  # Lightning does so after it has loaded the weights, which float32 would round
        if "state_dict" in checkpoint:
            check_same_architecture(self._trained, checkpoint["state_dict"])
        if set(WEIGHTS) <= set(checkpoint):  # `WeightAveraging` needs the frozen weights as well
            frozen = self.state_dict()
            for key in WEIGHTS:
                checkpoint[key] = frozen | checkpoint[key]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights like torch. Frozen weights, which no checkpoint holds, are not reported as missing."""
        result = super().load_state_dict(state_dict, strict, assign)
        result.missing_keys[:] = [name for name in result.missing_keys if name in self._trained]
        return result
