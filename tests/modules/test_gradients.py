"""Gradients live from the first micro-batch of a step to its end, and the step is that of a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from lpc_lightning.latent import MarginalSpace
from lpc_lightning.modules import DPO


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
    module = DPO(policy=small_policy(), latent=MarginalSpace(codes=4, hidden=8, spread=1.0))
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
        warmup=0.0,
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
