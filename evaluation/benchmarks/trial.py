"""Errors that are reported and do not end a run."""

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
    """A block that may fail. Afterwards `failure` is None, or says why; what is no `Exception` (Ctrl-C) goes through.

    Under torch.distributed all processes have to enter it, and it fails on all of them where it fails on any.
    """

    def __init__(self) -> None:
        """Nothing has failed yet."""
        self.failure: str | None = None

    def __enter__(self) -> Trial:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Keep an exception's reason, and hear of the other processes."""
        if error is not None and not isinstance(error, Exception):
            return False
        if error is not None:
            log.debug("Goes on after an error.", exc_info=error)
            self.failure = reason(error)
        if distributed.is_available() and distributed.is_initialized():
            failures: list[str | None] = [None] * distributed.get_world_size()
            distributed.all_gather_object(failures, self.failure)
            self.failure = next((failure for failure in failures if failure), None)
        return True


def reason(error: BaseException) -> str:
    """What went wrong: our own sentence, or an error with its causes, first lines only, and the line that raised."""
    if isinstance(error, ConfigError | DataUnreachableError):
        return str(error)
    said = []
    cause: BaseException | None = error
    while cause is not None:
        first = str(cause).strip().partition("\n")[0]
        said.append(f"{type(cause).__name__}: {first}" if first else type(cause).__name__)
        cause = cause.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return ", caused by ".join(said) + place
