"""Metrics and plots of what the codebook has learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.accuracy.collect import CollectValidation, log_round
from lpc_lightning.evaluation.codebook.plots import code_use, heat_map, render, scatter
from lpc_lightning.evaluation.codebook.statistics import CodebookReport, CodebookStatistics
from lpc_lightning.latent import LatentSpace
from lpc_lightning.loggers import log_picture, run_folder
from lpc_lightning.seeding import derive

LABELS = ("source", "factor")


class CodebookMonitor(CollectValidation):
    """Callback that logs and plots how the codes relate to the labels of the pairs. Idle without a latent.

    Logged in each validation, under `val/`:

    - `mutual_information/...` between the most likely code under the prior and source, factor, annotator and length
      difference (see `information`), and the agreement of that code with factor and annotator,
      `codebook/{matched,purity}/...` (see `recovery`).
    - The same for the posterior, which the module does not compute in validation (`posterior_mutual_information/...`,
      `codebook/posterior_matched/...`), and for the exact posterior, prior times likelihood (`exact_...`).
    - `latent/{kl,agreement,posterior_entropy,posterior_perplexity}`. The module itself logs perplexity, dead codes and
      entropy of the prior.

    Plotted: the use of each code; codes by source and by factor; a t-SNE of z coloured by source (UMAP if `umap-learn`
    is installed). The plots are written as PNG to `codebook/` in the run folder, and to each logger that takes
    pictures.

    Args:
        every: Plot every n-th validation. The last one of a run is always plotted, the sanity check never.
        most_points: Most pairs in the t-SNE. They are the same ones in every validation.
    """

    def __init__(self, every: int = 5, most_points: int = 1000) -> None:
        if every < 1:
            raise ConfigError(f"CodebookMonitor.every: found {every}, expected at least 1.")
        self.every, self.most_points = every, most_points
        self.report = CodebookReport()
        """Report of the last validation."""
        self.collector: CodebookStatistics | None = None
        self._rounds = self._step = 0
        self._drawn = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the collector, and reset the number of rounds."""
        space: LatentSpace | None = pl_module.latent  # type: ignore[assignment]  # an attribute of `PreferenceModule`
        self.collector = None if space is None else CodebookStatistics(space, self.most_points)
        self._rounds, self._drawn = 0, True

    def state_dict(self) -> dict[str, Any]:
        """Return the number of validations: a resumed run must plot the same ones as an uninterrupted run."""
        return {"rounds": self._rounds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of validations."""
        self._rounds = state_dict["rounds"]

    def finish(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the round over all devices, and plot every n-th round."""
        assert self.collector is not None
        assert isinstance(pl_module, PreferenceModule)
        self.report = self.collector.collect()
        log_round(pl_module, stage, self.report.metrics)
        if trainer.sanity_checking:
            return
        self._rounds += 1
        self._drawn, self._step = False, pl_module.weights_step
        # A run that is ended after this validation, and resumed from its checkpoint, has no end of training.
        is_last = trainer.should_stop or trainer.state.fn == TrainerFn.VALIDATING
        if self._rounds % self.every == 0 or is_last:
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plot the last round, if it was not known to be the last one."""
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        folder = run_folder(trainer) / "codebook"
        if self._drawn or not trainer.is_global_zero:
            return
        self._drawn = True
        try:
            self._write(folder, trainer)
        except Exception as error:  # a failed plot must not end the training
            rank_zero_warn(f"codebook: the plots of step {self._step} failed: {type(error).__name__}: {error}")

    def _write(self, folder: Path, trainer: Trainer) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures(self.report, self._step).items():
            pixels = render(figure, folder / f"step_{self._step:06d}_{name}.png")
            log_picture(trainer, f"codebook/{name}", pixels, self._step)


def figures(report: CodebookReport, step: int) -> dict[str, Figure]:
    """Draw the figures of a validation for which the report has data. Returns them by name."""
    drawn: dict[str, Figure] = {}
    if report.codes is not None and report.prior is not None:
        drawn["use"] = code_use(report.prior, report.codes, report.posterior, f"Use of the codes, step {step}")
        for label in LABELS:
            values = [row[label] for row in report.rows]
            if any(values):
                drawn[f"heatmap_{label}"] = heat_map(report.codes, values, label, f"Codes by {label}, step {step}")
    if report.points is not None:
        label = next((label for label in LABELS if any(row[label] for row in report.point_rows)), LABELS[0])
        values = [row[label] for row in report.point_rows]
        title = f"z of {len(values)} pairs, step {step}"
        drawn["z"] = scatter(report.points, values, label, title, seed=derive("embedding"))
    return drawn
