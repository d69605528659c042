import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lpc_lightning.callbacks import FinalValidation


def test_run_ending_in_mid_epoch_is_validated(fitted, tmp_path) -> None:
    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/rewards/accuracies", mode="max", filename="best")
    trainer = fitted(FinalValidation(), best, max_steps=3, max_epochs=-1, num_sanity_val_steps=0)
    assert trainer.global_step == 3
    assert best.best_model_score == trainer.callback_metrics["val/rewards/accuracies"]
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()


class Steps(Callback):
    """Callback that stores the step of each validation."""

    def __init__(self):
        self.steps = []

    def on_validation_end(self, trainer, pl_module):
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize(("interval", "steps"), [(4, [2, 4, 7, 9, 10]), (10, [5, 10])])
def test_last_epoch_ends_with_one_validation(interval, steps, fitted) -> None:
    """An epoch has ten batches. Two of them are a step."""
    validated = Steps()
    settings = {"max_epochs": 2, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    fitted(FinalValidation(), validated, val_check_interval=interval, **settings)
    assert validated.steps == steps


def test_last_of_epochs_without_validation(fitted) -> None:
    """Epochs 2 and 4 of five are validated by the interval. The last one has the metrics of the trained weights."""
    validated = Steps()
    settings = {"max_epochs": 5, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    trainer = fitted(FinalValidation(), validated, check_val_every_n_epoch=2, **settings)
    assert validated.steps == [10, 20, 25]
    assert trainer.check_val_every_n_epoch == 2


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"val_check_interval": 4, "min_epochs": 1}, [2, 4, 5]),
        ({"max_steps": 3, "min_steps": 2}, [3]),
        ({"max_steps": 3, "min_steps": 9, "min_epochs": 2}, [3]),
    ],
)
def test_least_numbers_keep_the_final_validation(settings, steps, fitted) -> None:
    """An epoch has five steps. Lightning counts it for `min_epochs` only after its last validation."""
    validated = Steps()
    trainer = fitted(FinalValidation(), validated, num_sanity_val_steps=0, enable_checkpointing=False, **settings)
    assert validated.steps == steps
    assert trainer.fit_loop.min_epochs == settings.get("min_epochs", 1)
    assert trainer.fit_loop.min_steps == settings.get("min_steps")


def test_lightning_alone_does_not_validate(fitted) -> None:
    trainer = fitted(max_steps=3, max_epochs=-1, num_sanity_val_steps=0, enable_checkpointing=False)
    assert "val/loss" not in trainer.callback_metrics
