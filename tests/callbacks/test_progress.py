from lpc_lightning.callbacks import PreferenceProgressBar


def test_progress_bar_metrics(fitted) -> None:
    bar = PreferenceProgressBar()
    trainer = fitted(bar, enable_progress_bar=True, enable_checkpointing=False, num_sanity_val_steps=0)
    metrics = bar.get_metrics(trainer, trainer.lightning_module)
    names = {"loss", "accuracy", "margin", "codes"}
    assert set(metrics) == names | {f"val {name}" for name in names}
    assert metrics["val loss"] == trainer.progress_bar_metrics["val/loss"]
