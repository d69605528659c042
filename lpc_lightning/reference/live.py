"""The reference: log-probabilities under the policy as it was before training."""

from __future__ import annotations

import copy
from typing import Any, Protocol

from torch import Tensor, nn

from lpc_lightning.data.trainer_data import preference_data
from lpc_lightning.policy import CausalPolicy, PolicySpec
from lpc_lightning.types import PreferenceBatch


class PolicyOwner(Protocol):
    """What a reference needs of the LightningModule that owns the policy."""

    @property
    def trainer(self) -> Any:
        """The trainer of the current run."""

    def reference_step(self, batch: PreferenceBatch) -> Tensor:
        """Return (2B,) log-probabilities of the answers under the published weights."""


class Reference(Protocol):
    """Source of the reference's log-probabilities."""

    def prepare(self, module: PolicyOwner, untouched: bool) -> None:
        """Prepare for a run of the module's trainer, before any checkpoint is loaded.

        Args:
            module: The module. It is built and its data is set up.
            untouched: True if the policy's weights, without an adapter, are surely still the published ones.
        """

    def logps(self, batch: PreferenceBatch) -> Tensor:
        """Return (2B,) log-probabilities of the answers, in nats, without gradient. Called in every step."""


class SharedModel:
    """Reference in the policy's own weights, run at every batch: without the adapter in training, or all frozen."""

    def __init__(self, policy: CausalPolicy) -> None:
        """Keep the policy.

        Args:
            policy: The policy, with an adapter in training or frozen.
        """
        self.logps = policy.reference_logps

    def prepare(self, module: PolicyOwner, untouched: bool) -> None:
        """Do nothing."""


class FrozenModel(nn.Module):
    """Reference as a second model in memory, run at every batch."""

    def __init__(self, policy: CausalPolicy) -> None:
        """Freeze a model.

        Args:
            policy: A model of its own: a copy of the untrained policy, or another model.
        """
        super().__init__()
        # Not in eval mode: dropout is off, so that the modes do not differ. Lightning warns if modes are mixed.
        self.policy = policy.requires_grad_(False)
        self.policy.set_gradient_checkpointing(False)
        self.logps = self.policy.reference_logps

    def prepare(self, module: PolicyOwner, untouched: bool) -> None:
        """Check that the model can read the longest pair, and has the same log-probabilities for it in each batch."""
        if (data := preference_data(module.trainer)) is not None:
            data.check_lengths(self.policy)


def live_reference(policy: CausalPolicy, spec: PolicySpec) -> Reference:
    """Make a reference that runs at every batch.

    Args:
        policy: The policy, not trained yet.
        spec: Spec that the policy was built from.
    """
    if spec.lora is not None or not spec.trainable:
        return SharedModel(policy)
    return FrozenModel(copy.deepcopy(policy))
