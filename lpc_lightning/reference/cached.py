"""Reference log-probabilities that are computed before training, or read from the cache of an earlier run."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor

from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.data.datamodule import Stage
from lpc_lightning.data.trainer_data import required_data
from lpc_lightning.distributed.sharding import reshard
from lpc_lightning.errors import ConfigError
from lpc_lightning.files.integrity import code_digest
from lpc_lightning.policy import CausalPolicy, PolicySpec, policy_fingerprint
from lpc_lightning.policy.segment_attention import SEGMENT
from lpc_lightning.reference.live import PolicyOwner
from lpc_lightning.reference.pair_cache import PairCache
from lpc_lightning.reference.pair_pass import PairFunction
from lpc_lightning.reference.shared_pass import shared_pass
from lpc_lightning.types import PreferenceBatch

CODE = ("policy", "reference", "algorithms/warm_start")
"""Folders whose code determines the values of caches."""


OpenFunction = Callable[[], AbstractContextManager[PairFunction]]
"""Context manager that yields a function of pairs."""


@dataclass(frozen=True)
class Pass:
    """Work of a run before its first step."""

    pairs: int
    """Pairs that were missing in the cache."""
    seconds: float
    """Seconds for these pairs, including reading and writing of the cache."""


class CachedReference(ABC):
    """Reference that is not in memory: batches carry its log-probabilities.

    Before a run, a model computes the values that the run will read and the cache lacks.
    """

    setting: str
    """Setting that names the model."""
    logps = staticmethod(PreferenceBatch.cached_reference_logps)
    """Function from a batch to the (2B,) values that it carries. A step calls the batch without passing this file."""

    def __init__(self, policy: CausalPolicy, spec: PolicySpec) -> None:
        """Keep a fingerprint of the reference's weights.

        Args:
            policy: The model, before training.
            spec: Spec that it was built from.
        """
        self._spec, self._weights = spec, policy_fingerprint(policy)
        self.passes: dict[Stage, Pass] = {}
        """Work of the last run, by stage."""

    def prepare(self, module: PolicyOwner, untouched: bool) -> None:
        """Compute what this run will read and the cache lacks, and attach the values to the batches.

        Raises:
            ConfigError: The trainer's data is no PreferenceDataModule, or the published weights have changed.
            UnsupportedPolicyError: Values of long pairs would depend on their batch, or the model cannot read the
                longest pair.
        """
        trainer: Any = module.trainer
        data = required_data(
            trainer,
            "model.reference: found cached",
            "Set model.reference: live for other data, whose pairs have no index in a token cache.",
        )
        # Lightning builds models under the run's device as the default one.
        with torch.device("cpu"):
            model = self.model()
            data.check_lengths(model)
            open_function = partial(self._open_published, module, model, untouched)
            for stage in data.stages:
                self._prepare_stage(stage, data, trainer, model, open_function)

    @abstractmethod
    def model(self) -> CausalPolicy:
        """Return a model whose kernels and settings are those of the reference."""

    @abstractmethod
    def published(
        self, module: PolicyOwner, model: CausalPolicy, untouched: bool
    ) -> tuple[CausalPolicy, Callable[[PreferenceBatch], Tensor]]:
        """Return a model with the published weights, and the function that computes its (2B,) log-probabilities.

        Args:
            module: See `prepare`.
            model: The result of `model`.
            untouched: See `prepare`.
        """

    def build(self) -> CausalPolicy:
        """Build the reference again.

        Raises:
            ConfigError: Its weights are not those of the first time.
        """
        policy = self._spec.build()
        if policy_fingerprint(policy) != self._weights:
            raise ConfigError(
                f"{self.setting}: found other weights than those that this module was built from, expected the same "
                "weights for its reference. Build the module again, or set model.reference: live before training."
            )
        return policy

    def _prepare_stage(
        self, stage: Stage, data: PreferenceDataModule, trainer: Any, model: CausalPolicy, open_function: OpenFunction
    ) -> None:
        pairs, reads, start = data.pairs[stage], np.array(sorted(data.reads(stage)), dtype=int), time.perf_counter()
        key, layout = computation_key(self._weights, model, trainer), data.make_layout()
        title = f"reference, {stage} pairs"
        logps = np.full((len(pairs), 2), np.nan)
        missing = 0
        for part, rows, places in pairs.parts(reads):
            began = time.perf_counter()
            cache = PairCache("reference", 2, key, part, data.cache_dir)
            distinct, inverse = np.unique(rows, return_inverse=True)
            values, computed = shared_pass(cache, part, distinct, layout, open_function, trainer, title)
            logps[reads[places]] = values[inverse]
            missing += computed
            took = f"{computed} computed in {time.perf_counter() - began:.1f} s" if computed else "none computed"
            reused = len(distinct) - computed
            rank_zero_info(f"{stage}: reference log-probabilities in {cache.folder}: {reused} pairs reused, {took}.")
        data.attach_reference(stage, logps)
        self.passes[stage] = Pass(missing, time.perf_counter() - start)

    @contextmanager
    def _open_published(self, module: PolicyOwner, model: CausalPolicy, untouched: bool) -> Iterator[PairFunction]:
        """Yield the log-probabilities (B, 2) of a batch under the published weights, on the run's device."""
        trainer: Any = module.trainer
        policy, logps = self.published(module, model, untouched)
        trainer.precision_plugin.convert_module(policy).to(trainer.strategy.root_device)
        yield lambda batch: logps(batch).view(2, -1).T
        reshard(module)


class OwnReference(CachedReference):
    """The policy as it was before training.

    The policy itself equals it until a checkpoint is loaded or training begins. For a policy that is already trained,
    the published weights are loaded beside it during the pass.
    """

    setting = "policy"

    def __init__(self, policy: CausalPolicy, spec: PolicySpec) -> None:
        """Keep the policy.

        Args:
            policy: The policy before training.
            spec: Spec that it was built from.
        """
        super().__init__(policy, spec)
        self._policy = policy

    def model(self) -> CausalPolicy:
        """Return the policy."""
        return self._policy

    def published(
        self, module: PolicyOwner, model: CausalPolicy, untouched: bool
    ) -> tuple[CausalPolicy, Callable[[PreferenceBatch], Tensor]]:
        """Return the policy if it has the published weights, else the reference built again, with the same kernels."""
        if untouched or self._has_published_weights(model):
            return model, module.reference_step
        policy = self.build()
        policy.compile_like(model)
        return policy, policy.reference_logps

    def _has_published_weights(self, model: CausalPolicy) -> bool:
        """Return True for a policy that was only built, or validated, before this run. Shards cannot be compared."""
        sharded = any(isinstance(weight, DTensor) for weight in model.parameters())
        return not sharded and policy_fingerprint(model) == self._weights


class OtherReference(CachedReference):
    """Another model, which is in memory until the end of the pass."""

    setting = "model.reference_path"

    def __init__(self, policy: CausalPolicy, spec: PolicySpec) -> None:
        """Keep the model for the first pass.

        Args:
            policy: The other model.
            spec: Spec that it was built from.
        """
        super().__init__(policy, spec)
        self._first: CausalPolicy | None = policy

    def prepare(self, module: PolicyOwner, untouched: bool) -> None:
        """See `CachedReference.prepare`. Afterwards the model is not in memory."""
        super().prepare(module, untouched)
        self._first = None

    def model(self) -> CausalPolicy:
        """Return the model, built again from the second run on."""
        return self.build() if self._first is None else self._first

    def published(
        self, module: PolicyOwner, model: CausalPolicy, untouched: bool
    ) -> tuple[CausalPolicy, Callable[[PreferenceBatch], Tensor]]:
        """Return the model, which is never trained."""
        return model, model.reference_logps


def computation_key(weights: str, policy: CausalPolicy, trainer: Any) -> dict[str, str]:
    """Return the key of a `PairCache`: everything but the tokens that changes the values of a pair.

    In bfloat16, log-probabilities of long answers differ by about a nat between a CPU and a GPU. Kernel and device are
    those that run, not those of the settings.

    Args:
        weights: Fingerprint of the weights.
        policy: Policy with these weights.
        trainer: Trainer whose device and precision are used.
    """
    device = trainer.strategy.root_device
    name = f" {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return {
        "weights": weights,
        "attention": attention_kernel(policy.causal_lm.config._attn_implementation, device, policy.block_sparse),
        "compiled": str(policy.is_compiled or policy.head.compiled),
        "precision": trainer.precision,
        "products": torch.get_float32_matmul_precision(),
        "device": device.type + name,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "code": code_digest(*CODE),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def attention_kernel(setting: str, device: torch.device, block_sparse: bool = False) -> str:
    """Return the attention kernel that runs on a device.

    Args:
        setting: Kernel that the model is set to.
        device: The device.
        block_sparse: True if compiled layers skip blocks without visible tokens.
    """
    if setting == SEGMENT and device.type != "cpu":
        return "flex_attention" if block_sparse else "sdpa"
    return setting
