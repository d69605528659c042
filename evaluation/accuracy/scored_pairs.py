"""Preference accuracy on a file of pairs, as one more task beside the benchmarks."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.algorithms.metrics import accuracies
from lpc_lightning.data import DataError, PreferenceDataModule
from lpc_lightning.data.datamodule import Stage
from lpc_lightning.data.sources.example_source import ExampleSource, RowSource
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.rows import read_rows
from lpc_lightning.evaluation.accuracy.preferences import LIKELIHOOD, preference_accuracy
from lpc_lightning.evaluation.benchmarks.results import BenchmarkResults, plain, stderr_name
from lpc_lightning.evaluation.provenance import provenance
from lpc_lightning.inference.opening import OpenedPolicy
from lpc_lightning.paths import expand_path
from lpc_lightning.types import PreferenceExample

TASK = "preferences"
"""The task's name in results and tables."""
WHOLE = re.compile("swap_turnover|(accuracy|margin)/[^/]+")
"""Metrics of all pairs; others are of a group, such as `accuracy/prior/source/books`, or counts."""


class PairsFile(PreferenceDataModule):
    """The pairs of one file, for scoring alone."""

    def __init__(self, path: str, split: str | None = None, limit: int | None = None, **data: Any) -> None:
        """Say which pairs.

        Args:
            path: A file in any form that `read_rows` knows. Environment variables are replaced.
            split: Rows whose column `split` says this. None: `test` where the file has such a column, else all rows.
            limit: Pairs, from the start. None: all of them.
            data: Settings of `PreferenceDataModule`.

        Raises:
            DataError: There is no such file, or nothing in it.
        """
        super().__init__(**data)
        path = expand_path(path, "preferences")
        if not Path(path).is_file():
            raise DataError(f"preferences: found no file {path}, expected preference pairs such as pairs.jsonl.")
        first = next(row for _, row in read_rows(path, on_bad=lambda place, fault: None))
        self.split = "test" if split is None and "split" in first else split
        self.limit = limit
        self._pairs = First(RowSource(path, split=self.split), limit)

    @property
    def content(self) -> str:
        """A text that changes whenever other pairs would be scored."""
        return hashlib.sha256(self._pairs.key().encode()).hexdigest()[:16]

    def source(self, stage: Stage) -> ExampleSource | None:
        """The pairs, as test data."""
        return self._pairs if stage == "test" else None


@dataclass(frozen=True)
class First:
    """The first examples of a source."""

    source: ExampleSource
    count: int | None
    """None: all of them."""

    def key(self) -> str:
        """See `ExampleSource.key`."""
        return f"{self.source.key()} first {self.count}"

    def read(self, report: DataReport) -> Iterator[PreferenceExample]:
        """See `ExampleSource.read`. Rows behind the last one are not read, and so not counted."""
        return islice(self.source.read(report), self.count)


def score_pairs(model: PreferenceModule | OpenedPolicy, pairs: PairsFile, precision: str | None) -> BenchmarkResults:
    """Preference accuracy in the form of a benchmark's results: task `preferences`, metrics `accuracy/MODE`.

    Args:
        model: A checkpoint's module, or any other policy: see `preference_accuracy`.
        pairs: What to score.
        precision: Of the computation, as `trainer.precision`. None: the weights' own type.

    Raises:
        DataError: There are no pairs, or there is something wrong with them.
    """
    started = time.perf_counter()
    found, content = preference_accuracy(model, pairs, precision=precision), pairs.content
    metrics: dict[str, float] = {}
    groups: dict[str, float] = {}
    for name, value in sorted(found.metrics.items(), key=_headline_first):
        home = metrics if WHOLE.fullmatch(name) else groups
        home[name] = value
        if name in found.standard_errors:
            home[stderr_name(name)] = found.standard_errors[name]
    record = {
        "version": content,
        "limit": pairs.limit,
        "items": found.pairs,
        "split": pairs.split,
        "reward": found.reward,
        "reward_kind": "likelihood" if found.reward == LIKELIHOOD else "implicit",
        "groups": groups,
        "dropped": found.dropped,
        "bad": found.bad,
        "cut": found.cut,
        "seconds": round(time.perf_counter() - started, 3),
    }
    items = [_item(row, content) for row in found.items]
    whole = {"tasks": {TASK: record}, "settings": {"tasks": [TASK]}, "seconds": record["seconds"], **provenance()}
    return BenchmarkResults({TASK: metrics}, items, {}, plain(whole))


def _headline_first(metric: tuple[str, float]) -> tuple[bool, bool]:
    """Accuracies before margins, and the prior before the other modes."""
    name, _ = metric
    return not name.startswith("accuracy/"), not name.startswith(("accuracy/prior", "margin/prior"))


def _item(row: dict[str, Any], content: str) -> dict[str, Any]:
    margins: dict[str, float] = row["margins"]
    right = {f"accuracy/{mode}": float(accuracies(torch.tensor(margin))) for mode, margin in margins.items()}
    labels = {name: value for name, value in row.items() if name not in ("id", "margins")}
    return {"task": TASK, "doc_id": row["id"], "doc_hash": content, "metrics": right, "response": margins, **labels}
