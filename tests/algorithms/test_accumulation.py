"""Windows of accumulated micro-batches: what each weighs, how long gradients live, and steps like a plain loop's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from lpc_lightning.algorithms import DPO, SimPO
from lpc_lightning.algorithms.accumulation import is_optimizer_step, share_of_window
from lpc_lightning.latent import MarginalSpace


class Windows(Callback):
    """Where windows end, and what each micro-batch weighs."""

    def __init__(self) -> None:
        self.closing: list[int] = []
        self.shares: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.shares.append(share_of_window(trainer, batch.pairs, batch_idx))
        if is_optimizer_step(trainer, batch_idx):
            self.closing.append(batch_idx)


@pytest.mark.parametrize(
    ("settings", "closing", "shares"),
    [
        # 21 pairs, 2 in a micro-batch: the last window has 5 of them, or 3, or 1.
        ({"accumulate_grad_batches": 4}, [3, 7, 10], [1.0] * 8 + [4 * 2 / 5, 4 * 2 / 5, 4 * 1 / 5]),
        ({"accumulate_grad_batches": 3}, [2, 5, 8, 10], [1.0] * 9 + [3 * 2 / 3, 3 * 1 / 3]),
        ({"accumulate_grad_batches": 2}, [1, 3, 5, 7, 9, 10], [1.0] * 10 + [2.0]),
        ({"accumulate_grad_batches": 1}, list(range(11)), [1.0] * 11),
        ({"accumulate_grad_batches": 4, "limit_train_batches": 6}, [3, 5], [1.0] * 4 + [2.0] * 2),
    ],
    ids=str,
)
def test_windows_end_when_full_or_with_the_epoch_and_weigh_by_pairs(
    settings: dict[str, Any], closing: list[int], shares: list[float], small_policy: Any, fit_run: Any
) -> None:
    seen = Windows()
    fit_run(SimPO(policy=small_policy()), max_epochs=1, limit_val_batches=0, callbacks=[seen], **settings)
    assert seen.closing == closing
    assert seen.shares == pytest.approx(shares, abs=1e-12)


class Gradients(Callback):
    """Of how many trained parameters there is a gradient, before each micro-batch, before each step and in the end."""

    def __init__(self) -> None:
        self.between: list[int] = []
        self.at_steps: list[int] = []

    @staticmethod
    def count(module: LightningModule) -> int:
        return sum(parameter.grad is not None for parameter in module.parameters())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.between.append(self.count(pl_module))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.at_steps.append(self.count(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.between.append(self.count(pl_module))


def test_they_go_with_the_step_and_stay_between_its_micro_batches(small_policy: Any, fit_run: Any) -> None:
    """11 micro-batches in an epoch, the last one a step of its own; validation comes in between."""
    seen = Gradients()
    module = DPO(policy=small_policy(), latent=MarginalSpace(num_codes=4, hidden=8, init_logit_std=1.0))
    fit_run(module, max_epochs=2, accumulate_grad_batches=2, val_check_interval=4, callbacks=[seen])
    trained = sum(parameter.requires_grad for parameter in module.parameters())
    assert seen.at_steps == [trained] * 2 * 6
    assert seen.between == ([0, trained] * 5 + [0]) * 2 + [0]


def test_accumulated_steps_are_those_of_a_plain_loop(
    small_policy: Any, small_data: Any, fit_run: Any, naive_logps: Callable[..., torch.Tensor]
) -> None:
    """-log sigmoid(beta D) by the model's own logits, its mean over the pairs of two micro-batches, plain descent."""
    rate, beta = 0.5, 0.1
    spec, data = small_policy(dtype="float64"), small_data()
    module = DPO(
        policy=spec,
        beta=beta,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate),
        lr_schedule="constant_with_warmup",
        warmup_ratio=0.0,
    )
    run = fit_run(module, data, max_epochs=1, precision="64-true", accumulate_grad_batches=2)

    model, reference = spec.build().causal_lm, spec.build().causal_lm
    known = {pair.id: pair for pair in data.pairs["train"]}
    starts = range(0, len(run.batches), 2)
    for start in starts:
        pairs = [known[name] for batch in run.batches[start : start + 2] for name in batch]
        with torch.no_grad():
            published = naive_logps(reference, pairs)
        chosen, rejected = (naive_logps(model, pairs) - published).chunk(2)
        (-logsigmoid(beta * (chosen - rejected))).mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * parameter.grad
                parameter.grad = None
    assert len(starts) == 6
    for name, weight in model.named_parameters():
        assert_close(run.weights[f"policy.model.{name}"], weight, rtol=0, atol=1e-7)
    start = dict(reference.named_parameters())
    assert all((weight - start[name]).abs().max() > 1e-4 for name, weight in model.named_parameters())
