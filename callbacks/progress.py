"""Progress bar with a few metrics under short names."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

SHORT_NAMES = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "latent/codebook_perplexity": "codes",
}


class PreferenceProgressBar(TQDMProgressBar):
    """Progress bar with loss, accuracy and margin of the last logged step, and the codebook perplexity as `codes`."""

    def get_metrics(self, trainer: Trainer, model: LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        """Return the metrics at the end of the bar."""
        metrics = super().get_metrics(trainer, model)
        stages = ("train", "val")
        named = {f"{stage}/{long}": f"{stage} {short}" for stage in stages for long, short in SHORT_NAMES.items()}
        return {named[name].removeprefix("train "): value for name, value in metrics.items() if name in named}
