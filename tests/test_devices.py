"""Tests of every command on another device than the CPU: an emulated one, and a GPU if present."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from lpc_lightning.algorithms import DPO, IPO, KTO, ORPO, PreferenceModule, SimPO
from lpc_lightning.callbacks import (
    CodebookMonitor,
    FinalValidation,
    GracefulStop,
    LabelFlipNoise,
    PreferenceAccuracy,
    PreferenceProgressBar,
    ResourceMonitor,
    RunSummary,
    WritePredictions,
)
from lpc_lightning.cli import PreferenceCLI
from lpc_lightning.data import SyntheticPreferences
from lpc_lightning.data.synthetic import PreferenceGenerator
from lpc_lightning.evaluation.adaptation.command import adapt
from lpc_lightning.evaluation.comparison.command import evaluate
from lpc_lightning.inference.export import export
from lpc_lightning.inference.generate import generate
from lpc_lightning.latent import ExpectedSpace, GaussianSpace, GumbelSpace, LatentSpace, MarginalSpace
from lpc_lightning.policy import LoRA, TinyPolicy
from lpc_lightning.robust import REPO, RobustLoss
from tests.fixtures.emulated_device import DEVICE, NAME
from tests.fixtures.spaces import SPACES, make_space

pytestmark = pytest.mark.slow

FAMILIES = ("llama", "mistral", "qwen2", "gpt2", "gemma2")
CODES = {"num_codes": 4, "hidden": 8, "init_logit_std": 1.0}
EXTRA: dict[str, dict[str, Any]] = {"expected": {"diversity_weight": 0.1}, "marginal": {"annotators": True}}
LATENTS = ["none", *(name for name in SPACES if name != "hard gumbel")]
WARM = {"warm_start_pairs": 16}
VARIANTS: dict[str, Callable[[], PreferenceModule]] = {
    "ipo": lambda: IPO(policy=tiny(), latent=GumbelSpace(**CODES, **WARM)),
    "simpo": lambda: SimPO(policy=tiny(), latent=MarginalSpace(**CODES, **WARM)),
    "simpo_without_codes": lambda: SimPO(policy=tiny(), latent=GaussianSpace(**CODES, **WARM)),
    "kto": lambda: KTO(policy=tiny(), latent=MarginalSpace(**CODES, **WARM)),
    "orpo": lambda: ORPO(policy=tiny(), latent=ExpectedSpace(**CODES)),
    "live": lambda: DPO(policy=tiny(), latent=MarginalSpace(**CODES), reference="live"),
    "lora": lambda: DPO(policy=tiny(lora=LoRA(rank=2, dropout=0.1)), latent=ExpectedSpace(**CODES)),
    "lora_live": lambda: DPO(policy=tiny(lora=LoRA(rank=2)), reference="live"),
    "checkpointing": lambda: DPO(policy=tiny(gradient_checkpointing=True), latent=MarginalSpace(**CODES)),
    **{family: lambda family=family: DPO(policy=tiny(family), latent=MarginalSpace(**CODES)) for family in FAMILIES},
}
"""Modules that differ in more than the latent."""
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
)


def make_latent(name: str) -> LatentSpace | None:
    return None if name == "none" else make_space(name, num_codes=4, **EXTRA.get(name, {}))


def tiny(family: str = "llama", **policy: Any) -> TinyPolicy:
    return TinyPolicy(family=family, width=16, layers=1, heads=2, **policy)  # type: ignore[arg-type]


@pytest.fixture(params=[NAME, CUDA])
def accelerator(request: pytest.FixtureRequest) -> str:
    """Name of the device for a trainer and for commands."""
    if request.param == NAME:
        request.getfixturevalue("emulated")
    return str(request.param)


@pytest.fixture
def data(cache_dir: Path) -> Callable[..., SyntheticPreferences]:
    def make(**settings: Any) -> SyntheticPreferences:
        sizes = {"train_pairs": 16, "validation_pairs": 6, "test_pairs": 5, "batch_size": 4}
        people = {"deciding": "hidden", "annotators": 3}
        return SyntheticPreferences(**{**sizes, **people, "cache_dir": str(cache_dir), **settings})

    return make


@pytest.fixture
def fit(accelerator: str, data: Callable[..., SyntheticPreferences], tmp_path: Path) -> Callable[..., Trainer]:
    """Train a module with the callbacks of configs/callbacks/default.yaml, under label noise."""

    def run(
        module: PreferenceModule,
        ckpt_path: Any = None,
        pairs: dict[str, Any] | None = None,
        save_every: int = 2,
        plots: bool = True,
        **trainer: Any,
    ) -> Trainer:
        seed_everything(1, verbose=False)
        callbacks = [
            ModelCheckpoint(save_last=True, every_n_train_steps=save_every, save_top_k=-1),
            LearningRateMonitor("step"),
            LabelFlipNoise(0.3),
            ResourceMonitor(),
            PreferenceAccuracy(),
            *([CodebookMonitor()] if plots else []),
            PreferenceProgressBar(),
            FinalValidation(),
            GracefulStop(),
            RunSummary(),
            WritePredictions(),
        ]
        settings: dict[str, Any] = {"max_steps": 2, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
        settings |= {"enable_model_summary": False, "precision": "32-true", "devices": 1}
        logger = CSVLogger(tmp_path, name="run")
        fitter = Trainer(accelerator=accelerator, logger=logger, callbacks=callbacks, **(settings | trainer))
        fitter.fit(module, datamodule=data(**(pairs or {})), ckpt_path=ckpt_path)
        return fitter

    return run


def check_finite(module: PreferenceModule) -> None:
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        assert value.isfinite().all(), name


def place_of(accelerator: str) -> torch.device:
    return DEVICE if accelerator == NAME else torch.device("cuda", 0)


# Building


@pytest.mark.parametrize("module", VARIANTS)
def test_configure_model_builds_on_the_device(module: str, accelerator: str) -> None:
    built = VARIANTS[module]()
    with torch.device(place_of(accelerator)):
        built.configure_model()
    for name, value in (*built.named_parameters(), *built.named_buffers()):
        assert value.device == place_of(accelerator), name


@pytest.mark.parametrize("latent", LATENTS)
def test_first_values_do_not_depend_on_the_device(latent: str, accelerator: str) -> None:
    here, there = (DPO(policy=tiny(lora=LoRA(rank=2)), latent=make_latent(latent)) for _ in range(2))
    here.configure_model()
    with torch.device(place_of(accelerator)):
        there.configure_model()
    expected = dict(here.named_parameters())
    for name, value in there.named_parameters():
        assert torch.equal(value.detach().cpu(), expected[name].detach()), name


# Training


@pytest.mark.parametrize("variant", VARIANTS)
def test_fit_variants(variant: str, fit: Callable[..., Trainer]) -> None:
    module = VARIANTS[variant]()
    assert fit(module, plots=False).global_step == 2  # plots depend on the latent, whose test is below
    check_finite(module)


@pytest.mark.parametrize(
    "settings",
    [
        {"pairs": {"layout": "padded"}},
        {"precision": "bf16-true"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0},
    ],
)
def test_fit_settings(settings: dict[str, Any], fit: Callable[..., Trainer]) -> None:
    module = DPO(policy=tiny(), latent=MarginalSpace(**CODES))
    assert fit(module, **settings).global_step == 2
    check_finite(module)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_fit_resumes(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    def module() -> PreferenceModule:
        return DPO(policy=tiny(), latent=GumbelSpace(**CODES, **WARM))

    whole, rest = module(), module()
    length: dict[str, Any] = {"max_steps": 4, "val_check_interval": 2, "deterministic": True}
    length["pairs"] = {"train_pairs": 24}  # the run ends within an epoch
    fit(whole, **length)
    weights = {name: value.detach().cpu().clone() for name, value in whole.named_parameters()}
    (saved,) = tmp_path.glob("run/version_0/checkpoints/*step=2.ckpt")
    fit(rest, **length, ckpt_path=saved)
    for name, value in rest.named_parameters():
        assert torch.equal(value.detach().cpu(), weights[name]), name


def test_evaluation_loops(
    fit: Callable[..., Trainer], data: Callable[..., SyntheticPreferences], tmp_path: Path
) -> None:
    module = DPO(policy=tiny(), latent=GumbelSpace(**CODES))
    trainer = fit(module)
    (validated,) = trainer.validate(module, datamodule=data())
    (tested,) = trainer.test(module, datamodule=data())
    assert {"val/loss", "val/accuracy/posterior"} <= validated.keys()
    assert "test/accuracy/prior" in tested
    predictions = trainer.predict(module, datamodule=data())
    assert predictions is not None
    assert sum(len(batch["ids"]) for batch in predictions) == 5


@pytest.mark.parametrize(
    ("latent", "robust"),
    [*((name, None) for name in LATENTS), ("marginal", REPO())],
)
def test_fit_waits_only_for_logged_steps(
    latent: str,
    robust: RobustLoss | None,
    fit: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
    accelerator: str,
    request: Any,
) -> None:
    """Three steps of two micro-batches with every latent. Waits are noted on the emulated device."""
    advance, noted = _TrainingEpochLoop.advance, []
    waits = request.getfixturevalue("emulated") if accelerator == NAME else None

    def noting(self: Any, *args: Any) -> None:
        with waits.noted():
            advance(self, *args)
        noted.append(list(waits.waits))
        waits.waits.clear()

    if waits:
        monkeypatch.setattr(_TrainingEpochLoop, "advance", noting)
    module = DPO(policy=tiny(), latent=make_latent(latent), robust_loss=robust)
    steps: dict[str, Any] = {"max_steps": 3, "accumulate_grad_batches": 2, "log_every_n_steps": 3}
    assert fit(module, pairs={"train_pairs": 28}, save_every=100, **steps).global_step == 3
    check_finite(module)
    if not waits:
        return
    assert len(noted) == 6
    # Spaces that score codes measure the range of the codes once, in the first micro-batch of a run.
    assert [wait for wait in noted[0] if "code_range" not in wait] == []
    assert len(noted[0]) <= 1
    # The third step is logged: Lightning copies learning rates to the device.
    ours = [[wait for wait in waits if "lr_monitor" not in wait] for waits in noted]
    first, second, third = ours[1:2], ours[2:4], ours[4:]
    assert not any(second), second
    for logged in (first, third):
        assert not any(logged[:-1]), logged
        # One transfer for the module's metrics and losses, and one for those of the label noise.
        assert ["copy to cpu" in wait for wait in logged[-1]] == [True, True], logged


# Inference and evaluation


@pytest.fixture(scope="module")
def checkpoints() -> dict[str, str]:
    """Checkpoints by device, filled by the fixture `checkpoint`."""
    return {}


@pytest.fixture
def checkpoint(
    checkpoints: dict[str, str],
    accelerator: str,
    cache_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """Checkpoint of `lpc-lightning fit` on the device. It is made once."""
    if accelerator in checkpoints:
        return checkpoints[accelerator]
    folder = tmp_path_factory.mktemp(accelerator)
    flags = (
        "--model=DPO --policy=TinyPolicy --policy.width=16 --policy.layers=1 --policy.heads=2 --latent=MarginalSpace "
    )
    flags += "--latent.num_codes=4 --latent.init_logit_std=1 --data=SyntheticPreferences --data.train_pairs=4 "
    flags += f"--data.validation_pairs=0 --data.test_pairs=0 --data.cache_dir={cache_dir} --trainer.devices=1 "
    flags += f"--trainer.accelerator={accelerator} --trainer.default_root_dir={folder} --trainer.precision=32-true "
    flags += "--trainer.max_steps=1 --trainer.log_every_n_steps=1 --trainer.enable_model_summary=false"
    PreferenceCLI(["fit", *flags.split()])
    (path,) = folder.glob("version_0/checkpoints/*.ckpt")
    checkpoints[accelerator] = str(path)
    return checkpoints[accelerator]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """A file of preference pairs."""
    file = tmp_path / "pairs.jsonl"
    with file.open("w") as lines:
        for each in PreferenceGenerator(deciding="hidden", annotators=3, seed=1).examples(24, "test"):
            names = ("id", "chosen", "rejected", "annotator", "factor", "source")
            row = {name: getattr(each, name) for name in names} | {"prompt": [dict(turn) for turn in each.prompt]}
            lines.write(json.dumps(row) + "\n")
    return str(file)


@pytest.mark.parametrize(
    "settings",
    [
        {"codes": [0, 2]},
        {"temperature": 0.7, "top_p": 0.9},
        {"prior_mode": "sample"},
        {"num_beams": 2},
        {"code_weights": ["0.1", "0.2", "0.3", "0.4"]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_generate(
    settings: dict[str, Any], checkpoint: str, accelerator: str, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(checkpoint, prompt="How do I grow tomatoes?", device=f"{accelerator}:0", max_new_tokens=4, **settings)
    assert "Likeliest codes" in capsys.readouterr().out


def test_export_is_generated_from(
    checkpoint: str, accelerator: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(checkpoint, str(tmp_path / "exported"), code_biases=True)
    generate(str(folder), prompt="How do I grow tomatoes?", device=f"{accelerator}:0", max_new_tokens=4, codes=[1])
    assert "Likeliest codes" in capsys.readouterr().out


def test_adapt(checkpoint: str, pairs: str, accelerator: str, tmp_path: Path) -> None:
    adapt([checkpoint], pairs, output=str(tmp_path / "adapted"), device=f"{accelerator}:0", shots=[0, 1], rounds=2)
    assert (tmp_path / "adapted" / "adaptation.md").is_file()


def test_evaluate_preferences(checkpoint: str, pairs: str, accelerator: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tasks": ["none"], "precision": "float32", "device": f"{accelerator}:0"}
    assert evaluate([checkpoint], preferences=[pairs], output=str(tmp_path / "results"), **settings)
