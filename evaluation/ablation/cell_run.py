"""One cell in this process: a fit, and what the fitted policy scores."""

from __future__ import annotations

import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.cli import PreferenceCLI, set_up_logging
from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.evaluation.ablation.folder import CellFolder, Weights, write_json


def run_cell(path: Path, weights: Weights) -> None:
    """Fit as the cell's record says, from its last checkpoint if there is one; validate, test, write `results.json`.

    Args:
        path: The cell's folder.
        weights: Which weights are validated and tested: those of the last step, or those of `best.ckpt`.
    """
    folder = CellFolder(path)
    record = folder.record()
    assert record is not None
    # Where a strategy starts a process a device, these run this file, too, and the first one has prepared the folder.
    sys.argv = [__file__, str(path), weights]
    first = "LOCAL_RANK" not in os.environ
    checkpoint = folder.checkpoint()
    if first:
        folder.make_way(checkpoint)
    resume = [] if checkpoint is None else [f"--ckpt_path={checkpoint}"]
    set_up_logging()
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter")
    # No bar: it would fill the log.
    done = PreferenceCLI(["fit", *record.arguments, "--trainer.enable_progress_bar=false", *resume], folder.run)
    module, data = done.model, done.datamodule
    chosen = "best" if weights == "best" else None
    metrics: dict[str, Any] = {}
    for stage, evaluate in (("validation", done.trainer.validate), ("test", done.trainer.test)):
        if _has_pairs(data, stage):
            evaluate(module, datamodule=data, verbose=False, ckpt_path=chosen)
            metrics |= {name: _number(value) for name, value in done.trainer.callback_metrics.items()}
    results = {
        "axes": dict(record.axes),
        "metrics": dict(sorted(metrics.items())),
        "parameters": _parameters(module),
        "step": done.trainer.global_step,
    }
    if done.trainer.is_global_zero:
        folder.join_metrics()
        write_json(folder.results, results)


def _has_pairs(data: PreferenceDataModule, stage: Any) -> bool:
    source = data.source(stage)
    return source is not None and next(iter(source.read(DataReport())), None) is not None


def _number(value: Any) -> float | None:
    """A metric as JSON has it: nothing in place of NaN."""
    number = float(value)
    return number if math.isfinite(number) else None


def _parameters(module: PreferenceModule) -> dict[str, int]:
    return {
        "policy": sum(each.numel() for each in module.policy.causal_lm.parameters()),
        "latent": sum(each.numel() for each in module.latent_parameters()),
    }


if __name__ == "__main__":
    run_cell(Path(sys.argv[1]), sys.argv[2])  # type: ignore[arg-type]  # written above
