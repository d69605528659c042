"""A progress bar that shows what matters, by short names."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

SHORT = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "latent/codebook_perplexity": "codes",
}


class PreferenceProgressBar(TQDMProgressBar):
    """Loss, accuracy and margin of the last logged step, and how many codes are in use (the codebook's perplexity)."""

    def get_metrics(self, trainer: Trainer, model: LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        """What stands at the end of the bar."""
        found = super().get_metrics(trainer, model)
        stages = ("train", "val")
        named = {f"{stage}/{long}": f"{stage} {short}" for stage in stages for long, short in SHORT.items()}
        return {named[name].removeprefix("train "): value for name, value in found.items() if name in named}
