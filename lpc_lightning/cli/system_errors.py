"""Errors of the operating system that a user can solve: no space, no permission, no memory, too many open files."""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch

SPACE = "Free some space, or write to another disk (--output, --trainer.default_root_dir, --data.cache_dir)."
PERMISSION = "Give a path that you may write to (--output, --trainer.default_root_dir, --data.cache_dir)."
FILES = "Raise the limit (`ulimit -n 4096`), or use fewer processes (--data.num_workers 0)."
MEMORY = (
    "Use smaller batches (--data.batch_size, --data.row_tokens, --batch_size), fewer processes, a smaller model, "
    "or a machine with more memory."
)
PLACE = "Give another path."
THREADS = (
    "Use fewer processes and threads (--data.num_workers 0, OMP_NUM_THREADS=1), raise their limit (`ulimit -u`), or "
    "use a machine with more memory."
)
ADVICE = {
    errno.ENOSPC: SPACE,
    errno.EDQUOT: SPACE,
    errno.EFBIG: SPACE,
    errno.EROFS: PERMISSION,
    errno.EACCES: PERMISSION,
    errno.EPERM: PERMISSION,
    errno.EMFILE: FILES,
    errno.ENFILE: FILES,
    errno.ENOMEM: MEMORY,
    errno.EAGAIN: THREADS,
    errno.EIO: "The disk or its connection fails. Give a path on another disk.",
    errno.ENOTDIR: PLACE,
    errno.EISDIR: PLACE,
    errno.EEXIST: PLACE,
    errno.ENAMETOOLONG: PLACE,
}
"""What to do, by error number."""
PHRASES = {"can't start new thread": errno.EAGAIN, "PytorchStreamWriter failed writing file": errno.ENOSPC}
"""Messages of libraries that state no error number."""


def explain_system_error(error: BaseException) -> str | None:
    """Return one line with the fault, its file and what to do. None if the error is of another kind.

    Libraries raise such errors as other classes (`RuntimeError`, `SafetensorError`), or from a data loader's process
    with its traceback as the text. These are recognized by their text.
    """
    number = _number(error)
    if number is None:
        return None
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)  # a copy has two
    file = named or _file_being_written(error.__traceback__)
    text = os.strerror(number) if isinstance(error, OSError) else _last_line(error) or os.strerror(number)
    return f"{f'{file}: ' if file else ''}{text.rstrip('.')}. {ADVICE[number]}"


def _number(error: BaseException) -> int | None:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in ADVICE else None
    text = str(error)
    if stated := re.search(r"(?:Errno|os error|Error code) (\d+)", text):
        return int(stated[1]) if int(stated[1]) in ADVICE else None
    phrases = PHRASES | {os.strerror(number): number for number in ADVICE if number != errno.EEXIST}
    return next((number for phrase, number in phrases.items() if phrase in text), None)


def _file_being_written(traceback: TracebackType | None) -> str | None:
    """Return the innermost open file or path. The system does not name the file of a failed write."""
    for frame in reversed([*_frames(traceback)]):
        values = [*frame.values()]
        names = [getattr(value, "name", None) for value in values if isinstance(value, io.IOBase)]
        names += [str(value) for value in values if isinstance(value, Path)]
        if name := next((name for name in names if isinstance(name, str)), None):
            return name
    return None


def _frames(traceback: TracebackType | None) -> Iterator[dict[str, object]]:
    while traceback is not None:
        yield traceback.tb_frame.f_locals
        traceback = traceback.tb_next


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else ""
