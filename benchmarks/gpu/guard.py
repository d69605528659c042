"""Runs one part of the benchmark so that its failure loses nothing else."""

from __future__ import annotations

import contextlib
import gc
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

ROOT = Path(__file__).parents[2]
OUT_OF_TIME = "stopped: out of time"


class OutOfTimeError(BaseException):
    """Raised in the running part when its time limit is over. Libraries that catch `Exception` let it through."""


def attempt(run: Callable[[], dict[str, Any]], limit: float, log: TextIO) -> dict[str, Any]:
    """Run a part and return its values, with `status` and `seconds` beside them.

    Args:
        run: Returns the values.
        limit: Seconds after which the part is stopped wherever it is.
        log: Receives what the part prints, and the traceback of a failure.

    Returns:
        The values with status `ok`; or `status` alone with the reason: the error's last line and its place.
    """
    start = time.perf_counter()
    values: dict[str, Any] = {}
    status = OUT_OF_TIME
    with _alarm(limit), contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            values = run()
            status = "ok"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit of a command included
            status = describe(error)
            log.write("".join(traceback.format_exception(error)))
            _clear_frames(error)
    log.flush()
    free_memory()
    return {"status": status, "seconds": time.perf_counter() - start, **values}


def describe(error: BaseException) -> str:
    """Return the error's last line and where it was raised: the innermost line of this project, and the innermost."""
    if isinstance(error, OutOfTimeError):
        return OUT_OF_TIME
    last = traceback.format_exception_only(error)[-1].strip().splitlines()[0][:300]
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _is_ours(frame.filename)]
    places = dict.fromkeys(f"{_short(frame.filename)}:{frame.lineno}" for frame in [*ours[-1:], *frames[-1:]])
    return f"error: {last} ({' > '.join(places)})"


def _clear_frames(error: BaseException) -> None:
    """Empty the frames of an error and of those behind it, which hold models and batches."""
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__


def free_memory() -> None:
    """Release models, compiled code and CUDA's cached memory of the part before."""
    gc.collect()
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # a broken context: the next part reports it
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _is_ours(file: str) -> bool:
    path = Path(file)
    return path.is_relative_to(ROOT) and "site-packages" not in path.parts


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(ROOT)) if _is_ours(file) else "/".join(path.parts[-3:])


@contextlib.contextmanager
def _alarm(limit: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(limit, 0.1))
    try:
        yield
    except OutOfTimeError:  # between two statements of `attempt`
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
