"""The loggers of a run, built from `trainer.logger`, and the settings that they receive."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, TensorBoardLogger

from lpc_lightning.errors import ConfigError

Arguments = dict[str, Any]


def build_logger(folder: Path, logger: type[Logger], **arguments: Any) -> Logger:
    """Build a logger for a run.

    Args:
        folder: Folder of the run.
        logger: Class of the logger.
        **arguments: Its settings.

    Raises:
        ConfigError: The logger's package is not installed.
    """
    prepare = next((PREPARE[base] for base in logger.__mro__ if base in PREPARE), None)
    try:
        return logger(**(arguments if prepare is None else prepare(folder, arguments)))
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"trainer.logger: found {logger.__name__}, whose package is not installed ({error}). `pip install -c "
            "constraints.txt -e '.[loggers]'`, or take a logger of configs/logger/ that needs no package: csv.yaml, "
            "tensorboard.yaml."
        ) from error


def run_loggers(folder: Path, loggers: Logger | Iterable[Logger] | bool | None) -> list[Logger]:
    """Return the loggers of a run: `metrics.csv` in its folder, then the given ones, or TensorBoard's events.

    Args:
        folder: Folder of the run.
        loggers: Value of `trainer.logger`. None and True, and False where a logger is needed, are the default.
    """
    if isinstance(loggers, bool) or loggers is None:
        loggers = build_logger(folder, TensorBoardLogger)
    given = [loggers] if isinstance(loggers, Logger) else list(loggers)
    # The first logger's folder is the folder of the run for Lightning. Row by row: a killed run leaves those before.
    first: list[Logger] = [each for each in given if isinstance(each, CSVLogger) and Path(each.log_dir) == folder]
    rows = first or [build_logger(folder, CSVLogger, flush_logs_every_n_steps=1)]
    return [*rows, *(each for each in given if each not in first)]


def _in_run_folder(folder: Path, arguments: Arguments) -> Arguments:
    """Write to the run folder, unless a version is set."""
    if arguments.get("version") is not None:
        return arguments
    return arguments | {"save_dir": str(folder.parent), "name": "", "version": folder.name}


def _into_archive(folder: Path, arguments: Arguments) -> Arguments:
    """Write an archive beside the run folder if `online` is false. Lightning itself would record nothing then."""
    if arguments.get("online") is not False:
        return arguments
    # Without a network its reports of errors end in warnings.
    os.environ |= {"COMET_START_ONLINE": "false", "COMET_ERROR_TRACKING_ENABLE": "false"}
    arguments = {"offline_directory": str(folder.parent / "comet")} | arguments | {"online": None}
    Path(arguments["offline_directory"]).mkdir(parents=True, exist_ok=True)
    return arguments


PREPARE: dict[type[Logger], Callable[[Path, Arguments], Arguments]] = {
    CSVLogger: _in_run_folder,
    TensorBoardLogger: _in_run_folder,
    CometLogger: _into_archive,
}
"""What changes in the settings of a class of loggers, subclasses included."""


class SaveSettings(SaveConfigCallback):
    """Callback that writes `config.yaml` and sends the settings to all loggers.

    Lightning sends those of the algorithm, the policy and the latent. This adds the rest and the run folder.
    """

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Send the settings as hyperparameters."""
        if not trainer.loggers:
            return
        stated = {name: value for name, value in self.config.as_dict().items() if name in LOGGED}
        # Only the first process is here: `trainer.log_dir` is a collective call.
        settings = _plain({"run_folder": trainer.loggers[0].log_dir, **stated})
        settings["trainer"].pop("logger")
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)


def _plain(value: Any) -> Any:
    """Return settings as JSON has them, without the paths of the files that they are from."""
    return json.loads(
        json.dumps(value, default=str),
        object_hook=lambda found: {name: each for name, each in found.items() if name != "__path__"},
    )


LOGGED = ("seed_everything", "data", "trainer")
"""Settings that the module does not contain."""
