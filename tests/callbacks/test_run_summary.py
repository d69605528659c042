import json

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from lpc_lightning.algorithms import DPO
from lpc_lightning.callbacks import PreferenceAccuracy, ResourceMonitor, RunSummary
from lpc_lightning.latent import MarginalSpace


class Validations(Callback):
    """What each validation said."""

    def __init__(self):
        self.found = []

    def on_validation_end(self, trainer, pl_module):
        metrics = trainer.callback_metrics
        self.found.append({name: float(value) for name, value in metrics.items() if name.startswith("val/")})


@pytest.mark.parametrize("whole", [True, False])
def test_it_tells_validation_before_and_after(whole, fitted, tmp_path, capsys) -> None:
    said = Validations()
    fitted(said, ResourceMonitor(), RunSummary(), num_sanity_val_steps=-1 if whole else 1, enable_checkpointing=False)
    before, after = said.found
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 5
    expected = {name.removeprefix("val/"): value for name, value in before.items()}
    assert summary["validation_before"] == (expected if whole else {}), "a part of the set is no measurement"
    assert summary["validation_after"] == {name.removeprefix("val/"): value for name, value in after.items()}
    assert set(summary["resources"]) == {
        "tokens_per_second", "pairs_per_second", "seconds_per_step", "peak_memory_gib",
    }  # fmt: skip
    table = capsys.readouterr().out
    row = next(line.split() for line in table.splitlines() if line.startswith("prior accuracy"))
    assert row[-1] == f"{after['val/rewards/accuracies']:.4f}"
    assert row[-2] == (f"{before['val/rewards/accuracies']:.4f}" if whole else "-")
    assert f"--logdir {tmp_path / 'run'}" in table


def test_the_numbers_are_those_of_the_untrained_and_of_the_trained_policy(fitted, tmp_path) -> None:
    """Asked again, of a module that never trained and of the one that did."""
    done = fitted(RunSummary(), num_sanity_val_steps=-1, enable_checkpointing=False)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    trained = done.lightning_module
    untrained = DPO(policy=trained.policy_spec, latent=MarginalSpace(num_codes=4, init_logit_std=0.5))
    for module, stage in ((untrained, "before"), (trained, "after")):
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        (said,) = trainer.validate(module, datamodule=done.datamodule, verbose=False)
        assert {f"val/{name}": value for name, value in summary[f"validation_{stage}"].items()} == said
    assert summary["validation_before"]["loss"] != summary["validation_after"]["loss"]


@pytest.mark.parametrize(("command", "stage"), [("validate", "val"), ("test", "test")])
def test_a_round_alone_is_told_in_short(command, stage, fitted, tmp_path, capsys) -> None:
    """Every metric of all pairs with its value, no group of pairs, and where those are."""
    done = fitted(enable_checkpointing=False)
    capsys.readouterr()
    logger = CSVLogger(tmp_path, name="", version="round")
    trainer = Trainer(
        accelerator="cpu", logger=logger, enable_progress_bar=False, callbacks=[PreferenceAccuracy(), RunSummary()]
    )
    (found,) = getattr(trainer, command)(done.lightning_module, datamodule=done.datamodule, verbose=False)
    *table, place = capsys.readouterr().out.strip().splitlines()
    told = dict(line.split() for line in table if line)
    groups = {name for name in found if "/source/" in name or "/factor/" in name}
    assert groups
    assert told == {name: f"{value:.4f}" for name, value in found.items() if name not in groups}
    assert told[f"{stage}/accuracy/prior"] == told[f"{stage}/rewards/accuracies"]
    (columns, *_) = (tmp_path / "round" / "metrics.csv").read_text().splitlines()
    assert place.endswith(str(tmp_path / "round" / "metrics.csv"))
    assert groups < set(columns.split(","))
