"""One cell in this process: a fit, and the scores of the fitted policy."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.cli import PreferenceCLI
from lpc_lightning.cli.log import set_up_logging
from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.data.datamodule import Stage
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.evaluation.ablation.cells.folder import CellFolder, Weights
from lpc_lightning.evaluation.accuracy.accuracy_modes import AccuracyReport
from lpc_lightning.evaluation.accuracy.collect import CollectPairs
from lpc_lightning.evaluation.adaptation.pairs import AdaptationReport
from lpc_lightning.files.json_files import write_json, write_pieces

PAIR_COLUMNS = ("prompt", "source", "factor", "annotator", "flipped", "has_gold", "tokens", "margins")
"""Columns of the file of pairs."""


class CellCLI(PreferenceCLI):
    """Command line of a cell.

    It asks before the fit which stages have pairs, and removes the earlier files of the cell after the first step.
    """

    stages: tuple[Stage, ...] = ()
    """Those of validation and test that have pairs. An error in their settings ends the cell before its fit."""

    def before_fit(self) -> None:
        """See `PreferenceCLI`."""
        super().before_fit()
        scored: tuple[Stage, ...] = ("validation", "test")
        self.stages = tuple(stage for stage in scored if _has_pairs(self.datamodule, stage))
        assert self._run_folder is not None
        folder = CellFolder(self._run_folder.parent)
        if folder.earlier.exists():
            # Added to the trainer, but not to the settings.
            callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connector
            callbacks.append(DiscardEarlier(folder))


class DiscardEarlier(Callback):
    """Removes the earlier files of a cell after the first step: the settings have proved to be usable."""

    def __init__(self, folder: CellFolder) -> None:
        """Store the folder.

        Args:
            folder: The cell.
        """
        self.folder = folder

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remove the files."""
        if trainer.is_global_zero:
            self.folder.discard_earlier()


def run_cell(path: Path, weights: Weights) -> None:
    """Fit with the arguments of the cell's record; then validate, test, and write `results.json`.

    If the cell has a checkpoint, the fit resumes from it. A tuning cell is not tested.

    Args:
        path: The cell's folder.
        weights: Weights to validate and test: those of the last step, or those of `best.ckpt`.
    """
    folder = CellFolder(path)
    record = folder.record()
    assert record is not None
    # A strategy with one process per device starts this file again for the other devices. The first process has
    # prepared the folder for them.
    sys.argv = [__file__, str(path), weights]
    is_first = "LOCAL_RANK" not in os.environ
    checkpoint = folder.checkpoint()
    if is_first:
        folder.prepare_fit(checkpoint)
    resume = [] if checkpoint is None else [f"--ckpt_path={checkpoint}"]
    set_up_logging()
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter")
    # No progress bar, because it would fill the log file.
    cli = CellCLI(["fit", *record.arguments, "--trainer.enable_progress_bar=false", *resume], folder.run)
    module, data = cli.model, cli.datamodule
    ckpt_path = "best" if weights == "best" else None
    metrics: dict[str, Any] = {}
    for stage in cli.stages:
        if stage == "test" and folder.is_tuning:
            continue  # test pairs choose nothing, and their scores may take as long as the fit
        evaluate = cli.trainer.test if stage == "test" else cli.trainer.validate
        evaluate(module, datamodule=data, verbose=False, ckpt_path=ckpt_path)
        metrics |= {name: _finite_or_none(value) for name, value in cli.trainer.callback_metrics.items()}
        write_pairs(folder, stage, cli.trainer)
    results = {
        "axes": dict(record.axes),
        "metrics": dict(sorted(metrics.items())),
        "parameters": _count_parameters(module),
        "step": cli.trainer.global_step,
    }
    if cli.trainer.is_global_zero:
        folder.join_metrics()
        write_json(folder.results, results)


def write_pairs(folder: CellFolder, stage: str, trainer: Trainer) -> None:
    """Write a line for each pair of the last round, and one for each metric of adaptation, if callbacks have them.

    A report needs the prompts, because pairs of one prompt are not independent.

    Args:
        folder: The cell's folder.
        stage: `validation` or `test`.
        trainer: The trainer that ended the round.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connector
    reports = [getattr(callback, "report", None) for callback in callbacks if isinstance(callback, CollectPairs)]
    for report in reports if trainer.is_global_zero else ():
        if isinstance(report, AccuracyReport):
            lines: Iterable[Any] = ({name: item[name] for name in PAIR_COLUMNS} for item in report.items)
            write_pieces(folder.pairs(stage), (f"{json.dumps(line)}\n" for line in lines))
        elif isinstance(report, AdaptationReport) and report.metrics:
            lines = (
                {
                    "metric": name,
                    "mean": score.accuracy,
                    "prompts": score.of_prompts._asdict(),
                    "annotators": score.of_annotators._asdict(),
                    "both": score.of_both._asdict(),
                }
                for name, score in report.metrics.items()
            )
            write_pieces(folder.deviations(stage), (f"{json.dumps(line)}\n" for line in lines))


def _has_pairs(data: PreferenceDataModule, stage: Stage) -> bool:
    source = data.source(stage)
    return source is not None and next(iter(source.read(DataReport())), None) is not None


def _finite_or_none(value: Any) -> float | None:
    """Convert a metric to a JSON number. JSON has no NaN and no infinity; they become None."""
    number = float(value)
    return number if math.isfinite(number) else None


def _count_parameters(module: PreferenceModule) -> dict[str, int]:
    return {
        "policy": sum(parameter.numel() for parameter in module.policy.causal_lm.parameters()),
        "latent": sum(parameter.numel() for parameter in module.latent_parameters()),
    }


if __name__ == "__main__":
    run_cell(Path(sys.argv[1]), sys.argv[2])  # type: ignore[arg-type]  # set by `run_cell` itself
