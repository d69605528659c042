"""Preference accuracy on a file of pairs, as a task in the form of the benchmarks."""

from __future__ import annotations

import glob
import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.algorithms.metrics import accuracies
from lpc_lightning.data import Columns, DataError, PreferenceDataModule
from lpc_lightning.data.datamodule import Stage
from lpc_lightning.data.sources.example_source import ExampleSource, RowSource
from lpc_lightning.data.sources.locations import open_location
from lpc_lightning.data.sources.splits import split_names
from lpc_lightning.data.tokenization.chat_template import ChatTemplate
from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.accuracy.preferences import LIKELIHOOD, preference_accuracy
from lpc_lightning.evaluation.accuracy.reward_benchmarks import PairForm, Scores, find_form
from lpc_lightning.evaluation.accuracy.training_overlap import KEY, count_trained, overlaps
from lpc_lightning.evaluation.benchmarks.results import BenchmarkResults, stderr_name, to_json_value
from lpc_lightning.evaluation.provenance import provenance, short_hash
from lpc_lightning.files.path_variables import expand_path
from lpc_lightning.inference.opening import OpenedPolicy

TASK = "preferences"
"""Name of the task in results and tables."""
DEFAULTS: dict[str, Any] = {"split": None, "columns": Columns(), "bad_rows": "error", "limit": None, "max_length": 1024}
"""Defaults of the settings of a file of pairs in commands."""
ONE_PROMPT = "all pairs have one prompt. Standard errors and tests are over prompts, so that there are none."
ALL_PAIRS_METRIC = re.compile(
    "swap_turnover|(gold_)?longer_is_chosen|((gold_)?(accuracy|log_loss|calibration_error)|margin|wrong_label_auroc)/[^/]+"
    "|accuracy/prior/(summed|per_token)"
)
"""Pattern of metrics over all pairs. The others are counts or metrics of a group, `accuracy/prior/source/books`, or
accuracies of other modes without and with length normalization, `accuracy/marginal/per_token`."""


class PairsFile(PreferenceDataModule):
    """The pairs of one file, for scoring only."""

    def __init__(
        self,
        path: str,
        split: str | None = None,
        limit: int | float | None = None,
        columns: Columns | None = None,
        split_column: str = "split",
        task: str = TASK,
        **data: Any,
    ) -> None:
        """Select pairs of a file.

        Args:
            path: A file, a folder or a pattern of files in any format that `read_rows` can read. Environment variables
                are replaced.
            split: Split of the selected rows. None: `test` if the path has splits, or if any row has a value in the
                split column; else all rows.
            limit: Maximum number of pairs, taken from the start; below 1: a share of them, rounded up. Rows in place of
                pairs if a row holds several. None: all pairs.
            columns: Names of the columns, and how their cells are read. None: the defaults of `Columns`.
            split_column: Column that holds the split of each row.
            task: Name of the file in results.
            data: Settings of `PreferenceDataModule`.

        Raises:
            DataError: The file does not exist.
        """
        super().__init__(**data)
        path = expand_path(path, "preferences")
        if not Path(path).expanduser().exists() and not glob.has_magic(path):
            raise DataError(f"preferences: found no file {path}, expected preference pairs such as pairs.jsonl.")
        self.split = "test" if split is None and split_names(open_location(path), split_column) else split
        self.limit, self.task = limit, task
        self.form = find_form(path)
        source = RowSource(path, columns=columns or Columns(), split=self.split, split_column=split_column)
        self._pairs = self.form.source(source, limit)

    @property
    def content(self) -> str:
        """A hash that changes if the selected pairs change."""
        return hashlib.sha256(f"{self._pairs.key()} {self.bad_rows} {self.lengths}".encode()).hexdigest()[:16]

    def source(self, stage: Stage) -> ExampleSource | None:
        """Return the pairs for the stage `test`, None for other stages."""
        return self._pairs if stage == "test" else None


def check_unused(settings: Mapping[str, Any], reason: str) -> None:
    """Check that the settings of a file of pairs have their defaults, for a command without such a file.

    Args:
        settings: Values by name.
        reason: Sentence on why the command does not use them.

    Raises:
        ConfigError: A setting has another value, which would have no effect.
    """
    for name, value in settings.items():
        if value != DEFAULTS[name]:
            found = "settings" if isinstance(value, Columns) else repr(value)
            raise ConfigError(
                f"{name}: found {found} without preferences, expected a file of pairs (--preferences pairs.jsonl), "
                f"of which it is a setting. {reason} Give a file, or leave {name} out."
            )


def score_pairs(
    model: PreferenceModule | OpenedPolicy,
    pairs: PairsFile,
    precision: str | None,
    trained: frozenset[int] | None = None,
    seed: int = 0,
) -> BenchmarkResults:
    """Compute preference accuracy as a benchmark's results: task `preferences`, metrics `accuracy/MODE`.

    Args:
        model: A checkpoint's module, or any other policy; see `preference_accuracy`.
        pairs: The pairs to score.
        precision: Precision of the computation, as in `trainer.precision`. None: the data type of the weights.
        trained: The model's training pairs (see `training_pairs`). None: they are not known.
        seed: See `evaluate_pairs`.

    Raises:
        DataError: There are no pairs, or the data is invalid.
    """
    started = time.perf_counter()
    scored = preference_accuracy(model, pairs, precision=precision, seed=seed)
    content, task = pairs.content, pairs.task
    metrics: dict[str, float] = {}
    groups: dict[str, float] = {}
    for name, value in sorted(scored.metrics.items(), key=_headline_first):
        destination = metrics if ALL_PAIRS_METRIC.fullmatch(name) else groups
        destination[name] = value
        if name in scored.standard_errors:
            destination[stderr_name(name)] = scored.standard_errors[name]
    form_scores = benchmark_scores(pairs.form, scored.items)
    headlines = {f"{pairs.form.name}/{name}": value for name, value in _headlines(form_scores).items()}
    record: dict[str, Any] = {
        "version": content,
        "template": _template_hash(model, pairs),
        "limit": pairs.limit,
        "items": scored.pairs,
        "prompts": len({row["prompt"] for row in scored.items}),
        "split": pairs.split,
        "reward": scored.reward,
        "reward_kind": "likelihood" if scored.reward == LIKELIHOOD else "implicit",
        "groups": groups,
        "dropped": scored.dropped,
        "bad": scored.bad,
        "cut": scored.cut,
        "seconds": round(time.perf_counter() - started, 3),
    }
    record |= {} if trained is None else {KEY: count_trained(pairs, trained)}
    record |= {"form": pairs.form.name, "scores": form_scores} if form_scores else {}
    items = [_item(row, content, task) for row in scored.items]
    run_record = {"tasks": {task: record}, "settings": {"tasks": [task]}, "seconds": record["seconds"], **provenance()}
    return BenchmarkResults({task: headlines | metrics}, items, {}, to_json_value(run_record))


def _template_hash(model: PreferenceModule | OpenedPolicy, pairs: PairsFile) -> str:
    """Return a hash of the template, its arguments and its treatment of system turns."""
    template = make_template(model.tokenizer, *pairs.template_settings)
    source = template.source if isinstance(template, ChatTemplate) else None
    return short_hash(template.kind, source, template.arguments, template.system_turns)


def remarks(records: Mapping[str, Any]) -> list[str]:
    """Return sentences on pairs that are training pairs, and on missing standard errors.

    Args:
        records: Records of a model's results, by task.
    """
    alone = [f"{task}: {ONE_PROMPT}" for task, record in records.items() if record.get("prompts") == 1]
    return [*overlaps(records), *alone]


def benchmark_scores(form: PairForm, items: Sequence[dict[str, Any]]) -> dict[str, Scores]:
    """Return the scores of a benchmark by `MODE/SCALE`, the prior first. Empty for plain pairs.

    Args:
        form: The form of the rows.
        items: The pairs, with `scaled` (see `PreferenceResults.items`).
    """
    columns = dict.fromkeys(name for item in items for name in item["scaled"])
    scores = {
        name: form.scores([(item, item["scaled"][name]) for item in items if name in item["scaled"]])
        for name in sorted(columns, key=lambda name: (not name.startswith("prior/"), name))
    }
    return {name: values for name, values in scores.items() if values}


def _headlines(scores: dict[str, Scores]) -> Scores:
    """Return the scores under the prior, without those of subsets: `average/prior/summed` and so on."""
    return {
        f"{name}/{column}": value
        for column, values in scores.items() if column.startswith("prior/")
        for name, value in values.items() if not name.startswith("subset/")
    }  # fmt: skip


def _headline_first(metric: tuple[str, float]) -> tuple[bool, bool]:
    """Return a sort key: accuracies before margins, and the prior before the other modes."""
    name, _ = metric
    return not name.startswith("accuracy/"), not name.startswith(("accuracy/prior", "margin/prior"))


def _item(row: dict[str, Any], content: str, task: str) -> dict[str, Any]:
    margins: dict[str, float] = row["margins"]
    correct = {f"accuracy/{mode}": float(accuracies(torch.tensor(margin))) for mode, margin in margins.items()}
    labels = {name: value for name, value in row.items() if name not in ("id", "margins", "scaled")}
    # Ids may repeat across annotators.
    version = f"{content} {row['annotator']}".rstrip()
    return {"task": task, "doc_id": row["id"], "doc_hash": version, "metrics": correct, "response": margins, **labels}
