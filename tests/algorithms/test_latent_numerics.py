"""Numerics of a latent space in training: agreement of both paths, types, clipping, and a frozen policy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.amp import GradScaler

from lpc_lightning.algorithms import DPO
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.errors import ConfigError
from lpc_lightning.latent import GumbelSpace, MarginalSpace
from lpc_lightning.policy import LoRA, TinyPolicy


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def marginal(**settings: Any) -> MarginalSpace:
    return MarginalSpace(**({"num_codes": 4, "hidden": 8, "init_logit_std": 1.0} | settings))


@pytest.mark.parametrize(("mixed", "tolerance"), [(True, 0.02), (False, 1e-4)], ids=["bf16-mixed", "32-true"])
def test_z_and_all_codes_agree(
    mixed: bool, tolerance: float, make_pairs: Callable[..., Any], perturb: Callable[..., None]
) -> None:
    """Answers of up to 80 tokens under each code, and under mixtures of codes, by both paths through the head."""
    latent = marginal()
    module = DPO(policy=TinyPolicy(width=64, layers=2, heads=2, context=512), latent=latent)
    torch.manual_seed(0)
    module.configure_model()
    perturb(module.policy, deviation=0.02)
    perturb(latent.prior, deviation=0.5)
    batch = PaddedLayout(0)(make_pairs([(9, 80, 60), (5, 40, 70), (17, 1, 50)]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        forward = module.policy(batch)
        zs = [latent.infer(forward.states.prompt, mode) for mode in (0, 1, 2, 3, "mean")]
        assert all(z.dtype == torch.float32 for z in zs)
        plain = forward.logps()
        for z in zs:
            by_code = forward.logps_per_code(z).view(2, 3, 3).diagonal(dim1=1, dim2=2).flatten()
            torch.testing.assert_close(forward.logps(z), by_code, rtol=0, atol=tolerance)
            # The difference is small against what a code does.
            assert (forward.logps(z) - plain).abs().max() > 1.0


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true"])
def test_latent_and_its_moments_are_float32(precision: Any, small_policy: Any, fit_run: Any) -> None:
    latent = GumbelSpace(num_codes=3, hidden=8)
    module = DPO(policy=small_policy(), latent=latent, optimizer=adam)
    run = fit_run(module, max_steps=2, precision=precision, limit_val_batches=0)
    assert {value.dtype for value in latent.state_dict().values()} == {torch.float32}
    (optimizer,) = run.trainer.optimizers
    for parameter in latent.parameters():
        moments = (optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq"))
        assert {moment.dtype for moment in moments} == {torch.float32}
    narrow = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {value.dtype for value in module.policy.parameters()} == {narrow}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_gradients_are_clipped_by_group(precision: Any, small_policy: Any, fit_run: Any) -> None:
    """With SGD at rate 0.001, the change of the weights is a thousandth of the clipped gradient."""
    # Lightning replaces float16 on a CPU by bfloat16, unless it is given the plugin.
    half: dict[str, Any] = {"plugins": [MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=1024.0))]}
    settings = half if precision == "16-mixed" else {"precision": precision}
    changes: list[tuple[dict[str, float], dict[str, float]]] = []

    def norms(values: dict[str, Tensor]) -> dict[str, float]:
        parts = {part: [value for name, value in values.items() if name.startswith(part)] for part in PARTS}
        return {part: float(torch.cat([value.flatten() for value in of]).norm()) for part, of in parts.items()}

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            named = dict(pl_module.named_parameters())
            self.before = {name: value.detach().clone() for name, value in named.items()}
            self.gradients = norms({name: value.grad for name, value in named.items() if value.grad is not None})

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            now = {name: value.detach() - self.before[name] for name, value in pl_module.named_parameters()}
            changes.append((self.gradients, norms(now)))

    PARTS = ("policy", "latent")
    module = DPO(
        policy=small_policy(), latent=marginal(), optimizer=sgd, latent_lr=1e-3, lr_schedule="constant_with_warmup",
        warmup_ratio=0.0, beta=1.0,
    )  # fmt: skip
    fit_run(module, max_steps=3, gradient_clip_val=0.5, limit_val_batches=0, callbacks=[Watch()], **settings)
    for gradients, change in changes:
        for part in PARTS:
            assert 1e3 * change[part] == pytest.approx(min(gradients[part], 0.5), rel=1e-2, abs=1e-4)
    assert any(gradients["latent"] < 0.5 < gradients["policy"] for gradients, _ in changes)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_by_value(precision: Any, small_policy: Any, fit_run: Any) -> None:
    """The default optimizer is fused. The gradients are read before and after they are clipped."""
    gradients: list[list[Tensor]] = []

    class Watch(Callback):
        def read(self, optimizer: Any) -> None:
            grads = (weight.grad for group in optimizer.param_groups for weight in group["params"])
            gradients.append([grad.clone() for grad in grads if grad is not None])

        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            self.read(optimizer)

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            self.read(trainer.optimizers[0])

    module = DPO(policy=small_policy(), latent=marginal(init_logit_std=0.1), beta=1.0)
    clipping: dict[str, Any] = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    fit_run(module, max_steps=1, precision=precision, limit_val_batches=0, callbacks=[Watch()], **clipping)
    before, after = (torch.cat([grad.flatten() for grad in of]) for of in gradients)
    assert before.abs().max() > 0.01
    assert torch.equal(after, before.clamp(-0.01, 0.01))


def test_frozen_policy_has_no_backward_pass(small_policy: Any, fit_run: Any, tmp_path: Path) -> None:
    """Against the learning rate 0, which computes gradients of the policy and does not use them."""

    def two_rates(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)

    runs = []
    settings: dict[str, Any] = {"optimizer": two_rates, "latent_lr": 1e-2}
    for trainable, reference in ((True, "cached"), (False, "cached"), (False, "live")):
        module = DPO(policy=small_policy(trainable=trainable), latent=marginal(), reference=reference, **settings)
        before = copy.deepcopy(small_policy().build().state_dict())
        runs.append(fit_run(module, max_steps=4))
        assert all(torch.equal(value, before[name]) for name, value in module.policy.state_dict().items())
    unused, frozen, live = runs
    assert live.weights.keys() == frozen.weights.keys(), "the reference is no copy"
    for name, value in unused.weights.items():
        for other in (frozen, live):
            torch.testing.assert_close(value, other.weights[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(frozen.weights["latent.codebook.weight"], unused.module.latent.codebook.weight * 0)
    (optimizer,) = frozen.trainer.optimizers
    assert [group["name"] for group in optimizer.param_groups] == ["latent"]
    batch = next(iter(frozen.trainer.datamodule.val_dataloader()))
    assert not frozen.module.policy(batch).states.prompt.requires_grad
    frozen.trainer.save_checkpoint(tmp_path / "frozen.ckpt")
    stored = torch.load(tmp_path / "frozen.ckpt", weights_only=True)["state_dict"]
    assert stored
    assert all(name.startswith("latent.") for name in stored)


def test_frozen_policy_needs_a_latent(small_policy: Any) -> None:
    with pytest.raises(ConfigError, match=r"policy\.trainable: found false and no latent space, expected true or a"):
        DPO(policy=small_policy(trainable=False))
    with pytest.raises(ConfigError, match=r"policy\.trainable: found false together with policy\.lora"):
        small_policy(trainable=False, lora=LoRA(rank=2))


@pytest.mark.parametrize(("setting", "value"), [("latent_lr", -1e-3), ("warmup_ratio", -0.1), ("warmup_ratio", 1.1)])
def test_learning_rate_settings_out_of_range(setting: str, value: float, small_policy: Any) -> None:
    """A negative rate would raise the loss: torch checks the rate of the optimizer, but not those of its groups."""
    with pytest.raises(ConfigError, match=rf"model\.{setting}: found {value}, expected a"):
        DPO(policy=small_policy(), latent=marginal(), **{setting: value})
