"""A cell's folder: what ran there, how it ended, and where it can be taken up."""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

Status = Literal["running", "finished", "failed", "stopped"]
Weights = Literal["last", "best"]
"""Those that are validated and tested: of the last step, or of `best.ckpt`."""
LINES = 20
"""Of the log, in the record of a cell that failed."""


@dataclass(frozen=True)
class Record:
    """`cell.json`."""

    axes: Mapping[str, Any]
    """The cell's value on each axis."""
    seed: Any
    """Its value on the axis `seed`, or null."""
    fingerprint: str
    """Of arguments, files and code; see `fingerprint`."""
    arguments: tuple[str, ...]
    """Of `lpc-lightning fit`."""
    status: Status = "running"
    """`running` where nothing runs is a cell that was killed together with the command."""
    error: str | None = None
    """The end of its log, where it did not finish."""
    attempts: int = 0
    seconds: float = 0.0
    """Over all attempts, final validation and test included."""
    peak_bytes: int = 0
    """Most memory in any attempt: of the process, or on a GPU of the device."""
    started: float = field(default=0.0, metadata={"unit": "seconds since 1970"})
    """When the last attempt began."""


class CellFolder:
    """`OUT/cells/NAME`."""

    def __init__(self, path: Path) -> None:
        """Nothing is written yet.

        Args:
            path: The folder.
        """
        self.path = path
        self.run, self.log = path / "run", path / "log.txt"
        self.results = path / "results.json"

    def record(self) -> Record | None:
        """What is known of the cell; None where it has never run."""
        try:
            told = json.loads((self.path / "cell.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return Record(**{**told, "arguments": tuple(told["arguments"])})

    @property
    def is_finished(self) -> bool:
        """Whether there are results, be they of the settings of now or of others."""
        found = self.record()
        return found is not None and found.status == "finished" and self.results.exists()

    def write(self, record: Record) -> None:
        """Keep a record."""
        write_json(self.path / "cell.json", asdict(record))

    def begin(self, wanted: Record) -> Record:
        """Note that an attempt begins; what an earlier version of the cell has left is removed."""
        before = self.record()
        if before is None or before.fingerprint != wanted.fingerprint:
            shutil.rmtree(self.run, ignore_errors=True)
            for path in (self.results, self.log, *self._earlier()):
                path.unlink(missing_ok=True)
            before = wanted
        elif before.status == "running":
            before = self.given_up(before)
        now = replace(before, status="running", error=None, attempts=before.attempts + 1, started=time.time())
        self.path.mkdir(parents=True, exist_ok=True)
        self.write(now)
        return now

    def given_up(self, record: Record, error: str | None = None) -> Record:
        """The record of an attempt whose process is gone: its time is known by the last sign of life."""
        signs = [path.stat().st_mtime for path in (self.log, self.run / "metrics.csv") if path.exists()]
        seconds = max([sign - record.started for sign in signs], default=0.0)
        return replace(record, status="stopped", error=error, seconds=record.seconds + max(0.0, seconds))

    def last_lines(self) -> str:
        """The end of the log."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return "\n".join(text.strip().splitlines()[-LINES:])[-4000:]

    # Taking up a run

    def checkpoint(self) -> Path | None:
        """The newest checkpoint that a fit can go on from."""
        found = [path for path in (self.run / "checkpoints").glob("*.ckpt") if path.stem in ("last", "stopped")]
        return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)

    def make_way(self, checkpoint: Path | None) -> None:
        """Have a fit write into the run's folder again; without a checkpoint, from nothing."""
        if checkpoint is None:
            shutil.rmtree(self.run, ignore_errors=True)
            for path in self._earlier():
                path.unlink()
            return
        # Lightning refuses to write a second config and deletes the metrics it finds.
        (self.run / "config.yaml").unlink(missing_ok=True)
        metrics = self.run / "metrics.csv"
        if metrics.exists():
            metrics.rename(self.path / f"metrics_before_{len(self._earlier())}.csv")

    def join_metrics(self) -> None:
        """Put the metrics of earlier attempts in front of the last one's, up to the step where it took over."""
        metrics, earlier = self.run / "metrics.csv", self._earlier()
        rows: list[dict[str, str]] = []
        for path in [*earlier, *([metrics] if metrics.exists() else [])]:
            with path.open(newline="") as file:
                new = list(csv.DictReader(file))
            # Each attempt tells at step 0 what became of the data; where it took over, its first training step tells.
            trained = [int(row["step"]) for row in new if any(row[name] for name in row if name.startswith("train/"))]
            if rows and trained:
                rows = [row for row in rows if int(row["step"]) < min(trained)]
                new = [row for row in new if int(row["step"]) >= min(trained)]
            rows += new
        if earlier:
            columns = list(dict.fromkeys(name for row in rows for name in row))
            partial = metrics.with_suffix(".partial")
            with partial.open("w", newline="") as file:
                writer = csv.DictWriter(file, columns, restval="")
                writer.writeheader()
                writer.writerows(rows)
            os.replace(partial, metrics)
            for path in earlier:
                path.unlink()

    def _earlier(self) -> list[Path]:
        return sorted(self.path.glob("metrics_before_*.csv"))


def write_json(path: Path, value: Any) -> None:
    """Write beside the place and rename, so that a file is whole or not there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
