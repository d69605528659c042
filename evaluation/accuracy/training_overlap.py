"""Pairs that are scored and that the scored policy was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lpc_lightning.data import DataError, PreferenceDataModule
from lpc_lightning.data.preference_data import StageRows
from lpc_lightning.data.sources.locations import HubDataset, open_location
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.splits import pair_rank
from lpc_lightning.errors import ConfigError
from lpc_lightning.inference.run_data import data_files, data_name, data_of_run, difference, recorded_rows
from lpc_lightning.types import PreferenceExample

KEY = "trained_on"
"""Entry of a task's record: the number of scored pairs that are training pairs of the run."""


def training_pairs(origin: Mapping[str, Any]) -> frozenset[int] | None:
    """Return hashes of the training pairs of the run that wrote a policy, whatever their labels.

    A line is printed if other pairs than those of the run are found in their place.

    Args:
        origin: Result of `checkpoint_origin`, or `training.json` of an exported folder under the key `training`.

    Returns:
        None if they cannot be known here: no data or no digest of its pairs is recorded, its files are gone or have
        changed, it is from a hub, or `data_of_run` refuses it.
    """
    origin = origin.get("training", origin)
    recorded = recorded_rows(origin, "train")
    if origin.get("data") is None or recorded is None:
        return None
    report = DataReport()
    try:
        data = data_of_run(origin)
        if any(_is_on_hub(rows) for rows in data_files(data)):
            return None
        source = data.source("train")
        pairs = None if source is None else frozenset(_hash(example) for example in source.read(report))
    except (ConfigError, DataError, OSError, ValueError):
        return None
    if report.rows == recorded:
        return pairs
    print(
        f"The training data {data_name(data, 'train')} has changed, or is another one: "
        f"{difference(report.rows, recorded)}. Whether scored pairs are training pairs is not known."
    )
    return None


def count_trained(scored: PreferenceDataModule, trained: frozenset[int]) -> int:
    """Return how many of the test pairs of a data module are among the training pairs.

    Args:
        scored: The data, whose test pairs have been scored.
        trained: Result of `training_pairs`.
    """
    source = scored.source("test")
    assert source is not None
    examples = list(source.read(DataReport()))  # the token cache does not hold texts
    return sum(_hash(examples[index]) in trained for index in scored.pairs["test"].indices)


def overlap_sentence(trained: int, pairs: int) -> str:
    """Return the sentence of the console and of the written reports."""
    return f"{trained} of {pairs} pairs are training pairs of this run"


def overlaps(records: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each task whose pairs are partly training pairs.

    Args:
        records: Records of a model's results, by task.
    """
    return [
        f"{task}: {overlap_sentence(record[KEY], record['items'])}."
        for task, record in records.items()
        if record.get(KEY)
    ]


def _is_on_hub(rows: StageRows) -> bool:
    """Return whether the training path is a hub name. Nothing is looked up there."""
    return isinstance(open_location(rows.place("train"), rows.config), HubDataset)


def _hash(example: PreferenceExample) -> int:
    """Return a hash of the prompt, without a name written into it, and of both answers in either order."""
    return pair_rank(replace(example, prompt=example.question or example.prompt))
