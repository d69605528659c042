"""Tests of the contents of checkpoints, of loading them, and of refused checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lpc_lightning.algorithms import DPO, PreferenceModule, SimPO
from lpc_lightning.cli import PreferenceCLI
from lpc_lightning.errors import CheckpointError
from lpc_lightning.latent import Constant, GumbelSpace, LatentSpace, MarginalSpace
from lpc_lightning.policy import LoRA
from lpc_lightning.robust import REPO
from tests.fixtures.commands import POLICY

pytestmark = pytest.mark.slow

Space = Callable[[], LatentSpace]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def gumbel(codes: int = 4) -> GumbelSpace:
    return GumbelSpace(num_codes=codes, hidden=8, init_logit_std=1.0)


def quiet_trainer() -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for item in items for tensor in tensors(item)]


@pytest.fixture(scope="module")
def predict(small_data: Any) -> Callable[[LightningModule], dict[str, Any]]:
    """Return a function that computes rewards and priors of the test pairs, and the policy's log-probabilities."""

    def predict_values(module: Any) -> dict[str, Any]:
        data = small_data()
        trainer = quiet_trainer()
        batches = trainer.predict(module, datamodule=data)
        values = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0] if name.startswith("rew")}
        if module.latent is not None:
            values["prior"] = torch.cat([batch["prior"] for batch in batches])
        with torch.no_grad():
            values["logps"] = torch.cat([module.policy(batch).logps() for batch in data.test_dataloader()])
        return values

    return predict_values


def assert_same_predictions(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory, fit_run: Any, small_data: Any) -> Callable[..., Path]:
    """Return a function that does the same once for each name."""
    paths: dict[Any, Path] = {}

    def save(name: Any, make: Callable[[], PreferenceModule]) -> Path:
        if name not in paths:
            folder = tmp_path_factory.mktemp("saved")
            keep = ModelCheckpoint(dirpath=folder, filename="saved")
            with pytest.MonkeyPatch.context() as environment:
                environment.setenv("PL_GLOBAL_SEED", "0")
                fit_run(make(), small_data(train_pairs=4), max_epochs=1, callbacks=[keep])
            paths[name] = folder / "saved.ckpt"
        return paths[name]

    return save


@pytest.fixture
def saved(tmp_path: Path, fit_run: Any, small_data: Any) -> Callable[..., Path]:
    """Return a function that trains a module for two steps and saves it."""

    def save(module: PreferenceModule, **trainer: Any) -> Path:
        keep = ModelCheckpoint(dirpath=tmp_path, filename="saved")
        fit_run(module, small_data(train_pairs=4), max_epochs=1, callbacks=[keep], **trainer)
        return tmp_path / "saved.ckpt"

    return save


# Contents.


@pytest.mark.parametrize("algorithm", [DPO, SimPO], ids=["with a reference", "without"])
@pytest.mark.parametrize("latent", [None, gumbel], ids=["plain", "gumbel"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2, alpha=4)], ids=["full", "lora"])
def test_checkpoint_holds_trained_weights_only(
    algorithm: type[PreferenceModule], latent: Space | None, lora: LoRA | None, saved: Any, small_policy: Any
) -> None:
    policy = small_policy(lora=lora)
    module = algorithm(policy=policy, latent=latent and latent(), optimizer=adam)
    path = saved(module)
    content = torch.load(path, weights_only=True)
    trained = content["state_dict"]
    if lora is None:
        expected = {f"policy.{name}" for name, _ in policy.build().named_parameters()}
    else:
        linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        assert len(trained) == 2 * len(linear) + (len(module.latent.state_dict()) if module.latent else 0)
        expected = {name for name in trained if any(f"{layer}.lora_" in name for layer in linear)}
    if module.latent is not None:
        expected |= {f"latent.{name}" for name in module.latent.state_dict()}
        assert {f"latent.{network}.moments.mean" for network in ("prior", "posterior")} < expected
    assert set(trained) == expected
    assert all(torch.equal(trained[name], value) for name, value in module.state_dict().items() if name in expected)

    # Weights and Adam's two moments, with some margin for names and counters.
    weights = sum(tensor.nbytes for tensor in trained.values())
    assert sum(tensor.nbytes for tensor in tensors(content)) <= 3 * weights + 8 * len(trained)
    assert path.stat().st_size < 3 * weights + 2_000 * len(trained) + 10_000
    if lora is not None:
        assert weights < 0.5 * sum(parameter.nbytes for parameter in policy.build().parameters())


@pytest.mark.parametrize(
    ("precision", "weights", "moments"),
    [
        ("bf16-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.float32),
        ("64-true", torch.float64, torch.float64),
    ],
)
def test_moments_are_at_least_float32(
    precision: str, weights: torch.dtype, moments: torch.dtype, saved: Any, small_policy: Any
) -> None:
    module = DPO(policy=small_policy(), latent=gumbel(), optimizer=adam)
    content = torch.load(saved(module, precision=precision), weights_only=True)["state_dict"]
    assert content["latent.prior.first.weight"].dtype == weights
    for network in ("prior", "posterior"):
        mean, pairs = (content[f"latent.{network}.moments.{name}"] for name in ("mean", "pairs"))
        assert (mean.dtype, pairs.item()) == (moments, 4)
        assert mean.any()


class Named(DPO):
    """An algorithm of a user's own, with an object and a path as settings."""

    def __init__(self, schedule: Any, place: Any, **module: Any) -> None:
        super().__init__(**module)
        self.schedule, self.place = schedule, place


@pytest.mark.filterwarnings("ignore:resume. found trainer.max_epochs")
def test_settings_that_torch_does_not_read(saved: Any, small_policy: Any, small_data: Any, fit_run: Any) -> None:
    """NumPy's numbers, as in a loop over `np.logspace`, and paths are stored as Python's. Objects are left out."""

    def module(number: Any) -> DPO:
        def optimizer(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameters, lr=number(1e-2))

        settings = {"beta": number(0.7), "latent_lr": number(2e-2), "optimizer": optimizer}
        return Named(Constant(0.5), [Path("a") / "b"], policy=small_policy(), latent=gumbel(), **settings)

    content = torch.load(path := saved(module(np.float64)), weights_only=True)
    assert "schedule" not in content["hyper_parameters"]
    found = {name: content["hyper_parameters"][name] for name in ("beta", "latent_lr", "place")}
    assert found == {"beta": 0.7, "latent_lr": 2e-2, "place": ["a/b"]}
    options = {"max_epochs": 2, "ckpt_path": path, "callbacks": [ModelCheckpoint(dirpath=path.parent, save_top_k=0)]}
    one, other = (fit_run(module(kind), small_data(train_pairs=4), **options) for kind in (np.float64, float))
    assert one.losses == other.losses


def test_objects_that_are_left_out(
    saved: Any, fit_run: Any, small_data: Any, small_policy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The message names what loading needs. A run without checkpoints, or without such objects, has none."""

    def objects() -> dict[str, Any]:
        return {
            "schedule": Constant(0.5),
            "policy": small_policy(),
            "latent": gumbel(),
            "robust_loss": REPO(initial=0.8),
        }

    caplog.set_level("INFO", "lightning.pytorch")
    fit_run(Named(place="a", **objects()), small_data(train_pairs=4), max_epochs=1)
    assert "checkpoint:" not in caplog.text
    path = saved(Named(place="a", **objects()))
    needed = re.findall(r"Named\.load_from_checkpoint\(path, (.*)=\.\.\.\)", caplog.text)
    assert [sorted(each.split("=..., ")) for each in needed] == [sorted(objects())]
    loaded = Named.load_from_checkpoint(path, **objects())
    assert (loaded.robust_loss.initial, loaded.schedule(0), loaded.place) == (0.8, 0.5, "a")


# Loading.


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, alpha=4)], ids=["full", "lora"])
def test_load_in_code_with_policy_and_latent(lora: LoRA | None, saved: Any, small_policy: Any, predict: Any) -> None:
    module = DPO(policy=small_policy(lora=lora), latent=gumbel(), optimizer=adam, beta=0.7, latent_lr=1e-2)
    path = saved(module)
    expected = predict(module)
    loaded = DPO.load_from_checkpoint(path, policy=small_policy(lora=lora), latent=gumbel())
    assert (loaded.beta, loaded.latent_lr) == (0.7, 1e-2)
    assert_same_predictions(predict(loaded), expected)
    fresh = DPO(policy=small_policy(lora=lora), latent=gumbel(), beta=0.7)
    assert not torch.equal(predict(fresh)["rewards/chosen"], expected["rewards/chosen"])


def test_load_by_trainer(saved: Any, small_policy: Any, small_data: Any) -> None:
    path = saved(module := DPO(policy=small_policy(), latent=gumbel(), optimizer=adam))
    fresh = DPO(policy=small_policy(), latent=gumbel())
    keep = ModelCheckpoint(dirpath=path.parent)
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[keep], enable_progress_bar=False)
    (metrics,) = trainer.validate(fresh, datamodule=small_data(), ckpt_path=path, verbose=False)
    (expected,) = trainer.validate(module, datamodule=small_data(), verbose=False)
    assert metrics == expected


@pytest.fixture
def command_line(tmp_path: Path, cache_dir: Path) -> Callable[..., PreferenceCLI]:
    """Return a function that trains by the command line. Its checkpoints hold the settings of their module."""

    def fit(*flags: str) -> PreferenceCLI:
        data = [
            "--data=SyntheticPreferences",
            "--data.train_pairs=4",
            "--data.validation_pairs=2",
            "--data.batch_size=2",
        ]
        trainer = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
        quiet = ["--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]
        folders = [f"--data.cache_dir={cache_dir}", f"--trainer.default_root_dir={tmp_path / 'runs'}"]
        return PreferenceCLI(["fit", *POLICY, *data, *trainer, *quiet, *folders, *flags])

    return fit


@pytest.mark.parametrize("lora", [[], ["--policy.lora.rank=2"]], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("flags", "algorithm"),
    [
        (["--model=DPO", "--model.beta=0.7", "--latent=null"], DPO),
        (
            ["--model=SimPO", "--model.beta=3", "--latent=MarginalSpace", "--latent.num_codes=3", "--latent.hidden=8"],
            SimPO,
        ),
        (["--model=DPO", "--latent=GumbelSpace", "--latent.num_codes=3", "--latent.tau=Exponential"], DPO),
    ],
    ids=["plain", "marginal", "gumbel"],
)
def test_load_of_command_line_checkpoint(
    flags: list[str], lora: list[str], algorithm: type, command_line: Any, predict: Any
) -> None:
    done = command_line(*flags, *lora, "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.01")
    (path,) = Path(done.trainer.log_dir).glob("checkpoints/*.ckpt")
    loaded = LightningModule.load_from_checkpoint(path, weights_only=True)
    assert type(loaded) is algorithm
    assert loaded.beta == done.model.beta
    assert (loaded.policy_spec.lora is None) == (not lora)
    assert type(loaded.latent) is type(done.model.latent)
    assert_same_predictions(predict(loaded), predict(done.model))


# Refused checkpoints.

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "wider": {"width": 32},
    "deeper": {"layers": 2},
    "lora": {"lora": LoRA(rank=2, alpha=4)},
    "lora of rank 4": {"lora": LoRA(rank=4, alpha=4)},
}
SPACES: dict[str, Space | None] = {
    "plain": None,
    "gumbel": gumbel,
    "gumbel of 5 codes": lambda: gumbel(5),
    "marginal": lambda: MarginalSpace(num_codes=4, hidden=8, init_logit_std=1.0),
}


@pytest.mark.parametrize(
    ("wrote", "reads", "problem"),
    [
        (
            ("full", "plain"),
            ("wider", "plain"),
            r"policy\.model\.lm_head\.weight: found \(1024, 16\), expected \(1024, 32\)",
        ),
        (("full", "plain"), ("deeper", "plain"), r"\d+ missing \(first: policy\.model\.model\.layers\.1\."),
        (("deeper", "plain"), ("full", "plain"), r"\d+ unknown \(first: policy\.model\.model\.layers\.1\."),
        (
            ("full", "plain"),
            ("lora", "plain"),
            r"14 missing \(first: policy\..*lora_A.*\); 12 unknown \(first: policy\.",
        ),
        (
            ("lora", "plain"),
            ("full", "plain"),
            r"12 missing \(first: policy\..*\); 14 unknown \(first: policy\..*lora_A",
        ),
        (("lora", "plain"), ("lora of rank 4", "plain"), r"lora_A.*: found \(2, \d+\), expected \(4, \d+\)"),
        (("full", "plain"), ("full", "gumbel"), r"15 missing \(first: latent\.codebook\.weight\)"),
        (("full", "gumbel"), ("full", "plain"), r"15 unknown \(first: latent\.codebook\.weight\)"),
        (("full", "gumbel"), ("full", "marginal"), r"7 unknown \(first: latent\.posterior\."),
        (
            ("full", "gumbel"),
            ("full", "gumbel of 5 codes"),
            r"latent\.codebook\.weight: found \(4, 16\), expected \(5, 16\)",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_load_refuses_other_architecture(
    wrote: tuple[str, str], reads: tuple[str, str], problem: str, saved_once: Any, small_policy: Any, small_data: Any
) -> None:
    def module(names: tuple[str, str]) -> DPO:
        policy, space = names
        latent = SPACES[space]
        return DPO(policy=small_policy(**SETTINGS[policy]), latent=latent and latent(), optimizer=adam)

    path = saved_once(wrote, lambda: module(wrote))
    sentence = (
        rf"^checkpoint: its weights are of another architecture: .*{problem}.* Expected the \d+ trained weights of this"
    )
    trainer = quiet_trainer()
    with pytest.raises(CheckpointError, match=sentence):
        trainer.validate(module(reads), datamodule=small_data(), ckpt_path=path)
    policy, space = reads
    latent = SPACES[space]
    with pytest.raises(CheckpointError, match=sentence):
        DPO.load_from_checkpoint(path, policy=small_policy(**SETTINGS[policy]), latent=latent and latent())
