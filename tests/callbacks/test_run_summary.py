import json

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from lpc_lightning.algorithms import DPO
from lpc_lightning.callbacks import BestAndLast, FinalValidation, PreferenceAccuracy, ResourceMonitor, RunSummary
from lpc_lightning.evaluation.provenance import provenance
from lpc_lightning.latent import MarginalSpace


class Validations(Callback):
    """Callback that stores the metrics of each validation."""

    def __init__(self):
        self.metrics = []

    def on_validation_end(self, trainer, pl_module):
        metrics = trainer.callback_metrics
        self.metrics.append({name: float(value) for name, value in metrics.items() if name.startswith("val/")})


@pytest.mark.parametrize("complete", [True, False])
def test_summary_before_and_after_training(complete, fitted, tmp_path, capsys) -> None:
    validations, steps = Validations(), -1 if complete else 1
    fitted(validations, ResourceMonitor(), RunSummary(), num_sanity_val_steps=steps, enable_checkpointing=False)
    before, after = validations.metrics
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 5
    expected = {name.removeprefix("val/"): value for name, value in before.items()}
    assert summary["validation_before"] == (expected if complete else {}), "a part of the set is not reported"
    assert summary["validation_after"] == {name.removeprefix("val/"): value for name, value in after.items()}
    assert set(summary["resources"]) == {
        "tokens_per_second", "pairs_per_second", "seconds_per_step", "peak_memory_gib",
    }  # fmt: skip
    versions = provenance()
    assert {**summary["versions"], "date": versions["date"]} == versions
    table = capsys.readouterr().out
    row = next(line.split() for line in table.splitlines() if line.startswith("prior accuracy"))
    assert row[-1] == f"{after['val/rewards/accuracies']:.4f}"
    assert row[-2] == (f"{before['val/rewards/accuracies']:.4f}" if complete else "-")
    assert f"Run folder: {tmp_path / 'run'}" in table
    seconds = next(line.split()[-1] for line in table.splitlines() if line.startswith("seconds per step"))
    assert float(seconds) == pytest.approx(summary["resources"]["seconds_per_step"], rel=0.005)


def test_summary_against_separate_validations(fitted, tmp_path) -> None:
    """Validate an untrained module and the trained one again."""
    finished = fitted(RunSummary(), num_sanity_val_steps=-1, enable_checkpointing=False)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    trained = finished.lightning_module
    untrained = DPO(policy=trained.policy_spec, latent=MarginalSpace(num_codes=4, init_logit_std=0.5))
    for module, stage in ((untrained, "before"), (trained, "after")):
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        (metrics,) = trainer.validate(module, datamodule=finished.datamodule, verbose=False)
        assert {f"val/{name}": value for name, value in summary[f"validation_{stage}"].items()} == metrics
    assert summary["validation_before"]["loss"] != summary["validation_after"]["loss"]


def test_summary_is_replaced_whole(fitted, tmp_path) -> None:
    """A second name of the earlier file keeps its content: nothing is written into that file."""
    summary = RunSummary()
    trainer = fitted(summary, max_epochs=None, max_steps=1, limit_val_batches=0, enable_checkpointing=False)
    path, earlier = tmp_path / "run" / "summary.json", tmp_path / "earlier"
    earlier.hardlink_to(path)
    content = earlier.read_text()
    summary.after = {"loss": 0.5}
    summary.on_fit_end(trainer, trainer.lightning_module)
    assert json.loads(path.read_text())["validation_after"] == {"loss": 0.5}
    assert earlier.read_text() == content


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:resume. found trainer.max_steps")
def test_summary_of_a_resumed_run_has_the_start(fitted, tmp_path) -> None:
    settings = {"num_sanity_val_steps": -1, "max_epochs": None, "enable_checkpointing": False}
    fitted(RunSummary(), max_steps=2, **settings).save_checkpoint(tmp_path / "two.ckpt")
    stopped = json.loads((tmp_path / "run" / "summary.json").read_text())
    logger = CSVLogger(tmp_path, name="", version="resumed")
    fitted(RunSummary(), max_steps=3, logger=logger, ckpt_path=tmp_path / "two.ckpt", **settings)
    summary = json.loads((tmp_path / "resumed" / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["validation_before"] == stopped["validation_before"] != {}


class Ended(Callback):
    """Ends the run after the training, as a signal may while another callback runs benchmarks."""

    def on_fit_end(self, trainer, pl_module):
        raise RuntimeError("ended")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:resume. found a checkpoint of step 5")
def test_summary_of_a_run_resumed_after_its_end(fitted, tmp_path) -> None:
    """The resumed run has no step left, and thus no validation."""
    validations, repeated = Validations(), Validations()
    with pytest.raises(RuntimeError, match="ended"):
        fitted(Ended(), RunSummary(), FinalValidation(), BestAndLast(), validations)
    assert not (tmp_path / "run" / "summary.json").exists()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    logger = CSVLogger(tmp_path, name="", version="resumed")
    fitted(RunSummary(), FinalValidation(), BestAndLast(), repeated, logger=logger, ckpt_path=last)
    assert repeated.metrics == []
    summary = json.loads((tmp_path / "resumed" / "summary.json").read_text())
    expected = {name.removeprefix("val/"): value for name, value in validations.metrics[-1].items()}
    assert summary["validation_after"] == expected != {}


@pytest.mark.slow
@pytest.mark.parametrize(("command", "stage"), [("validate", "val"), ("test", "test")])
def test_summary_of_validate_and_test(command, stage, fitted, tmp_path, capsys) -> None:
    """The output has every metric over all pairs, no metrics of groups, and the file that contains those."""
    finished = fitted(enable_checkpointing=False)
    capsys.readouterr()
    logger = CSVLogger(tmp_path, name="", version="round")
    trainer = Trainer(
        accelerator="cpu", logger=logger, enable_progress_bar=False, callbacks=[PreferenceAccuracy(), RunSummary()]
    )
    (metrics,) = getattr(trainer, command)(finished.lightning_module, datamodule=finished.datamodule, verbose=False)
    *table, last = capsys.readouterr().out.strip().splitlines()
    printed = dict(line.split() for line in table if line)
    groups = {name for name in metrics if "/source/" in name or "/factor/" in name}
    groups |= {name for name in metrics if name.endswith("/length_matched") and name.count("/") == 3}
    assert groups
    assert printed == {name: f"{value:.4f}" for name, value in metrics.items() if name not in groups}
    assert printed[f"{stage}/accuracy/prior"] == printed[f"{stage}/rewards/accuracies"]
    (columns, *_) = (tmp_path / "round" / "metrics.csv").read_text().splitlines()
    assert last.endswith(str(tmp_path / "round" / "metrics.csv"))
    assert groups < set(columns.split(","))
