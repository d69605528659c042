"""The folder of a run, which no other run writes to."""

from __future__ import annotations

from contextlib import suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning.pytorch.utilities import rank_zero_only


class RunFolder:
    """A folder `version_N` in a root. It is made when the run starts, so that runs that start together do not meet."""

    def __init__(self, root: Path) -> None:
        """Make the first `version_N` that does not exist.

        Only the first process of a run makes it. The others get its path from the first one, through Lightning.

        Args:
            root: Folder of all runs.
        """
        self.path = root / "version_0"
        self._is_first = rank_zero_only.rank == 0  # type: ignore[attr-defined]  # set by Lightning when it is imported
        if self._is_first:
            root.mkdir(parents=True, exist_ok=True)
            self.path = next(path for number in count() if _make(path := root / f"version_{number}"))

    def release(self) -> None:
        """Remove the folder if the run has written nothing."""
        if self._is_first:
            with suppress(OSError):
                self.path.rmdir()


class DiscardedRunFolder(RunFolder):
    """A temporary folder, for a run that is to leave nothing."""

    def __init__(self) -> None:
        """Make the folder."""
        self._temporary = TemporaryDirectory(prefix="lpc-lightning-", ignore_cleanup_errors=True)
        self.path = Path(self._temporary.name)

    def release(self) -> None:
        """Remove the folder and its files."""
        self._temporary.cleanup()


def _make(path: Path) -> bool:
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True
