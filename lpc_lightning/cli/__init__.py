"""The command line: `lpc-lightning COMMAND ...`."""

from lpc_lightning.cli.commands import main
from lpc_lightning.cli.preference_cli import PreferenceCLI

__all__ = ["PreferenceCLI", "main"]
