"""The folder of a cell: its record, its log, its results, and the checkpoint to resume from."""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from lpc_lightning.errors import ConfigError
from lpc_lightning.files.csv_files import write_csv
from lpc_lightning.files.json_files import write_json

CELLS, TUNING_CELLS = "cells", "tuning"
"""Folders of the cells of the result, and of those of the tuning."""
Status = Literal["running", "finished", "failed", "stopped"]
Weights = Literal["last", "best"]
"""Weights to validate and test: those of the last step, or those of `best.ckpt`."""
ERROR_LINES = 20
"""Number of log lines in the record of a failed cell."""


@dataclass(frozen=True)
class Record:
    """Content of `cell.json`."""

    axes: Mapping[str, Any]
    """The cell's value on each axis."""
    seed: Any
    """The cell's value on the axis `seed`, or null."""
    fingerprint: str
    """Fingerprint of arguments, files, code and packages; see `cell_fingerprint`."""
    arguments: tuple[str, ...]
    """Arguments of `lpc-lightning fit`."""
    places: tuple[str, ...]
    """Place of each argument in the grid; see `PlacedArgument`."""
    weights: Weights = "last"
    """Weights that are validated and tested."""
    tuned: Mapping[str, Any] = field(default_factory=dict)
    """The tuned axis with the value chosen for the cell. Empty: the cell's grid has no tuned axis."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Digest of each file and folder that the arguments name, by path; see `digests_in_arguments`."""
    code: str = ""
    """Hash of the project's code; see `code_version`. Empty: an earlier version has written the record."""
    status: Status = "running"
    """State of the cell. If it is `running` and no process runs, the cell was killed together with its command."""
    error: str | None = None
    """End of the log, if the cell did not finish."""
    diverged: bool = False
    """True if the cell failed because a loss was not a finite number."""
    attempts: int = 0
    """Number of times that the cell was started."""
    seconds: float = 0.0
    """Total time of all attempts, including the final validation and test."""
    peak_bytes: int = 0
    """Highest memory use of any attempt: of the process, or on a GPU, of the device."""
    started: float = field(default=0.0, metadata={"unit": "seconds since 1970"})
    """Start time of the last attempt."""


class CellFolder:
    """The folder `OUTPUT/cells/NAME` of a cell."""

    def __init__(self, path: Path) -> None:
        """Store the path. Nothing is written.

        Args:
            path: The folder.
        """
        self.path = path
        self.run, self.log = path / "run", path / "log.txt"
        self.results, self.lock = path / "results.json", path / "lock"
        self.earlier = path / "earlier"
        """What an attempt with another fingerprint replaces, until the attempt has made a step."""

    def pairs(self, stage: str) -> Path:
        """Return the file with the margins of the pairs of `validation` or `test`."""
        return self.path / f"pairs_{stage}.jsonl"

    def deviations(self, stage: str) -> Path:
        """Return the file with what each prompt adds to other metrics of `validation` or `test`."""
        return self.path / f"deviations_{stage}.jsonl"

    def record(self) -> Record | None:
        """Read the cell's record. None if the cell has never run.

        Raises:
            ConfigError: An earlier version has written it, without the places of the arguments.
        """
        try:
            content = json.loads((self.path / "cell.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        if "places" not in content:
            raise ConfigError(
                f"{self.path / 'cell.json'}: found no entry `places`, expected the place of each argument in the grid: "
                "an earlier version has written the cell. Remove its folder, or use another one (--output)."
            )
        lists = {name: tuple(content[name]) for name in ("arguments", "places")}
        return Record(**{**content, **lists})

    @property
    def is_tuning(self) -> bool:
        """True for a cell that only helps to choose the value of the tuned axis."""
        return self.path.parent.name == TUNING_CELLS

    @property
    def is_finished(self) -> bool:
        """True if there are results, of the current fingerprint or of an older one."""
        record = self.record()
        return record is not None and record.status == "finished" and self.results.exists()

    def write(self, record: Record) -> None:
        """Write a record."""
        write_json(self.path / "cell.json", asdict(record))

    def begin(self, new: Record) -> Record:
        """Record the start of an attempt, and return the record.

        If the cell's fingerprint has changed, the files of earlier attempts are put aside: results, and a checkpoint
        that an attempt could resume from. Without these, they are removed.
        """
        before = self.record()
        if before is None or before.fingerprint != new.fingerprint:
            is_kept = self.is_finished or (
                self.checkpoint() is not None and before is not None and before.status != "failed"
            )
            self._put_aside()
            if not is_kept:
                self.discard_earlier()
                self.log.unlink(missing_ok=True)
            before = new
        elif before.status == "running":
            before = self.mark_stopped(before)
        now = replace(
            before, status="running", error=None, diverged=False, attempts=before.attempts + 1, started=time.time()
        )
        self.path.mkdir(parents=True, exist_ok=True)
        self.write(now)
        return now

    def _put_aside(self) -> None:
        scores = [*self.path.glob("pairs_*.jsonl"), *self.path.glob("deviations_*.jsonl")]
        self.earlier.mkdir(parents=True, exist_ok=True)
        # The results come first, so that a cell with results has all of its files.
        for path in (self.results, *scores, self.run, *self._earlier_metrics(), self.path / "cell.json"):
            if path.exists():
                os.replace(path, self.earlier / path.name)

    def put_back(self) -> bool:
        """Put earlier files back, if an attempt that replaces them has ended without a step.

        Returns:
            True if files were put back.
        """
        if self.is_finished:
            self.discard_earlier()
        if not self.earlier.exists():
            return False
        for path in sorted(self.earlier.iterdir(), key=lambda path: path.name == self.results.name):
            target = self.path / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
        self.earlier.rmdir()
        return True

    def recover(self) -> None:
        """Do the same for an attempt that was killed. Nothing changes while a process runs the cell."""
        if self.earlier.exists():
            with suppress(Timeout), FileLock(self.lock, timeout=0):
                self.put_back()

    def discard_earlier(self) -> None:
        """Remove the files that were put aside."""
        if self.earlier.exists():
            # A kill during the removal must leave no part of them that would be put back.
            discarded = self.path / "discarded"
            shutil.rmtree(discarded, ignore_errors=True)
            os.replace(self.earlier, discarded)
            shutil.rmtree(discarded)

    def mark_stopped(self, record: Record, error: str | None = None) -> Record:
        """Return the record of an attempt whose process was killed.

        The end of the attempt is estimated by the last time that it wrote its log or its metrics.
        """
        last_writes = [path.stat().st_mtime for path in (self.log, self.run / "metrics.csv") if path.exists()]
        seconds = max([written - record.started for written in last_writes], default=0.0)
        return replace(record, status="stopped", error=error, seconds=record.seconds + max(0.0, seconds))

    def last_lines(self) -> str:
        """Return the end of the log."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return "\n".join(text.strip().splitlines()[-ERROR_LINES:])[-4000:]

    # Resuming a run

    def checkpoint(self) -> Path | None:
        """Return the newest checkpoint that a fit can resume from, or None."""
        checkpoints = [path for path in (self.run / "checkpoints").glob("*.ckpt") if path.stem in ("last", "stopped")]
        return max(checkpoints, key=lambda path: path.stat().st_mtime_ns, default=None)

    def remove_checkpoints(self) -> None:
        """Remove all checkpoints of the run."""
        shutil.rmtree(self.run / "checkpoints", ignore_errors=True)

    def prepare_fit(self, checkpoint: Path | None) -> None:
        """Prepare the run's folder for another fit. Without a checkpoint, the files of earlier fits are removed."""
        if checkpoint is None:
            shutil.rmtree(self.run, ignore_errors=True)
            for path in self._earlier_metrics():
                path.unlink()
            return
        # Lightning raises if the config exists, and deletes existing metrics.
        (self.run / "config.yaml").unlink(missing_ok=True)
        metrics = self.run / "metrics.csv"
        if metrics.exists():
            metrics.rename(self.path / f"metrics_before_{len(self._earlier_metrics())}.csv")

    def join_metrics(self) -> None:
        """Put the metrics of earlier attempts before those of the last one, as an uninterrupted run writes them.

        An attempt repeats the rows of those before it from its first row on. It also repeats the counts of the data.
        """
        metrics, earlier = self.run / "metrics.csv", self._earlier_metrics()
        rows: list[dict[str, str]] = []
        for path in [*earlier, *([metrics] if metrics.exists() else [])]:
            with path.open(newline="") as file:
                new = list(csv.DictReader(file))
            if rows:
                new = [row for row in new if not all(name.startswith("data/") for name in _measured(row))]
            if new:
                first = (new[0]["step"], _measured(new[0]))
                repeated = (index for index, row in enumerate(rows) if (row["step"], _measured(row)) == first)
                rows = rows[: next(repeated, None)]
            rows += new
        if earlier:
            columns = dict.fromkeys(sorted({name for row in rows for name in row}))
            write_csv(metrics, [columns | row for row in rows])
            for path in earlier:
                path.unlink()

    def _earlier_metrics(self) -> list[Path]:
        return sorted(
            self.path.glob("metrics_before_*.csv"), key=lambda path: int(path.stem.removeprefix("metrics_before_"))
        )


def _measured(row: Mapping[str, str]) -> frozenset[str]:
    """Return the names of the metrics that a row of `metrics.csv` has."""
    return frozenset(name for name, value in row.items() if value and name not in ("step", "epoch"))
