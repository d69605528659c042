"""Short table of results at the end of a run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn

from lpc_lightning.callbacks.resources import ResourceMonitor
from lpc_lightning.evaluation.provenance import provenance
from lpc_lightning.files.json_files import write_json
from lpc_lightning.loggers import log_table, run_folder, viewers

ROWS = {
    "loss": "loss",
    "prior accuracy": "rewards/accuracies",
    "reward margin": "rewards/margins",
    "codebook perplexity": "latent/codebook_perplexity",
    "dead codes": "latent/dead_codes",
    "prior entropy (nats)": "latent/prior_entropy",
}
BEFORE, AFTER = "validation_before", "validation_after"
"""Entries of a checkpoint, and of the summary: the metrics before training, and those of the latest validation."""


class RunSummary(Callback):
    """Callback that prints validation before and after training, speed and memory.

    It writes the same to `summary.json` in the run folder, and as a table to each logger that takes tables. The file
    also has the decision of a warm start: whether the fitted codes were kept, and why. And it has the git revision,
    packages and platform of the run, by which `report` finds runs of different versions.

    Validation before training is Lightning's sanity check. With `trainer.num_sanity_val_steps: -1` it covers the whole
    validation set, and its metrics are also logged, at step 0.

    After `validate` and `test`, the metrics over all pairs are printed, with the name of the file that contains the
    metrics of groups.
    """

    def __init__(self) -> None:
        """Start without metrics."""
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the metrics, which a resumed run may not measure.

        It has no sanity check. After the last step, it has no validation either.
        """
        # Not as the callback's state: Lightning would warn wherever a checkpoint is loaded without this callback.
        checkpoint[BEFORE], checkpoint[AFTER] = self.before, self.after

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the metrics."""
        self.before, self.after = (dict(checkpoint.get(name, {})) for name in (BEFORE, AFTER))

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the metrics of the validation before the first step."""
        self.before = _validation(trainer)
        if trainer.num_sanity_val_steps == float("inf"):
            for logger in trainer.loggers:
                logger.log_metrics({f"val/{name}": value for name, value in self.before.items()}, 0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the metrics of the latest validation."""
        if not trainer.sanity_checking:
            self.after = _validation(trainer)
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._print_round(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of the test."""
        self._print_round(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and write the summary."""
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        is_complete = trainer.num_sanity_val_steps == float("inf")
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connector
        monitors = [callback for callback in callbacks if isinstance(callback, ResourceMonitor)]
        resources = monitors[0].summary() if monitors else {}
        before = self.before if is_complete else {}
        summary: dict[str, Any] = {
            "steps": trainer.global_step,
            BEFORE: before,
            AFTER: self.after,
            "resources": resources,
            "versions": provenance(),
        }
        if (result := getattr(pl_module, "warm_start_result", None)) is not None:
            summary["warm_start"] = result
        rows = _rows(before, self.after, resources, trainer.global_step)
        print(_lines(rows))
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by Lightning
            return  # a trial of a few batches leaves no files
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "summary.json", summary)
        print(f"Run folder: {folder}")
        log_table(trainer, "summary", ("", "before", "after"), rows)
        for line in viewers(trainer):
            print(line)

    def _print_round(self, trainer: Trainer) -> None:
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        # Metrics of a group have a longer name: `val/accuracy/prior/source/books`.
        overall = {name: value for name, value in metrics.items() if name.count("/") < 3}
        width = max(map(len, overall), default=0)
        print("\n" + "\n".join(f"{name:<{width}}  {value:>10.4f}" for name, value in overall.items()))
        if any(isinstance(logger, CSVLogger) for logger in trainer.loggers):
            print(f"\nAll {len(metrics)} metrics, including those of groups: {folder / 'metrics.csv'}")


def _validation(trainer: Trainer) -> dict[str, float]:
    metrics = trainer.callback_metrics
    return {name.removeprefix("val/"): float(value) for name, value in metrics.items() if name.startswith("val/")}


def _rows(
    before: dict[str, float], after: dict[str, float], resources: dict[str, float], steps: int
) -> list[tuple[str, str, str]]:
    """Return the rows of the table: what, before, after."""

    def cell(values: dict[str, float], name: str) -> str:
        return f"{values[name]:.4f}" if name in values else "-"

    rows = [(title, cell(before, name), cell(after, name)) for title, name in ROWS.items() if name in after]
    rows += [("optimizer steps", "", str(steps))]
    # A step of a small policy takes milliseconds.
    speeds = {"tokens_per_second": ("tokens per second", ".1f"), "seconds_per_step": ("seconds per step", ".3g")}
    rows += [(title, "", format(resources[name], form)) for name, (title, form) in speeds.items() if name in resources]
    rows += [("peak memory", "", f"{resources['peak_memory_gib']:.2f} GiB")] if resources else []
    return rows


def _lines(rows: list[tuple[str, str, str]]) -> str:
    rows = [("", "before", "after"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows]
    return "\n".join(["", lines[0], "-" * (sum(widths) + 4), *lines[1:], ""])
