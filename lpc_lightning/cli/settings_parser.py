"""Parsers of settings, with short errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lpc_lightning.cli.setting_errors import explain_setting
from lpc_lightning.data.tokenization.template_argument import mark_texts
from lpc_lightning.errors import ConfigError


class ShortErrors(ArgumentParser):
    """A parser whose errors state in one line what was found and expected."""

    required: tuple[str, ...] = ()
    """Settings that have a name and no default."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with an error.

        Raises:
            ConfigError: A setting or a class is not known, a value is of another type, or a setting is missing. A text
                of the parser that has no sentence of its own is quoted in one line.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        settings = parser.get_defaults(skip_validation=True).keys()
        explanation = explain_setting(message, settings, self.required, parser.prog)
        if explanation is None:
            explanation = f"{' '.join(message.split()).rstrip('.')}. `{parser.prog} --help` lists the settings."
        raise ConfigError(explanation) from ex


class SettingsParser(ShortErrors, LightningArgumentParser):
    """The parser of a run's settings."""

    def parse_args(  # type: ignore[override]  # theirs has overloads of argparse
        self, args: Sequence[str] | None = None, *others: Any, **options: Any
    ) -> Namespace:
        """Parse a command line. Texts of template arguments on it are marked (see `mark_texts`)."""
        parsed: Namespace = super().parse_args(mark_texts(args), *others, **options)
        return parsed
