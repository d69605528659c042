import csv

import pytest
import torch
from lightning.pytorch import Callback

from lpc_lightning.callbacks import ResourceMonitor
from lpc_lightning.callbacks.resources import peak_memory


class Count(Callback):
    """Callback that stores tokens and pairs of each micro-batch."""

    def __init__(self):
        self.counts = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        assert int((batch.segments >= 0).sum()) == batch.tokens
        self.counts.append((batch.tokens, len(batch.ids)))


@pytest.mark.slow
def test_step_counts_all_micro_batches(fitted, tmp_path) -> None:
    count, monitor = Count(), ResourceMonitor(warmup_steps=1)
    fitted(count, monitor, enable_checkpointing=False)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["resources/seconds_per_step"]]
    assert len(rows) == 5
    for step, row in enumerate(rows):
        seconds = float(row["resources/seconds_per_step"])
        tokens, pairs = (sum(column) for column in zip(*count.counts[2 * step : 2 * step + 2], strict=True))
        assert 0 < seconds < 60
        assert float(row["resources/tokens_per_second"]) * seconds == pytest.approx(tokens)
        assert float(row["resources/pairs_per_second"]) * seconds == pytest.approx(pairs)
    later = sorted(float(row["resources/seconds_per_step"]) for row in rows[1:])
    assert monitor.summary()["seconds_per_step"] == pytest.approx((later[1] + later[2]) / 2)


class Clock(Callback):
    """Clock in which each training batch takes a second, and each validation a thousand."""

    seconds = 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seconds += 1

    def on_validation_epoch_start(self, trainer, pl_module):
        self.seconds += 1000


def test_step_time_without_validation(fitted, monkeypatch) -> None:
    """The trainer validates after three micro-batches, in the middle of the second step."""
    clock, monitor = Clock(), ResourceMonitor(warmup_steps=1)
    monkeypatch.setattr("lpc_lightning.callbacks.resources.read_clock", lambda device: clock.seconds)
    settings = {"val_check_interval": 3, "limit_train_batches": 4, "num_sanity_val_steps": 0}
    fitted(monitor, clock, enable_checkpointing=False, **settings)
    assert monitor.summary()["seconds_per_step"] == 2


def test_peak_memory_of_the_process() -> None:
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(2**28, dtype=torch.uint8).repeat(2)
    assert 0.1 < before < peak_memory(torch.device("cpu")) + 1e-9
    assert peak_memory(torch.device("cpu")) >= block.numel() / 2**30
