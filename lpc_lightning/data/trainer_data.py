"""Preference data of a trainer."""

from __future__ import annotations

from lightning.pytorch import Trainer

from lpc_lightning.data.datamodule import PreferenceDataModule
from lpc_lightning.data.tokenization.templates import TemplateSettings
from lpc_lightning.errors import ConfigError


def preference_data(trainer: Trainer) -> PreferenceDataModule | None:
    """Return the data of a trainer's run, or None if there is none of this class."""
    data = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning's connector
    return data if isinstance(data, PreferenceDataModule) else None


def required_data(trainer: Trainer, setting: str, advice: str) -> PreferenceDataModule:
    """Return the data of a trainer's run, for a setting that works with this class only.

    Args:
        trainer: The trainer.
        setting: Name and value of the setting, such as `model.reference: found cached`.
        advice: What to do with other data, as a sentence.

    Raises:
        ConfigError: The run has no data of this class.
    """
    data = preference_data(trainer)
    if data is None:
        found = type(trainer.datamodule).__name__  # type: ignore[attr-defined]  # set by Lightning's connector
        raise ConfigError(f"{setting} with data of {found}, expected a PreferenceDataModule. {advice}")
    return data


def template_settings(trainer: Trainer) -> TemplateSettings:
    """Return the template of a trainer's data, or the default one."""
    data = preference_data(trainer)
    return TemplateSettings() if data is None else data.template_settings
