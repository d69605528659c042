"""What the codebook has learned, in numbers and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure

from lpc_lightning.evaluation.accuracy.collect import CollectValidation, log_round
from lpc_lightning.evaluation.codebook.plots import code_use, heat_map, render, scatter
from lpc_lightning.evaluation.codebook.statistics import CodebookReport, CodebookStatistics
from lpc_lightning.latent import LatentSpace
from lpc_lightning.seeding import derive

KINDS = ("source", "factor")


class CodebookMonitor(CollectValidation):
    """Logs what the codes say about the pairs, and draws it; idle for a policy without a latent.

    In each validation, under `val/`: `mutual_information/...` between the prior's likeliest code and source, factor,
    annotator and length difference (see `information`), and how well that code names factor and annotator,
    `codebook/{matched,purity}/...` (see `recovery`). The same of the posterior, which the module does not run there
    (`posterior_mutual_information/...`, `codebook/posterior_matched/...`), and of the exact posterior, prior times
    evidence (`exact_...`); and `latent/{kl,agreement,posterior_entropy,posterior_perplexity}`. Perplexity, dead codes
    and entropy of the prior are the module's own metrics.

    Drawn: the use of each code; codes by source and by factor; a t-SNE (UMAP where `umap-learn` is installed) of z
    coloured by source. As PNG in `codebook/` of the run folder, and as images in TensorBoard.

    Args:
        every: Validations from one drawing to the next. The last one of a run is always drawn, the sanity check never.
        most_points: Pairs in the t-SNE, at most; always the same ones.
    """

    def __init__(self, every: int = 5, most_points: int = 1000) -> None:
        if every < 1:
            raise ValueError(f"CodebookMonitor.every: found {every}, expected at least 1.")
        self.every, self.most_points = every, most_points
        self.report = CodebookReport()
        """Of the last validation."""
        self.collector: CodebookStatistics | None = None
        self._rounds = 0
        self._drawn = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start with no rounds."""
        space: LatentSpace | None = pl_module.latent  # type: ignore[assignment]  # of a `PreferenceModule`
        self.collector = None if space is None else CodebookStatistics(space, self.most_points)
        self._rounds, self._drawn = 0, True

    def state_dict(self) -> dict[str, Any]:
        """Validations so far: a resumed run draws when the whole one would."""
        return {"rounds": self._rounds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._rounds = state_dict["rounds"]

    def finish(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the round, over all devices; draw it where its turn has come."""
        assert self.collector is not None
        self.report = self.collector.collect()
        log_round(pl_module, stage, self.report.metrics)
        if trainer.sanity_checking:
            return
        self._rounds += 1
        self._drawn = False
        if self._rounds % self.every == 0 or trainer.state.fn == TrainerFn.VALIDATING:
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last round."""
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "codebook"  # asks all devices
        if self._drawn or not trainer.is_global_zero:
            return
        self._drawn = True
        try:
            self._write(folder, trainer)
        except Exception as error:  # a picture must not cost a run
            rank_zero_warn(f"codebook: no pictures of step {trainer.global_step}: {type(error).__name__}: {error}")

    def _write(self, folder: Path, trainer: Trainer) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures(self.report, trainer.global_step).items():
            pixels = render(figure, folder / f"step_{trainer.global_step:06d}_{name}.png")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(f"codebook/{name}", pixels, trainer.global_step, dataformats="HWC")


def figures(report: CodebookReport, step: int) -> dict[str, Figure]:
    """What there is to draw of a validation, by name."""
    drawn: dict[str, Figure] = {}
    if report.codes is not None and report.prior is not None:
        drawn["use"] = code_use(report.prior, report.codes, report.posterior, f"Use of the codes, step {step}")
        for kind in KINDS:
            labels = [row[kind] for row in report.rows]
            if any(labels):
                drawn[f"heatmap_{kind}"] = heat_map(report.codes, labels, kind, f"Codes by {kind}, step {step}")
    if report.points is not None:
        kind = next((kind for kind in KINDS if any(row[kind] for row in report.point_rows)), KINDS[0])
        labels = [row[kind] for row in report.point_rows]
        title = f"z of {len(labels)} pairs, step {step}"
        drawn["z"] = scatter(report.points, labels, kind, title, seed=derive("embedding"))
    return drawn
