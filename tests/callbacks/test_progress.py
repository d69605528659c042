from lpc_lightning.callbacks import PreferenceProgressBar


def test_the_bar_shows_what_matters_by_short_names(fitted) -> None:
    bar = PreferenceProgressBar()
    trainer = fitted(bar, enable_progress_bar=True, enable_checkpointing=False, num_sanity_val_steps=0)
    shown = bar.get_metrics(trainer, trainer.lightning_module)
    names = {"loss", "accuracy", "margin", "codes"}
    assert set(shown) == names | {f"val {name}" for name in names}
    assert shown["val loss"] == trainer.progress_bar_metrics["val/loss"]
