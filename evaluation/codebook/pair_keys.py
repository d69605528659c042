"""Keys of evaluated pairs, and the texts of the pairs with some keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.evaluation.accuracy.pair_table import Row, pair_labels
from lpc_lightning.types import PreferenceBatch, PreferenceExample

PairKey = tuple[str, str, str, str]
"""Id, annotator and source of a pair, and hashes of its prompt, chosen and rejected answer. Pairs may share an id, such
as that of their prompt."""


def keyed_labels(batch: PreferenceBatch) -> list[Row]:
    """Return `pair_labels` of each pair, and `answers`, hashes of the tokens of both answers."""
    return [{**row, "answers": answers} for row, answers in zip(pair_labels(batch), batch.answers, strict=True)]


def pair_key(row: Row) -> PairKey:
    """Return the key of a pair from its `keyed_labels`."""
    return _key_of(row["id"], row["annotator"], row["source"], row["prompt"], row["answers"])


def find_examples(
    data: PreferenceDataModule, stage: Literal["validation", "test"], pairs: Iterable[PairKey]
) -> dict[PairKey, PreferenceExample]:
    """Read the examples of some pairs of a stage, whose tokens have been loaded. Reading stops when all are found."""
    missing, examples = set(pairs), dict[PairKey, PreferenceExample]()
    names = {key[:3] for key in missing}
    for place, example in enumerate(data.kept_examples(stage)):
        if not missing:
            break
        if (example.id, example.annotator, example.source) not in names:
            continue
        pair = data.pairs[stage][place]
        key = _key_of(pair.id, pair.annotator, pair.source, pair.prompt, pair.answers)
        if key in missing:
            examples[key] = example
            missing.remove(key)
    return examples


def _key_of(name: str, annotator: str, source: str, prompt: str, answers: Sequence[str]) -> PairKey:
    return name, annotator, source, " ".join((prompt, *answers))
