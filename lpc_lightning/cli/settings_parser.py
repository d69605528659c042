"""The parser of a run's settings, with short errors."""

from __future__ import annotations

from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lpc_lightning.cli.setting_errors import explain_setting
from lpc_lightning.errors import ConfigError


class SettingsParser(LightningArgumentParser):
    """LightningArgumentParser whose errors say in one line what was found and expected."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with an error.

        Raises:
            ConfigError: A setting or a class is not known, or a value is of another type.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        command = getattr(ex, "subcommand_parser", None) or self
        settings = command.get_defaults(skip_validation=True).keys()
        if (explanation := explain_setting(message, settings)) is not None:
            raise ConfigError(explanation) from ex
        self.exit(2, f"tip: {command.prog.replace(' [options]', '')} --help lists the settings.\nerror: {message}\n")
