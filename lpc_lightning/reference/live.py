"""Where the log-probabilities under the reference come from: the policy as it was before training."""

from __future__ import annotations

import copy
from typing import Any, Protocol

from torch import Tensor, nn

from lpc_lightning.policy import CausalPolicy, PolicySpec
from lpc_lightning.types import PreferenceBatch


class PolicyOwner(Protocol):
    """What a reference needs of the LightningModule that owns the policy."""

    @property
    def trainer(self) -> Any:
        """The trainer of the current run."""

    def reference_step(self, batch: PreferenceBatch) -> Tensor:
        """(2B,) log-probabilities of the answers under the published weights."""


class Reference(Protocol):
    """What a module asks for the reference's log-probabilities."""

    def prepare(self, module: PolicyOwner, untouched: bool) -> None:
        """Get ready for a run of the module's trainer, before any checkpoint is loaded.

        Args:
            module: The module, built, and its data set up.
            untouched: Whether its policy's weights are still the published ones.
        """

    def logps(self, batch: PreferenceBatch) -> Tensor:
        """(2B,) log-probabilities of the answers, in nats, without gradient."""


class AdapterOff:
    """The reference of a LoRA policy: the same weights with the adapter off, asked at every batch."""

    def __init__(self, policy: CausalPolicy) -> None:
        """Keep the policy.

        Args:
            policy: The policy in training.
        """
        self.logps = policy.reference_logps

    def prepare(self, module: PolicyOwner, untouched: bool) -> None:
        """Nothing to do."""


class FrozenCopy(nn.Module):
    """A second model in memory, asked at every batch."""

    def __init__(self, policy: CausalPolicy) -> None:
        """Copy the policy.

        Args:
            policy: The policy, not trained yet.
        """
        super().__init__()
        # Not in eval mode: dropout is off, so that modes do not differ, and Lightning warns of mixed ones.
        self.policy = copy.deepcopy(policy).requires_grad_(False)
        self.policy.set_gradient_checkpointing(False)

    def prepare(self, module: PolicyOwner, untouched: bool) -> None:
        """Nothing to do."""

    def logps(self, batch: PreferenceBatch) -> Tensor:
        """(2B,) log-probabilities of the answers."""
        return self.policy.reference_logps(batch)


def live_reference(policy: CausalPolicy, spec: PolicySpec) -> Reference:
    """A reference that is asked at every batch.

    Args:
        policy: The policy, not trained yet.
        spec: What it was built from.
    """
    return FrozenCopy(policy) if spec.lora is None else AdapterOff(policy)
