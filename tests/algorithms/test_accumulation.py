"""Tests of gradient accumulation: weights of micro-batches, lifetime of gradients, and steps of a plain loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from lpc_lightning.algorithms import DPO, KTO, SimPO
from lpc_lightning.algorithms.base import is_optimizer_step, window_weight
from lpc_lightning.data import PreferenceData
from lpc_lightning.errors import ConfigError
from lpc_lightning.latent import MarginalSpace
from lpc_lightning.robust import REPO


class Windows(Callback):
    """Records where windows end and the weight of each micro-batch."""

    def __init__(self) -> None:
        self.closing: list[int] = []
        self.weights: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.weights.append(window_weight(trainer, batch.pairs, batch_idx))
        if is_optimizer_step(trainer, batch_idx):
            self.closing.append(batch_idx)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "closing", "weights"),
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
def test_window_ends_and_weights(
    settings: dict[str, Any], closing: list[int], weights: list[float], small_policy: Any, fit_run: Any
) -> None:
    recorder = Windows()
    fit_run(SimPO(policy=small_policy()), max_epochs=1, limit_val_batches=0, callbacks=[recorder], **settings)
    assert recorder.closing == closing
    assert recorder.weights == pytest.approx(weights, abs=1e-12)


class Gradients(Callback):
    """Counts the parameters with a gradient before each micro-batch, before each step and at the end."""

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


def test_gradients_live_within_a_window(small_policy: Any, fit_run: Any) -> None:
    """An epoch has 11 micro-batches, the last of which is a step of its own. Validations run in between."""
    recorder = Gradients()
    module = DPO(policy=small_policy(), latent=MarginalSpace(num_codes=4, hidden=8, init_logit_std=1.0))
    fit_run(module, max_epochs=2, accumulate_grad_batches=2, val_check_interval=4, callbacks=[recorder])
    trained = sum(parameter.requires_grad for parameter in module.parameters())
    assert recorder.at_steps == [trained] * 2 * 6
    assert recorder.between == ([0, trained] * 5 + [0]) * 2 + [0]


def test_accumulated_steps_equal_plain_loop(
    small_policy: Any, small_data: Any, fit_run: Any, naive_logps: Callable[..., torch.Tensor]
) -> None:
    """The oracle is plain gradient descent on the mean of -log sigmoid(beta D) over two micro-batches."""
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
    pairs_by_id = {pair.id: pair for pair in data.pairs["train"]}
    starts = range(0, len(run.batches), 2)
    for start in starts:
        pairs = [pairs_by_id[name] for batch in run.batches[start : start + 2] for name in batch]
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


def test_margins_are_refused_before_any_pass(small_policy: Any, fit_run: Any, tmp_path: Path) -> None:
    path, cache = tmp_path / "pairs.jsonl", tmp_path / "cache"
    row = {"prompt": "one", "chosen": "two", "rejected": "three", "margin": 0.5}
    path.write_text(json.dumps(row) + "\n")
    data = PreferenceData(str(path), validation_share=0.0, cache_dir=str(cache))
    with pytest.raises(ConfigError, match=r"model: margins: found margins of pairs, expected none, because KTO judges"):
        fit_run(KTO(policy=small_policy()), data, max_steps=1)
    assert not (cache / "reference").exists()


def test_weighted_steps_equal_plain_loop(
    small_policy: Any, fit_run: Any, naive_logps: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    """The oracle is gradient descent on sum(w_i l_i) / sum(w_i) over the pairs of each step, l = -log s(beta D - m).

    A step has three micro-batches of 2 pairs, the last one of an epoch has one with a single pair. Two pairs have the
    weight 0, and so all pairs of a micro-batch may have it.
    """
    rate, beta = 0.5, 0.1
    numbers = {f"pair {n}": (float(n % 4), n / 4 - 1) for n in range(11)}
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
    rows = [
        {"id": name, "prompt": word, "chosen": word * 2, "rejected": word * 3, "weight": weight, "margin": margin}
        for word, (name, (weight, margin)) in zip(words, numbers.items(), strict=True)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceData(str(path), validation_share=0.0, batch_size=2, cache_dir=str(tmp_path / "cache"))
    spec = small_policy(dtype="float64")
    module = DPO(
        policy=spec,
        beta=beta,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate),
        lr_schedule="constant_with_warmup",
        warmup_ratio=0.0,
    )
    run = fit_run(module, data, max_epochs=2, precision="64-true", accumulate_grad_batches=3)

    model, reference = spec.build().causal_lm, spec.build().causal_lm
    pairs_by_id = {pair.id: pair for pair in data.pairs["train"]}
    losses = []
    for epoch in range(2):
        batches = run.batches[6 * epoch : 6 * epoch + 6]
        for start in (0, 3):
            pairs = [pairs_by_id[name] for batch in batches[start : start + 3] for name in batch]
            weights, margins = torch.tensor([numbers[pair.id] for pair in pairs], dtype=torch.float64).T
            with torch.no_grad():
                published = naive_logps(reference, pairs)
            chosen, rejected = (naive_logps(model, pairs) - published).chunk(2)
            loss = (weights * -logsigmoid(beta * (chosen - rejected) - margins)).sum() / weights.sum()
            loss.backward()
            losses.append(loss.item())
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= rate * parameter.grad
                    parameter.grad = None
    assert run.losses == pytest.approx(losses, rel=1e-9)
    for name, weight in model.named_parameters():
        assert_close(run.weights[f"policy.model.{name}"], weight, rtol=0, atol=1e-7)


class Engine(SingleDeviceStrategy):
    """Accumulates as Lightning's strategy for DeepSpeed and DeepSpeed's engine do (engine.py, `backward` and `step`).

    Lightning calls the optimizer and its hooks after every micro-batch. The engine divides each gradient by the length
    of the window and takes a step when the window is full.
    """

    def __init__(self, window: int) -> None:
        super().__init__("cpu")
        self.window, self.micro_steps = window, 0

    @property
    def handles_gradient_accumulation(self) -> bool:
        return True

    def backward(self, closure_loss: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().backward(closure_loss / self.window, *args, **kwargs)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        output = closure()
        self.precision_plugin._after_closure(self.lightning_module, optimizer)
        self.micro_steps += 1
        if self.micro_steps % self.window == 0:
            optimizer.step()
        return output


@pytest.mark.parametrize("weighted", [False, True])
def test_deepspeed_accumulation_equals_lightnings(
    weighted: bool, small_policy: Any, fit_run: Any, tmp_path: Path
) -> None:
    rows = [
        {"prompt": word, "chosen": word * 2, "rejected": word * 3, "annotator": word[0]}
        | ({"weight": len(word)} if weighted else {})
        for word in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = []
    for strategy in ("auto", Engine(window=3)):
        module = DPO(
            policy=small_policy(),
            latent=MarginalSpace(num_codes=4, hidden=8, init_logit_std=1.0),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
            robust_loss=REPO(),
        )
        data = PreferenceData(str(path), validation_share=0.0, batch_size=2, cache_dir=str(tmp_path / "cache"))
        runs.append(fit_run(module, data, max_epochs=2, accumulate_grad_batches=3, strategy=strategy))
    expected, actual = runs
    assert actual.trainer.global_step == expected.trainer.global_step == 4
    assert_close(actual.module.state_dict(), expected.module.state_dict(), rtol=1e-5, atol=1e-6)
    learned = [run.module.robust_loss.learned.values for run in runs]
    assert_close(learned[1], learned[0], rtol=1e-6, atol=0)
    assert len(learned[0]) == 6
    assert (learned[0] != 0.9).all()


def test_deepspeed_epochs_end_within_window(small_policy: Any, fit_run: Any) -> None:
    """11 micro-batches in an epoch. The engine's third step would hold micro-batches of two epochs."""

    def fit(**settings: Any) -> int:
        options: dict[str, Any] = {"accumulate_grad_batches": 4, "limit_val_batches": 0}
        run = fit_run(SimPO(policy=small_policy()), strategy=Engine(window=4), **options | settings)
        return int(run.trainer.global_step)

    for settings in ({"max_epochs": 2}, {"max_steps": 3}):
        with pytest.raises(ConfigError) as error:
            fit(**settings)
        assert str(error.value).startswith(
            "trainer.accumulate_grad_batches: found 4, and 11 micro-batches in an epoch on each device, expected a "
            "multiple of 4: Engine would go on with the same step"
        )
        assert "Set trainer.limit_train_batches to 8, or" in str(error.value)
    assert fit(max_epochs=2, limit_train_batches=8) == 4
    assert fit(max_epochs=1) == fit(max_steps=2) == 2
