from lightning.pytorch.callbacks import ModelCheckpoint

from lpc_lightning.callbacks import FinalValidation


def test_run_ending_in_mid_epoch_is_validated(fitted, tmp_path) -> None:
    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/rewards/accuracies", mode="max", filename="best")
    trainer = fitted(FinalValidation(), best, max_steps=3, max_epochs=-1, num_sanity_val_steps=0)
    assert trainer.global_step == 3
    assert best.best_model_score == trainer.callback_metrics["val/rewards/accuracies"]
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()


def test_lightning_alone_does_not_validate(fitted) -> None:
    trainer = fitted(max_steps=3, max_epochs=-1, num_sanity_val_steps=0, enable_checkpointing=False)
    assert "val/loss" not in trainer.callback_metrics
