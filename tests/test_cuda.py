"""Tests that need a GPU: kernels, compilation, equal losses, equal bits, and steps without waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from lpc_lightning.algorithms import DPO, IPO, KTO, ORPO, PreferenceModule, SimPO
from lpc_lightning.callbacks import GracefulStop, LabelFlipNoise, PreferenceProgressBar, ResourceMonitor
from lpc_lightning.data import Balanced, SyntheticPreferences
from lpc_lightning.latent import ExpectedSpace, GumbelSpace, LatentSpace, MarginalSpace
from lpc_lightning.policy import LoRA, TinyPolicy
from lpc_lightning.policy.graphed_backbone import GraphedBackbone

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    # Warnings of torch and transformers about small runs on a GPU.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]

CODES = {"num_codes": 4, "hidden": 16, "init_logit_std": 1.0}
ALGORITHMS: dict[str, type[PreferenceModule]] = {"dpo": DPO, "ipo": IPO, "simpo": SimPO, "kto": KTO, "orpo": ORPO}
LATENTS: dict[str, Callable[[], LatentSpace | None]] = {
    "none": lambda: None,
    "gumbel": lambda: GumbelSpace(**CODES),
    "expected": lambda: ExpectedSpace(**CODES),
    "marginal": lambda: MarginalSpace(**CODES),
}
REFERENCES = {
    "dpo": ("cached", "live"),
    "ipo": ("cached", "live"),
    "simpo": (None,),
    "kto": ("cached",),
    "orpo": (None,),
}
CASES = [
    (algorithm, latent, reference, lora)
    for algorithm in ALGORITHMS
    for latent in LATENTS
    for reference in REFERENCES[algorithm]
    for lora in (False, True)
]


def tiny(**policy: Any) -> TinyPolicy:
    # Heads have 16 dimensions, the smallest size of flex_attention.
    return TinyPolicy(**({"width": 64, "layers": 2, "heads": 4} | policy))


@pytest.fixture
def fit(cache_dir: Path, tmp_path: Path) -> Callable[..., Trainer]:
    """Train for a few steps."""

    def run(module: PreferenceModule, ckpt_path: Any = None, accelerator: str = "cuda", **trainer: Any) -> Trainer:
        seed_everything(1, verbose=False)
        torch.use_deterministic_algorithms(False)
        settings: dict[str, Any] = {"max_steps": 2, "log_every_n_steps": 1, "precision": "bf16-mixed", "devices": 1}
        settings |= {"logger": False, "num_sanity_val_steps": 0, "limit_val_batches": 0, "enable_model_summary": False}
        settings |= {"enable_checkpointing": False, "enable_progress_bar": False, "gradient_clip_val": 1.0}
        sizes: dict[str, Any] = {"train_pairs": 32, "validation_pairs": 4, "test_pairs": 4, "batch_size": 4}
        # By default, only a GPU balances batches. Both devices train on the same ones here.
        data = SyntheticPreferences(**sizes, cache_dir=str(cache_dir), batch_order=Balanced())
        fitter = Trainer(accelerator=accelerator, default_root_dir=tmp_path, **(settings | trainer))
        fitter.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return fitter

    return run


def weights(module: PreferenceModule) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in module.named_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize(("algorithm", "latent", "reference", "lora"), CASES)
def test_fit(
    algorithm: str, latent: str, reference: str | None, lora: bool, attention: Any, fit: Callable[..., Trainer]
) -> None:
    policy = tiny(attention=attention, lora=LoRA(rank=2) if lora else None)
    settings = {} if reference is None else {"reference": reference}
    module = ALGORITHMS[algorithm](policy=policy, latent=LATENTS[latent](), **settings)
    assert fit(module).global_step == 2
    assert all(value.isfinite().all() for value in weights(module).values())


@pytest.mark.parametrize("policy", [{"gradient_checkpointing": True}, {"compile": True}, {"compile": True, "heads": 8}])
def test_fit_policy_settings(policy: dict[str, Any], fit: Callable[..., Trainer]) -> None:
    module = DPO(policy=tiny(**policy), latent=MarginalSpace(**CODES))
    assert fit(module).global_step == 2
    assert all(value.isfinite().all() for value in weights(module).values())


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, dropout=0.1)])
@pytest.mark.parametrize("latent", LATENTS)
def test_cuda_graphs_change_no_bit(latent: str, lora: LoRA | None, fit: Callable[..., Trainer]) -> None:
    runs = []
    for graphs in (False, True):
        module = DPO(policy=tiny(compile=True, cuda_graphs=graphs, lora=lora), latent=LATENTS[latent]())
        fit(module, max_steps=3, accumulate_grad_batches=2, deterministic=True)
        assert (module.policy._graphed is not None) is graphs
        assert not graphs or any(module.policy._graphed._graphs.values())
        runs.append(weights(module))
    torch.use_deterministic_algorithms(False)
    for name, value in runs[0].items():
        assert torch.equal(runs[1][name], value), name


def test_draws_follow_failed_capture() -> None:
    layer = torch.nn.Linear(4, 4, device="cuda")

    def waits(states: torch.Tensor) -> torch.Tensor:
        dropped = torch.nn.functional.dropout(layer(states))
        return dropped + dropped.sum().item()

    before = torch.cuda.current_stream()
    for _ in range(2):
        GraphedBackbone(layer.parameters())(waits, torch.ones(1, 3, 4, device="cuda")).sum().backward()
        torch.rand(4, device="cuda")
        assert torch.cuda.current_stream() == before


@pytest.mark.parametrize("latent", ["none", "expected", "marginal"])
def test_losses_equal_cpu(latent: str, fit: Callable[..., Trainer]) -> None:
    losses = []
    for accelerator in ("cpu", "cuda"):
        module = DPO(policy=tiny(), latent=LATENTS[latent]())  # the noise of gumbel differs between devices
        trainer = fit(module, accelerator=accelerator, precision="32-true", max_steps=1)
        losses.append(float(trainer.callback_metrics["train/loss"]))
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.parametrize("latent", LATENTS)
def test_deterministic_runs_are_equal(latent: str, fit: Callable[..., Trainer], tmp_path: Path) -> None:
    length: dict[str, Any] = {"max_steps": 4, "deterministic": True, "enable_checkpointing": True}

    def run(folder: str, **settings: Any) -> dict[str, torch.Tensor]:
        module = DPO(policy=tiny(), latent=LATENTS[latent]())
        saved = ModelCheckpoint(tmp_path / folder, every_n_train_steps=2, save_top_k=-1)
        fit(module, callbacks=[saved], **length, **settings)
        return weights(module)

    one, other = run("one"), run("other")
    (path,) = (tmp_path / "one").glob("*step=2.ckpt")
    resumed = run("resumed", ckpt_path=path)
    torch.use_deterministic_algorithms(False)
    for name, value in one.items():
        assert torch.equal(other[name], value), name
        assert torch.equal(resumed[name], value), f"{name}, resumed"


@pytest.mark.parametrize("latent", LATENTS)
def test_micro_batches_do_not_wait(latent: str, fit: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    advance, done = _TrainingEpochLoop.advance, []

    def strict(self: Any, *args: Any) -> None:
        # The first step compiles and measures; every fifth is logged.
        torch.cuda.set_sync_debug_mode("error" if len(done) in (1, 2, 3) else "default")
        try:
            advance(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        done.append(self.batch_idx)

    monkeypatch.setattr(_TrainingEpochLoop, "advance", strict)
    callbacks = [LabelFlipNoise(0.3), ResourceMonitor(), GracefulStop(), PreferenceProgressBar()]
    module = DPO(policy=tiny(), latent=LATENTS[latent]())
    fit(module, max_steps=5, log_every_n_steps=5, callbacks=callbacks, enable_progress_bar=True)
    assert len(done) == 5
