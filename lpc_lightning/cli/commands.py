"""The commands of `lpc-lightning`, and the run of one of them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.abc import InspectLoader
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pkgutil import resolve_name
from textwrap import fill

from lightning.pytorch.utilities.exceptions import SIGTERMException

from lpc_lightning.cli.config_arguments import check_config_arguments
from lpc_lightning.cli.function_command import run_function
from lpc_lightning.cli.lightning_errors import explain_lightning_error
from lpc_lightning.cli.log import set_up_logging
from lpc_lightning.cli.preference_cli import SUMMARIES, PreferenceCLI
from lpc_lightning.cli.system_errors import explain_system_error
from lpc_lightning.cli.user_errors import USER_ERRORS


def _run_trainer(arguments: list[str]) -> None:
    PreferenceCLI(arguments)


def _call(function: str, arguments: list[str]) -> None:
    """Run `package.module:function`, which is imported now and not for other commands."""
    run_function(resolve_name(function), arguments[1:], arguments[0])


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        run: Function of the command line, the name of the command first.
        summary: Its result, in a few words.
        takes_groups: Whether its settings are in groups, each from a file or from flags.
    """

    run: Callable[[list[str]], None]
    summary: str
    takes_groups: bool = False


COMMANDS: dict[str, Command] = {
    **{name: Command(_run_trainer, summary, takes_groups=True) for name, summary in SUMMARIES.items()},
    "prepare": Command(
        partial(_call, "lpc_lightning.cli.prepare:prepare"),
        "models/SmolLM2-135M-Instruct without a model hub, or a file of built-in pairs",
    ),
    "configs": Command(
        partial(_call, "lpc_lightning.cli.ship_configs:configs"),
        "a folder with the config files that come with the package",
    ),
    "export": Command(
        partial(_call, "lpc_lightning.inference.export:export"),
        "a checkpoint as a folder that transformers opens, its latent included",
    ),
    "generate": Command(
        partial(_call, "lpc_lightning.inference.generate:generate"),
        "answers to prompts, under the prior and side by side under chosen codes",
    ),
    "alpaca": Command(
        partial(_call, "lpc_lightning.inference.alpaca:alpaca"),
        "answers to AlpacaEval's instructions, in the form that alpaca_eval judges",
    ),
}
ENTRY_POINTS = "lpc_lightning.commands"
"""Entry points for commands of other packages, with the signature of `Command.run`. Only their own run imports them."""


def commands() -> dict[str, Command]:
    """Return all commands by name, including those of other packages."""
    others = entry_points(group=ENTRY_POINTS)
    return COMMANDS | {each.name: Command(partial(_run_other, each), _about(each)) for each in others}


def _run_other(command: EntryPoint, arguments: list[str]) -> None:
    command.load()(arguments)


def _about(command: EntryPoint) -> str:
    """Return the first line of the module's docstring. The module is not imported, which may take seconds."""
    spec = find_spec(command.module)
    source = spec.loader.get_source(command.module) if spec and isinstance(spec.loader, InspectLoader) else None
    summary = (ast.get_docstring(ast.parse(source or "")) or "").partition("\n")[0].rstrip(".")
    return summary[:1].lower() + summary[1:]


def main(arguments: list[str] | None = None) -> None:
    """Run a command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        known = commands()
        if not arguments or arguments[0] not in known:
            _usage(arguments, known)
        set_up_logging()
        command = known[arguments[0]]
        check_config_arguments(arguments[1:], takes_groups=command.takes_groups)
        command.run(arguments)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        line = explain_system_error(error) or explain_lightning_error(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(1)
    except SIGTERMException:
        sys.exit(143)
    except KeyboardInterrupt:  # Lightning ends a fit and other passes over pairs itself
        print("Stopped.", file=sys.stderr)
        sys.exit(130)


def _usage(arguments: list[str], known: dict[str, Command]) -> None:
    is_help = bool(arguments) and arguments[0] in ("-h", "--help")
    lines = [fill(f"  {name:<10}{command.summary}", 80, subsequent_indent=" " * 12) for name, command in known.items()]
    text = "\n".join(
        ["usage: lpc-lightning COMMAND ...", "", *lines, "", "lpc-lightning COMMAND --help lists the settings."]
    )
    print(text, file=sys.stdout if is_help else sys.stderr)
    if arguments and not is_help:
        print(f"\nerror: found command {arguments[0]!r}, expected one of {', '.join(known)}.", file=sys.stderr)
    sys.exit(0 if is_help else 2)
