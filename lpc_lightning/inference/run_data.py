"""Data of a run, made from the settings that the run has recorded."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.errors import ConfigError, one_line


def data_of_run(settings: Any) -> PreferenceDataModule:
    """Make the data of a run.

    Its class must belong to this package or to another one that has been imported. Settings may come with a model that
    was downloaded, and must not cause an import of other code.

    Args:
        settings: The entry `data` of the run's `config.yaml`.

    Raises:
        ConfigError: The settings are not those of data, or name another class.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PreferenceDataModule, "data")
    try:
        with _only_imported_packages():
            parsed = parser.parse_object({"data": settings})
        data: PreferenceDataModule = parser.instantiate(parsed).data
    except (ArgumentError, ConfigError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ConfigError(f"found data settings that cannot be used ({one_line(error)})") from error
    return data


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
