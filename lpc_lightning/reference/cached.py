"""Log-probabilities under the reference that were worked out before training, or by an earlier run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.data.datamodule import Stage
from lpc_lightning.distributed.sharding import reshard
from lpc_lightning.errors import ConfigError
from lpc_lightning.policy import CausalPolicy, PolicySpec, fingerprint
from lpc_lightning.policy.segment_attention import SEGMENT
from lpc_lightning.reference.pair_cache import PairCache
from lpc_lightning.reference.pair_pass import Ask
from lpc_lightning.reference.shared_pass import shared_pass
from lpc_lightning.types import PreferenceBatch

if TYPE_CHECKING:
    from lpc_lightning.algorithms.policy_module import PolicyModule


@dataclass(frozen=True)
class Pass:
    """What a run had to work out before its first step."""

    pairs: int
    """Pairs that the cache did not hold."""
    seconds: float
    """What these took, the cache's own reading and writing included."""


class CachedReference:
    """A reference that is not in memory: batches bring its log-probabilities along.

    Before a run, what it will read and the cache does not hold is worked out by the policy itself: that is the
    reference until a checkpoint is loaded or training begins. For a policy that has been trained already, the published
    weights are loaded beside it for as long as that takes.
    """

    def __init__(self, policy: CausalPolicy, spec: PolicySpec) -> None:
        """Note whose log-probabilities they are.

        Args:
            policy: The policy, not trained yet.
            spec: What it was built from.
        """
        self._policy, self._spec = policy, spec
        self._weights = fingerprint(policy)
        self.passes: dict[Stage, Pass] = {}
        """What the last run worked out, by stage."""

    def logps(self, batch: PreferenceBatch) -> Tensor:
        """(2B,) log-probabilities that the batch brings along.

        Raises:
            ConfigError: It brings none.
        """
        logps = batch.reference_logps
        if logps is None:
            raise ConfigError(
                f"model.reference: found cached, and pairs without log-probabilities under the reference (the first is "
                f"{batch.ids[0]!r}). Expected batches that a PreferenceDataModule makes for a run of the trainer; set "
                "model.reference: live for others."
            )
        return logps.to(torch.float64 if self._policy.causal_lm.dtype == torch.float64 else torch.float32)

    def prepare(self, module: PolicyModule, untouched: bool) -> None:
        """Fill the cache with what this run will read, and have the batches bring it along.

        Raises:
            ConfigError: The trainer's data cannot do so, or the published weights have changed.
        """
        trainer: Any = module.trainer
        data = trainer.datamodule
        if not isinstance(data, PreferenceDataModule):
            raise ConfigError(
                f"model.reference: found cached with data of {type(data).__name__}, expected a PreferenceDataModule: "
                "pairs are known by their place in its token cache. Set model.reference: live for other data."
            )
        # Lightning builds models under the run's device as the default one.
        with torch.device("cpu"):
            for stage in data.stages:
                self._prepare_stage(stage, data, trainer, module, untouched)

    def _prepare_stage(
        self, stage: Stage, data: PreferenceDataModule, trainer: Any, module: PolicyModule, untouched: bool
    ) -> None:
        pairs, reads, start = data.pairs[stage], sorted(data.reads(stage)), time.perf_counter()
        cache = PairCache("reference", 2, how_computed(self._weights, self._policy, trainer), pairs, data.cache_dir)
        asking, title = partial(self._published, module, untouched), f"reference, {stage} pairs"
        found, missing = shared_pass(cache, pairs, reads, data.make_layout(), asking, trainer, title)
        logps = np.full((len(pairs), 2), np.nan)
        logps[reads] = found
        data.attach_reference(stage, logps)
        self.passes[stage] = passed = Pass(missing, time.perf_counter() - start)
        took = f"{passed.pairs} computed in {passed.seconds:.1f} s" if missing else "none computed"
        reused = len(reads) - missing
        rank_zero_info(f"{stage}: reference log-probabilities in {cache.folder}: {reused} pairs reused, {took}.")

    @contextmanager
    def _published(self, module: PolicyModule, untouched: bool) -> Iterator[Ask]:
        """The published weights on the run's device and in its precision."""
        trainer: Any = module.trainer
        policy = self._policy if untouched else self._spec.build()
        if not untouched and fingerprint(policy) != self._weights:
            raise ConfigError(
                "policy: found other weights than those that this module was built from, expected the same: its "
                "reference is lost. Build the module anew, or set model.reference: live before it is trained."
            )
        trainer.precision_plugin.convert_module(policy).to(trainer.strategy.root_device)
        logps = module.reference_step if untouched else policy.reference_logps
        yield lambda batch: logps(batch).view(2, -1).T
        reshard(module)


def how_computed(weights: str, policy: CausalPolicy, trainer: Any) -> dict[str, str]:
    """What decides the numbers that a policy of these weights says of pairs: the key of a `PairCache`.

    In bfloat16, log-probabilities of long answers are about a nat apart between a CPU and a GPU.

    Args:
        weights: Fingerprint of the weights.
        policy: Has them.
        trainer: Whose device and precision are used.
    """
    device = trainer.strategy.root_device
    return {
        "weights": weights,
        "attention": attention_kernel(policy.causal_lm.config._attn_implementation, device),
        "precision": trainer.precision,
        "products": torch.get_float32_matmul_precision(),
        "device": device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def attention_kernel(setting: str, device: torch.device) -> str:
    """The attention kernel that runs on a device for the kernel that a model is set to."""
    return "sdpa" if setting == SEGMENT and device.type != "cpu" else setting
