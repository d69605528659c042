"""Data of a run, made from the settings that the run has recorded, and compared with what the run has read."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from lpc_lightning.data import PreferenceDataModule, PreferenceMixture
from lpc_lightning.data.datamodule import Stage
from lpc_lightning.data.preference_data import StageRows
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.errors import ConfigError, one_line


def data_of_run(origin: Mapping[str, Any]) -> PreferenceDataModule:
    """Make the data of a run.

    Its class must belong to this package or to another one that has been imported. Settings may come with a model that
    was downloaded, and must not cause an import of other code. Relative paths are those of the working directory of the
    run if files are there, and else those of this process. So compare what is read with `recorded_rows`.

    Args:
        origin: Result of `checkpoint_origin`, or content of `training.json` of an exported folder.

    Raises:
        ConfigError: The settings are not those of data, or name another class.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PreferenceDataModule, "data")
    try:
        with _only_imported_packages():
            parsed = parser.parse_object({"data": origin.get("data")})
        data: PreferenceDataModule = parser.instantiate(parsed).data
    except (ArgumentError, ConfigError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ConfigError(f"found data settings that cannot be used ({one_line(error)})") from error
    folder = origin.get("data_folder")
    if isinstance(folder, str):
        for files in data_files(data):
            files.read_from(folder)
    return data


def data_files(data: PreferenceDataModule) -> list[StageRows]:
    """Return the files of a data module, those of each data set of a mixture. Empty for built-in pairs."""
    parts = list(data.sources.values()) if isinstance(data, PreferenceMixture) else [data]
    return [part for part in parts if isinstance(part, StageRows)]


def data_name(data: PreferenceDataModule, stage: Stage) -> str:
    """Return the files that a stage reads, or the class of data without files, for messages."""
    places = [files.place(stage) for files in data_files(data)]
    names = [name for place in places for name in ([place] if isinstance(place, str) else place)]
    return ", ".join(names) or type(data).__name__


def recorded_rows(origin: Mapping[str, Any], stage: Stage) -> dict[str, Any] | None:
    """Return the record of the pairs that a run has read (`DataReport.rows`). None if there is none.

    Args:
        origin: See `data_of_run`.
        stage: The stage.
    """
    rows = origin.get("data_rows")
    recorded = rows.get(stage) if isinstance(rows, Mapping) else None
    return recorded if isinstance(recorded, dict) else None


def read_rows(data: PreferenceDataModule, stage: Stage) -> dict[str, int | str]:
    """Read the pairs of a stage, and return their number and digest.

    Raises:
        DataError: The data cannot be read.
    """
    report = DataReport()
    if (source := data.source(stage)) is not None:
        for _ in source.read(report):
            pass
    return report.rows


def difference(found: Mapping[str, Any], recorded: Mapping[str, Any]) -> str:
    """Return what was found in place of the pairs of a run, and what was expected, for messages.

    Args:
        found: Number and digest of the pairs that were read now.
        recorded: Those of the run.
    """
    other = " other" if found["pairs"] == recorded.get("pairs") else ""
    return f"found {found['pairs']}{other} pairs, expected the {recorded.get('pairs')} pairs of the fit"


@contextmanager
def _only_imported_packages() -> Iterator[None]:
    """Refuse imports from other packages than those that have been imported.

    A check of the settings would not be enough. The parser also takes a plain string as the path of a class, or as the
    name of a file with further settings.
    """
    finder = _ImportedPackages()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _ImportedPackages(MetaPathFinder):
    """Finder that refuses a module without a package, and a package. Python asks it only for what is not imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Refuse the module, unless it is in a package that has been imported."""
        if "." not in fullname:
            raise ImportError(f"{fullname} has not been imported, and the settings of a run cannot import code")
        return None
