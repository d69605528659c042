"""Tests that losses, rewards, log-probabilities and metrics of a step come from one pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lpc_lightning.algorithms import DPO, IPO, SimPO
from lpc_lightning.latent import GumbelSpace, LatentSpace, MarginalSpace
from lpc_lightning.policy import logprobs

LATENTS: dict[str, Callable[[], LatentSpace] | None] = {
    "plain": None,
    "gumbel": lambda: GumbelSpace(num_codes=4, hidden=8, init_logit_std=1.0),
    "marginal": lambda: MarginalSpace(num_codes=4, hidden=8, init_logit_std=1.0),
}


class Count(Callback):
    """Counts passes of the backbones of policy and reference, and passes of the head per answer token."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.steps: list[Counter[str]] = []
        self._head_rows = 0
        real = logprobs._logits

        def counted(states: torch.Tensor, *head: Any) -> torch.Tensor:
            self._head_rows += len(states)
            return real(states, *head)

        patch.setattr(logprobs, "_logits", counted)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def watch(owner: Any, name: str) -> None:
            owner.policy.backbone.register_forward_hook(lambda *_: self.steps[-1].update([name]))

        watch(pl_module, "policy")
        if hasattr(pl_module.reference, "policy"):
            watch(pl_module.reference, "reference")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(Counter())
        self._head_rows = 0

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self.steps[-1]["head rows, forward"] = self._head_rows
        self._head_rows = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        tokens = len(batch.targets)
        self.steps[-1]["head, forward"] = self.steps[-1].pop("head rows, forward") / tokens
        self.steps[-1]["head, backward"] = self._head_rows / tokens


@pytest.mark.slow
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize(
    ("algorithm", "reference", "reference_passes"),
    [(DPO, "cached", 0), (DPO, "live", 1), (IPO, "cached", 0), (SimPO, None, 0)],
    ids=["DPO cached", "DPO live", "IPO cached", "SimPO"],
)
def test_step_runs_backbone_and_head_once(
    algorithm: Any,
    reference: str | None,
    reference_passes: int,
    latent: str,
    small_policy: Any,
    fit_run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space, settings = LATENTS[latent], {} if reference is None else {"reference": reference}
    count = Count(monkeypatch)
    module = algorithm(policy=small_policy(), latent=space and space(), **settings)
    run = fit_run(module, max_steps=4, limit_val_batches=0, callbacks=[count], accumulate_grad_batches=2)
    # The head's logits are not kept. The backward pass computes them again.
    expected = {"policy": 1, "head, forward": 1 + reference_passes, "head, backward": 1} | (
        {"reference": 1} if reference_passes else {}
    )
    assert [dict(step) for step in count.steps] == [expected] * 8
    metrics = run.training[0]
    assert {"train/loss", "train/rewards/accuracies", "train/logps/chosen", "train/rewards/margins"} <= set(metrics)
    assert ("train/latent/prior_entropy" in metrics) == (latent != "plain")
