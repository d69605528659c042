"""Errors that are recorded and do not end a run."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from types import TracebackType

from torch import distributed

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.benchmarks.tasks import DataUnreachableError

log = logging.getLogger(__name__)


class Trial:
    """A block that may fail. After the block, `failure` is None or the reason.

    Exceptions that are not an `Exception`, such as Ctrl-C, are raised.

    Under torch.distributed, all processes must enter the block. It fails on all processes if it fails on one.
    """

    def __init__(self) -> None:
        """Create a trial without a failure."""
        self.failure: str | None = None

    def __enter__(self) -> Trial:
        """Start the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Store the reason of an exception, and collect the failures of the other processes."""
        if error is not None and not isinstance(error, Exception):
            return False
        if error is not None:
            log.debug("Continuing after an error.", exc_info=error)
            self.failure = failure_reason(error)
        if distributed.is_available() and distributed.is_initialized():
            failures: list[str | None] = [None] * distributed.get_world_size()
            distributed.all_gather_object(failures, self.failure)
            self.failure = next((failure for failure in failures if failure), None)
        return True


def failure_reason(error: BaseException) -> str:
    """Return the reason of an error in one line.

    The project's own errors are complete sentences. For other errors, the reason has the first line of the error and of
    each of its causes, and the line of code that raised it.
    """
    if isinstance(error, ConfigError | DataUnreachableError):
        return str(error)
    parts = []
    cause: BaseException | None = error
    while cause is not None:
        first_line = str(cause).strip().partition("\n")[0]
        parts.append(f"{type(cause).__name__}: {first_line}" if first_line else type(cause).__name__)
        cause = cause.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    location = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return ", caused by ".join(parts) + location
