"""Tests of what a training step needs and logs: several pairs in a batch, the last step of a run and of an epoch."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

from lpc_lightning.algorithms import DPO
from lpc_lightning.callbacks import ResourceMonitor
from lpc_lightning.data import SyntheticPreferences
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.errors import ConfigError
from lpc_lightning.latent import MarginalSpace
from lpc_lightning.robust import REPO, DrDPO
from lpc_lightning.types import PreferenceBatch, TokenizedPair

OF_SEVERAL: dict[str, Callable[[], dict[str, Any]]] = {
    "latent.annotators": lambda: {"latent": MarginalSpace(num_codes=2, hidden=8, annotators=True)},
    "latent.diversity_weight": lambda: {"latent": MarginalSpace(num_codes=2, hidden=8, diversity_weight=0.1)},
    "model.robust_loss DrDPO": lambda: {"robust_loss": DrDPO()},
}


@pytest.fixture
def one_pair(tmp_path: Path) -> SyntheticPreferences:
    return SyntheticPreferences(train_pairs=4, validation_pairs=2, annotators=2, batch_size=1, cache_dir=str(tmp_path))


@pytest.mark.parametrize("setting", OF_SEVERAL)
def test_settings_of_several_pairs_need_them(
    setting: str, one_pair: SyntheticPreferences, small_policy: Any, make_trainer: Any
) -> None:
    message = (
        rf"^data\.batch_size: found 1 with {setting}, for which .* expected at least 2\. .*accumulate_grad_batches"
    )
    with pytest.raises(ConfigError, match=message):
        make_trainer(max_steps=1).fit(DPO(policy=small_policy(), **OF_SEVERAL[setting]()), datamodule=one_pair)


def test_other_settings_allow_one_pair(one_pair: SyntheticPreferences, small_policy: Any, make_trainer: Any) -> None:
    module = DPO(policy=small_policy(), latent=MarginalSpace(num_codes=2, hidden=8), robust_loss=REPO())
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(module, datamodule=one_pair)
    assert trainer.global_step == 1


class StopAt(Callback):
    """Stops the run after a step, as `max_time` does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.should_stop = True


@pytest.mark.parametrize(("step", "logged"), [(7, False), (8, True)])
def test_values_of_the_step_that_stops_a_run(
    step: int, logged: bool, small_policy: Any, make_trainer: Any, tmp_path: Path
) -> None:
    """Steps 1, 4 and 8 of 16 are logged. A row of step 7 has no values, in place of those of step 4."""
    data = SyntheticPreferences(train_pairs=64, validation_pairs=2, batch_size=4, cache_dir=str(tmp_path / "cache"))
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(
        min_epochs=0,
        max_epochs=1,
        limit_val_batches=0,
        log_every_n_steps=4,
        logger=logger,
        callbacks=[StopAt(step), ResourceMonitor()],
    )
    trainer.fit(DPO(policy=small_policy()), datamodule=data)
    assert trainer.global_step == step
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ("train/loss", "resources/seconds_per_step")
    values = {int(row["step"]): [row[name] for name in names] for row in rows if row["train/loss"]}
    assert list(values) == ([3, 7] if logged else [3, 6])
    assert (values[step - 1] == ["nan", "nan"]) == (not logged)
    assert "nan" not in values[3]


class Batches(IterableDataset[PreferenceBatch]):
    """Four batches of four pairs, of unknown number."""

    def __init__(self, pairs: list[TokenizedPair]) -> None:
        self.batches = [PaddedLayout(0)(pairs[start : start + 4]) for start in range(0, 16, 4)]

    def __iter__(self) -> Iterator[PreferenceBatch]:
        return iter(self.batches)


class Counted(Callback):
    """Records the number of pairs in the latent's moments after each batch, and whether the step is logged."""

    def __init__(self) -> None:
        self.pairs: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.pairs.append(float(pl_module.latent.prior.moments.pairs))  # type: ignore[union-attr, arg-type]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_last_window_without_a_known_length(
    small_policy: Any, make_pairs: Callable[..., list[TokenizedPair]], make_trainer: Any
) -> None:
    """Three batches make a step, and the fourth one alone."""
    counted, module = (
        Counted(),
        DPO(policy=small_policy(), latent=MarginalSpace(num_codes=2, hidden=8), reference="live"),
    )
    pairs = make_pairs([(5, 3, 2), (4, 2, 6), (6, 1, 4), (3, 2, 2)] * 4)
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=3, callbacks=[counted])
    trainer.fit(module, train_dataloaders=DataLoader(Batches(pairs), batch_size=None))
    assert trainer.global_step == 2
    assert counted.pairs == [0, 0, 12, 16]
