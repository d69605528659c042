"""Runs whose reference is cached are the runs whose reference is live; and what the cache is used for, and what not."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from lpc_lightning.data import PaddedLayout
from lpc_lightning.data.reference_cache import ReferenceCache
from lpc_lightning.data.tokens import TokenStore
from lpc_lightning.errors import SettingError
from lpc_lightning.latent import GumbelSpace, LatentSpace, MarginalSpace
from lpc_lightning.modules import DPO, IPO, PreferenceModule, SimPO
from lpc_lightning.policy import LoRA
from lpc_lightning.types import TokenizedPair


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def gumbel() -> GumbelSpace:
    return GumbelSpace(codes=4, hidden=8, spread=1.0)


def marginal() -> MarginalSpace:
    return MarginalSpace(codes=4, hidden=8, spread=1.0)


def entries(root: Path) -> list[Path]:
    return sorted((root / "reference").glob("*"))


def parts(root: Path) -> list[Path]:
    return sorted((root / "reference").glob("*/*"))


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the last run said of its reference, a line a stage, without the path."""
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    logging.getLogger("lightning.pytorch").propagate = True

    def said() -> list[str]:
        lines = [record.message for record in caplog.records if "reference log-probabilities" in record.message]
        caplog.clear()
        return [f"{line.partition(':')[0]}: {line.rpartition(': ')[2]}" for line in lines]

    return said


# The same numbers


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, alpha=4)], ids=["full", "lora"])
@pytest.mark.parametrize("latent", [None, gumbel, marginal], ids=["plain", "gumbel", "marginal"])
@pytest.mark.parametrize("algorithm", [DPO, IPO])
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("64-true", 1e-11), ("32-true", 1e-6)], ids=["float64", "float32"]
)
def test_a_cached_run_is_the_live_run(
    precision: Any,
    tolerance: float,
    algorithm: Callable[..., PreferenceModule],
    latent: Callable[[], LatentSpace] | None,
    lora: LoRA | None,
    small_policy: Any,
    small_data: Any,
    fit_run: Any,
    tmp_path: Path,
) -> None:
    dtype = {"64-true": "float64", "32-true": "float32"}[precision]

    def run(reference: str, **data: Any) -> Any:
        module = algorithm(
            policy=small_policy(lora=lora, dtype=dtype),
            latent=latent and latent(),
            reference=reference,
            optimizer=adam,
        )
        return fit_run(module, small_data(cache_dir=str(tmp_path), **data), max_epochs=1, precision=precision)

    live, cached = run("live"), run("cached")
    names = {"train/loss", "train/logps/chosen", "train/rewards/chosen"}
    assert all(names <= set(row) for row in live.training.values())
    for step, row in live.training.items():
        assert cached.training[step]["train/loss"] == pytest.approx(row["train/loss"], rel=tolerance)
    (one,), (other,) = (each.log.having("val/").values() for each in (live, cached))
    assert other["val/loss"] == pytest.approx(one["val/loss"], rel=tolerance)
    assert len(set(cached.losses)) >= 10


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_in_bfloat16_values_are_those_of_the_same_precision_and_stay_exact(
    precision: Any, small_policy: Any, small_data: Any, fit_run: Any, tmp_path: Path
) -> None:
    """Rounded to bfloat16, log-probabilities of some 400 nats would be off by up to a nat."""
    runs = []
    for kind in ("live", "cached"):
        module = DPO(policy=small_policy(), reference=kind, optimizer=adam)
        runs.append(fit_run(module, small_data(cache_dir=str(tmp_path)), max_epochs=1, precision=precision))
    live, cached = runs
    assert min(abs(row["train/logps/chosen"]) for row in live.training.values()) > 256
    for step, row in live.training.items():
        for side in ("chosen", "rejected"):
            # beta times the distance of a mean over two pairs.
            distance = abs(row[f"train/rewards/{side}"] - cached.training[step][f"train/rewards/{side}"]) / 0.1
            assert distance < 0.2, step


# No reference in memory


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, alpha=4)], ids=["full", "lora"])
def test_no_reference_is_in_memory(lora: LoRA | None, small_policy: Any, fit_run: Any) -> None:
    sizes = {}
    for kind in ("live", "cached"):
        module = DPO(policy=small_policy(lora=lora), latent=marginal(), reference=kind)
        fit_run(module, max_steps=1)
        assert module.latent is not None
        sizes[kind] = size(module) - size(module.latent)
    policy = size(small_policy(lora=lora).build())
    assert sizes == {"live": policy if lora else 2 * policy, "cached": policy}


def test_without_a_reference_there_is_nothing_to_cache(
    small_policy: Any, small_data: Any, fit_run: Any, told: Any, tmp_path: Path
) -> None:
    fit_run(SimPO(policy=small_policy()), small_data(cache_dir=str(tmp_path)), max_steps=1)
    assert told() == []
    assert entries(tmp_path) == []
    with pytest.raises(TypeError, match="reference"):
        SimPO(policy=small_policy(), reference="cached")


# When it is used


def test_a_second_run_computes_nothing(
    small_policy: Any, small_data: Any, fit_run: Any, told: Any, tmp_path: Path
) -> None:
    def run() -> Any:
        return fit_run(DPO(policy=small_policy()), small_data(cache_dir=str(tmp_path)), max_epochs=1)

    first = run()
    assert [line.partition(" in ")[0] for line in told()] == [
        "train: 0 pairs reused, 21 computed",
        "validation: 0 pairs reused, 6 computed",
    ]
    written = {part: part.stat().st_mtime_ns for part in parts(tmp_path)}
    second = run()
    assert told() == ["train: 21 pairs reused, none computed.", "validation: 6 pairs reused, none computed."]
    assert written == {part: part.stat().st_mtime_ns for part in parts(tmp_path)}
    assert second.training == first.training


def test_it_is_the_cache_that_is_read(small_policy: Any, small_data: Any, fit_run: Any, tmp_path: Path) -> None:
    """Add a nat to every value in the files: implicit rewards fall by beta."""

    def run() -> Any:
        module = DPO(policy=small_policy(), beta=0.1, optimizer=adam)
        return fit_run(module, small_data(cache_dir=str(tmp_path)), max_steps=1)

    before = run()
    for part in parts(tmp_path):
        with np.load(part) as kept:
            places, logps = kept["places"], kept["logps"]
        np.savez(part, places=places, logps=logps + np.array([1.0, 3.0]))
    after = run()
    (one,), (other,) = before.training.values(), after.training.values()
    assert other["train/rewards/chosen"] - one["train/rewards/chosen"] == pytest.approx(-0.1, abs=1e-5)
    assert other["train/rewards/rejected"] - one["train/rewards/rejected"] == pytest.approx(-0.3, abs=1e-5)


Change = dict[str, dict[str, Any]]
SHARED: dict[str, Change] = {
    "layout": {"data": {"layout": "padded"}},
    "rows": {"data": {"row_tokens": 300}},
    "batch size": {"data": {"batch_size": 3}},
    "workers": {"data": {"workers": 2}},
    "accumulation": {"trainer": {"accumulate_grad_batches": 4}},
    "seed": {"run": {"seed": 9}},
    "beta": {"module": {"beta": 0.7}},
    "latent": {"module": {"latent": marginal}},
    "adapter": {"policy": {"lora": LoRA(rank=2)}},
    "activation checkpointing": {"policy": {"gradient_checkpointing": True}},
}
OTHER: dict[str, Change] = {
    "weights": {"policy": {"seed": 3}},
    "config": {"policy": {"options": {"rms_norm_eps": 1e-2}}},
    "dtype": {"policy": {"dtype": "bfloat16"}},
    "attention kernel": {"policy": {"attention": "eager"}},
    "precision": {"trainer": {"precision": "bf16-mixed"}},
    "pairs": {"data": {"data_seed": 4}},
    "template": {"data": {"template": "plain"}},
    "length limit": {"data": {"max_length": 700}},
}


@pytest.fixture
def run_with(small_policy: Any, small_data: Any, fit_run: Any, tmp_path: Path) -> Callable[..., Any]:
    def run(change: Change, reference: str = "cached") -> Any:
        module = {"reference": reference, "optimizer": adam} | change.get("module", {})
        if "latent" in module:
            module["latent"] = module["latent"]()
        made = DPO(policy=small_policy(**change.get("policy", {})), **module)
        data = small_data(cache_dir=str(tmp_path), **change.get("data", {}))
        return fit_run(made, data, max_epochs=1, **change.get("run", {}), **change.get("trainer", {}))

    return run


@pytest.mark.parametrize("change", SHARED.values(), ids=SHARED)
def test_what_does_not_change_the_reference_shares_its_values(
    change: Change, run_with: Any, told: Any, tmp_path: Path
) -> None:
    run_with({})
    there = entries(tmp_path)
    told()
    cached, live = run_with(change), run_with(change, "live")
    assert told() == ["train: 21 pairs reused, none computed.", "validation: 6 pairs reused, none computed."]
    assert entries(tmp_path) == there
    assert len(there) == 2
    assert cached.losses == pytest.approx(live.losses, rel=1e-5)


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_what_changes_the_reference_has_values_of_its_own(
    change: Change, run_with: Any, told: Any, tmp_path: Path
) -> None:
    run_with({})
    told()
    cached, live = run_with(change), run_with(change, "live")
    assert [line.partition(" in ")[0] for line in told()] == [
        "train: 0 pairs reused, 21 computed",
        "validation: 0 pairs reused, 6 computed",
    ]
    assert len(entries(tmp_path)) == 4
    rounding = 1e-5 if "bf" not in str(change) else 1e-2
    assert cached.losses == pytest.approx(live.losses, rel=rounding)


def test_the_precision_of_matrix_products_is_in_the_key(run_with: Any, told: Any, tmp_path: Path) -> None:
    run_with({})
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        run_with({})
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(entries(tmp_path)) == 4


# What a run will read


class Reads(Callback):
    """What the data module says that the run will read, and what it has read."""

    def __init__(self) -> None:
        self.said: dict[str, set[str]] = {}
        self.read: dict[str, set[str]] = {"train": set(), "validation": set()}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.said = {stage: {data.pairs[stage][place].id for place in data.reads(stage)} for stage in data.stages}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.read["train"].update(batch.ids)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.read["validation"].update(batch.ids)


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        ({"max_epochs": 1}, (21, 6)),
        ({"max_steps": 3}, (6, 6)),
        ({"max_steps": 3, "limit_val_batches": 1}, (6, 2)),
        ({"max_steps": 2, "accumulate_grad_batches": 3}, (12, 6)),
        ({"max_steps": 30}, (21, 6)),
        ({"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 0}, (8, 0)),
        ({"max_epochs": 1, "limit_train_batches": 0.5, "limit_val_batches": 0.4}, (10, 2)),
        ({"max_epochs": 3, "max_steps": 2}, (4, 6)),
        ({"fast_dev_run": 2}, (4, 4)),
    ],
    ids=str,
)
def test_nothing_is_computed_that_is_not_read(
    settings: dict[str, Any], pairs: tuple[int, int], small_policy: Any, small_data: Any, fit_run: Any, tmp_path: Path
) -> None:
    reads, data = Reads(), small_data(cache_dir=str(tmp_path))
    fit_run(DPO(policy=small_policy()), data, callbacks=[reads], num_sanity_val_steps=-1, **settings)
    assert reads.said == reads.read
    assert (len(reads.read["train"]), len(reads.read["validation"])) == pairs
    known = sum(len(np.load(part)["places"]) for part in parts(tmp_path))
    assert known == sum(pairs)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": 3, "limit_train_batches": 4},
        {"max_steps": 12, "limit_train_batches": 5},
        {"max_steps": 4, "callbacks": [GradientAccumulationScheduler({0: 1, 1: 3})], "limit_train_batches": 3},
    ],
    ids=["by epochs", "by steps", "by steps that grow"],
)
def test_epochs_that_each_read_a_part_are_covered(
    settings: dict[str, Any], small_policy: Any, small_data: Any, fit_run: Any, tmp_path: Path
) -> None:
    reads = Reads()
    settings = settings | {"callbacks": [reads, *settings.get("callbacks", [])]}
    fit_run(DPO(policy=small_policy()), small_data(cache_dir=str(tmp_path)), **settings)
    assert reads.said["train"] >= reads.read["train"]
    assert 8 < len(reads.read["train"]) < 21


def test_a_longer_run_adds_what_it_lacks(
    small_policy: Any, small_data: Any, fit_run: Any, told: Any, tmp_path: Path
) -> None:
    def run(steps: int) -> Any:
        module = DPO(policy=small_policy(), optimizer=adam, lr_schedule="constant_with_warmup", warmup=0.0)
        return fit_run(module, small_data(cache_dir=str(tmp_path)), max_steps=steps, limit_val_batches=0)

    short, whole = run(3), run(11)
    assert [line.partition(" in ")[0] for line in told()] == [
        "train: 0 pairs reused, 6 computed",
        "validation: 0 pairs reused, none computed.",
        "train: 6 pairs reused, 15 computed",
        "validation: 0 pairs reused, none computed.",
    ]
    assert whole.losses[:3] == short.losses


# Trained weights are not the reference's


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
@pytest.mark.parametrize("kept", [True, False], ids=["with the cache", "without"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_resumed_run_is_the_uninterrupted_one(
    precision: Any, kept: bool, small_policy: Any, small_data: Any, fit_run: Any, tmp_path: Path
) -> None:
    def run(ckpt_path: Path | None = None) -> Any:
        save = ModelCheckpoint(
            dirpath=tmp_path / ("resumed" if ckpt_path else "whole"),
            filename="{step}",
            every_n_train_steps=4,
            save_top_k=-1,
        )
        module = DPO(policy=small_policy(), optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
        data = small_data(cache_dir=str(tmp_path))
        return fit_run(module, data, max_epochs=2, callbacks=[save], ckpt_path=ckpt_path, precision=precision)

    whole = run()
    assert abs(whole.losses[-1] - whole.losses[0]) > 0.01, "the policy has moved"
    if not kept:
        shutil.rmtree(tmp_path / "reference")
    resumed = run(tmp_path / "whole" / "step=8.ckpt")
    assert list(resumed.training.values()) == list(whole.training.values())[8:]
    assert all(torch.equal(weight, resumed.weights[name]) for name, weight in whole.weights.items())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("command", ["validate", "test", "predict"])
@pytest.mark.parametrize("way", ["by the trainer", "beforehand", "just trained"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2, alpha=4)], ids=["full", "lora"])
def test_a_trained_policy_is_held_against_the_published_weights(
    lora: LoRA | None, way: str, command: str, small_policy: Any, small_data: Any, fit_run: Any, tmp_path: Path
) -> None:
    """With an empty cache, whichever way the trained weights came into the module."""

    def make(reference: str) -> DPO:
        return DPO(
            policy=small_policy(lora=lora),
            reference=reference,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-2),
            beta=1.0,
        )

    module = make("cached")
    keep = ModelCheckpoint(dirpath=tmp_path / "checkpoints", filename="trained")
    fit_run(module, small_data(cache_dir=str(tmp_path)), max_epochs=1, callbacks=[keep])
    shutil.rmtree(tmp_path / "reference")
    path = tmp_path / "checkpoints" / "trained.ckpt"

    def say(reference: str) -> Any:
        found, options = module, {}
        if reference == "live" or way == "by the trainer":
            found, options = make(reference), {"ckpt_path": path}
        elif way == "beforehand":
            found = DPO.load_from_checkpoint(path, policy=small_policy(lora=lora))
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
        quiet = {} if command == "predict" else {"verbose": False}
        said = getattr(trainer, command)(found, datamodule=small_data(cache_dir=str(tmp_path)), **options, **quiet)
        if command == "predict":
            return torch.cat([batch["rewards/chosen"] for batch in said]).tolist()
        return said[0][f"{command.replace('validate', 'val')}/rewards/chosen"]

    live, cached = say("live"), say("cached")
    assert cached == pytest.approx(live, abs=1e-3)
    assert np.abs(live).max() > 0.02
    assert len(parts(tmp_path)) == 1


def test_published_weights_that_have_changed_are_told(
    small_policy: Any, small_data: Any, fit_run: Any, tmp_path: Path
) -> None:
    spec = small_policy()
    module = DPO(policy=spec)
    fit_run(module, small_data(cache_dir=str(tmp_path)), max_steps=1)
    spec.seed = 5
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(SettingError, match="policy: found other weights than those that this module was built from"):
        trainer.test(module, datamodule=small_data(cache_dir=str(tmp_path)), verbose=False)


# What cannot be cached


def test_other_data_is_refused(
    small_policy: Any, make_pairs: Callable[..., list[TokenizedPair]], make_loader: Any, make_trainer: Any
) -> None:
    loader = make_loader(make_pairs([(3, 4, 5), (2, 2, 2)]))
    with pytest.raises(SettingError, match=r"model\.reference: found cached with data of NoneType, expected a Prefer"):
        make_trainer(max_steps=1).fit(DPO(policy=small_policy()), loader, loader)


def test_batches_without_values_are_refused(small_policy: Any, make_pairs: Callable[..., list[TokenizedPair]]) -> None:
    module = DPO(policy=small_policy())
    module.configure_model()
    with pytest.raises(SettingError, match=r"found cached, and pairs without .* \(the first is 'pair 0'\)\. Expected"):
        module.read(PaddedLayout(0)(make_pairs([(3, 4, 5), (2, 2, 2)])))


def test_no_such_reference(small_policy: Any) -> None:
    with pytest.raises(SettingError, match=r"model\.reference: found 'frozen', expected cached or live\."):
        DPO(policy=small_policy(), reference="frozen")


class Nan(Callback):
    """Makes a weight of the published policy no number."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        build = pl_module.policy_spec.build

        def broken(*args: Any) -> Any:
            policy = build(*args)
            next(policy.parameters()).data[5:] = torch.nan
            return policy

        pl_module.policy_spec.build = broken


def test_values_that_are_no_numbers_are_told_and_not_kept(
    small_policy: Any, small_data: Any, fit_run: Any, tmp_path: Path
) -> None:
    with pytest.raises(FloatingPointError, match=r"reference: found log-probabilities \[nan, nan\] of pair '.*', expe"):
        fit_run(DPO(policy=small_policy()), small_data(cache_dir=str(tmp_path)), max_steps=1, callbacks=[Nan()])
    assert entries(tmp_path) == []


def test_a_cache_that_cannot_be_written_costs_no_run(
    small_policy: Any, small_data: Any, fit_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ReferenceCache, "add", full)
    with pytest.warns(UserWarning, match="cannot be kept in .*No space left on device.* This run goes on without"):
        cached = fit_run(DPO(policy=small_policy()), small_data(cache_dir=str(tmp_path)), max_epochs=1)
    live = fit_run(DPO(policy=small_policy(), reference="live"), small_data(cache_dir=str(tmp_path)), max_epochs=1)
    assert cached.losses == pytest.approx(live.losses, rel=1e-5)


# Labels that are flipped after the pairs were tokenized


def test_a_flipped_pair_finds_its_swapped_values(
    small_policy: Any, small_data: Any, fit_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = TokenStore.__getitem__

    def some_flipped(store: TokenStore, index: Any) -> Any:
        pair = place(store, index)
        return pair.swapped() if index % 3 == 0 else pair

    runs = {}
    fit_run(DPO(policy=small_policy()), small_data(cache_dir=str(tmp_path)), max_epochs=1)
    there = parts(tmp_path)
    monkeypatch.setattr(TokenStore, "__getitem__", some_flipped)
    for kind in ("live", "cached"):
        module = DPO(policy=small_policy(), reference=kind, optimizer=adam)
        runs[kind] = fit_run(module, small_data(cache_dir=str(tmp_path)), max_epochs=1)
    assert parts(tmp_path) == there
    assert runs["cached"].losses == pytest.approx(runs["live"].losses, rel=1e-5)
