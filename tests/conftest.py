"""What every process that runs tests has: environment, order of the tests, and fixtures."""

from __future__ import annotations

import gc
import os

import pytest

# For the programs that tests start. Their tensors are tiny: a second thread costs more time than it saves, as do
# processes that compile.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

FIXTURES = ("policies", "emulated_device", "training_runs")
"""Modules in fixtures/, besides `fork_server`."""


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Import torch and the package, with the server that is forked from this process.

    No hook is called earlier: the conftest.py of a folder may import a part of the package. A process that distributes
    tests to others needs neither.
    """
    options = pluginmanager.getplugin("pytestconfig").known_args_namespace
    if not getattr(options, "numprocesses", None) or "PYTEST_XDIST_WORKER" in os.environ:
        pluginmanager.import_plugin("tests.fixtures.fork_server")


def pytest_configure(config: pytest.Config) -> None:
    """Import the other fixtures, after the server has been forked."""
    if config.pluginmanager.hasplugin("tests.fixtures.fork_server"):
        for name in FIXTURES:
            config.pluginmanager.import_plugin(f"tests.fixtures.{name}")


def pytest_collection() -> None:
    """Collect tests without the garbage collector. It would search all tests and modules several times."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave what collection made out of later searches, which are rare, because the tensors of tests are small."""
    gc.freeze()
    gc.set_threshold(20_000)  # allocations between two of them
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of several processes first: a worker that takes over late tests then does not repeat their runs."""
    items.sort(key=lambda item: item.get_closest_marker("distributed") is None)
