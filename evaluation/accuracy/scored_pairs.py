"""Preference accuracy on a file of pairs, as a task in the form of the benchmarks."""

from __future__ import annotations

import glob
import hashlib
import math
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
from lpc_lightning.data import Columns, DataError, PreferenceDataModule
from lpc_lightning.data.datamodule import Stage
from lpc_lightning.data.sources.example_source import ExampleSource, RowSource
from lpc_lightning.data.sources.locations import open_location
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.splits import split_names
from lpc_lightning.evaluation.accuracy.preferences import LIKELIHOOD, preference_accuracy
from lpc_lightning.evaluation.benchmarks.results import BenchmarkResults, stderr_name, to_json_value
from lpc_lightning.evaluation.provenance import provenance
from lpc_lightning.inference.opening import OpenedPolicy
from lpc_lightning.paths import expand_path
from lpc_lightning.types import PreferenceExample

TASK = "preferences"
"""Name of the task in results and tables."""
ALL_PAIRS_METRIC = re.compile(
    "swap_turnover|(gold_)?longer_is_chosen|((gold_)?(accuracy|log_loss|calibration_error)|margin|wrong_label_auroc)/[^/]+"
)
"""Pattern of metrics over all pairs. The others are counts or metrics of a group: `accuracy/prior/source/books`."""


class PairsFile(PreferenceDataModule):
    """The pairs of one file, for scoring only."""

    def __init__(
        self,
        path: str,
        split: str | None = None,
        limit: int | float | None = None,
        columns: Columns | None = None,
        split_column: str = "split",
        **data: Any,
    ) -> None:
        """Select pairs of a file.

        Args:
            path: A file, a folder or a pattern of files in any format that `read_rows` can read. Environment variables
                are replaced.
            split: Split of the selected rows. None: `test` if the path has splits, or if any row has a value in the
                split column; else all rows.
            limit: Maximum number of pairs, taken from the start; below 1: a share of them, rounded up. None: all pairs.
            columns: Names of the columns, and how their cells are read. None: the defaults of `Columns`.
            split_column: Column that holds the split of each row.
            data: Settings of `PreferenceDataModule`.

        Raises:
            DataError: The file does not exist.
        """
        super().__init__(**data)
        path = expand_path(path, "preferences")
        if not Path(path).expanduser().exists() and not glob.has_magic(path):
            raise DataError(f"preferences: found no file {path}, expected preference pairs such as pairs.jsonl.")
        self.split = "test" if split is None and split_names(open_location(path), split_column) else split
        self.limit = limit
        source = RowSource(path, columns=columns or Columns(), split=self.split, split_column=split_column)
        self._pairs = FirstExamples(source, limit)

    @property
    def content(self) -> str:
        """A hash that changes if the selected pairs change."""
        return hashlib.sha256(f"{self._pairs.key()} {self.bad_rows}".encode()).hexdigest()[:16]

    def source(self, stage: Stage) -> ExampleSource | None:
        """Return the pairs for the stage `test`, None for other stages."""
        return self._pairs if stage == "test" else None


@dataclass(frozen=True)
class FirstExamples:
    """The first examples of a source."""

    source: ExampleSource
    count: int | float | None
    """Number of examples; below 1: a share of them, rounded up. None: all of them."""

    def key(self) -> str:
        """Return a key of the examples; see `ExampleSource.key`."""
        return f"{self.source.key()} first {self.count}"

    def read(self, report: DataReport) -> Iterator[PreferenceExample]:
        """Yield the examples; see `ExampleSource.read`. Rows after the last one are neither read nor counted."""
        count = self.count
        if count is not None and count < 1:
            count = math.ceil(count * sum(1 for _ in self.source.read(DataReport())))
        return islice(self.source.read(report), None if count is None else int(count))


def score_pairs(model: PreferenceModule | OpenedPolicy, pairs: PairsFile, precision: str | None) -> BenchmarkResults:
    """Compute preference accuracy as a benchmark's results: task `preferences`, metrics `accuracy/MODE`.

    Args:
        model: A checkpoint's module, or any other policy; see `preference_accuracy`.
        pairs: The pairs to score.
        precision: Precision of the computation, as in `trainer.precision`. None: the data type of the weights.

    Raises:
        DataError: There are no pairs, or the data is invalid.
    """
    started = time.perf_counter()
    scored, content = preference_accuracy(model, pairs, precision=precision), pairs.content
    metrics: dict[str, float] = {}
    groups: dict[str, float] = {}
    for name, value in sorted(scored.metrics.items(), key=_headline_first):
        destination = metrics if ALL_PAIRS_METRIC.fullmatch(name) else groups
        destination[name] = value
        if name in scored.standard_errors:
            destination[stderr_name(name)] = scored.standard_errors[name]
    record = {
        "version": content,
        "limit": pairs.limit,
        "items": scored.pairs,
        "split": pairs.split,
        "reward": scored.reward,
        "reward_kind": "likelihood" if scored.reward == LIKELIHOOD else "implicit",
        "groups": groups,
        "dropped": scored.dropped,
        "bad": scored.bad,
        "cut": scored.cut,
        "seconds": round(time.perf_counter() - started, 3),
    }
    items = [_item(row, content) for row in scored.items]
    run_record = {"tasks": {TASK: record}, "settings": {"tasks": [TASK]}, "seconds": record["seconds"], **provenance()}
    return BenchmarkResults({TASK: metrics}, items, {}, to_json_value(run_record))


def _headline_first(metric: tuple[str, float]) -> tuple[bool, bool]:
    """Return a sort key: accuracies before margins, and the prior before the other modes."""
    name, _ = metric
    return not name.startswith("accuracy/"), not name.startswith(("accuracy/prior", "margin/prior"))


def _item(row: dict[str, Any], content: str) -> dict[str, Any]:
    margins: dict[str, float] = row["margins"]
    correct = {f"accuracy/{mode}": float(accuracies(torch.tensor(margin))) for mode, margin in margins.items()}
    labels = {name: value for name, value in row.items() if name not in ("id", "margins")}
    # Ids may repeat across annotators.
    version = f"{content} {row['annotator']}".rstrip()
    return {"task": TASK, "doc_id": row["id"], "doc_hash": version, "metrics": correct, "response": margins, **labels}
