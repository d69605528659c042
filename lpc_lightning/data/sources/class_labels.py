"""Names of class labels. `datasets` stores a column of type `ClassLabel` as numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

Change = Callable[[Any], Any]


def name_labels(feature: Any) -> Change | None:
    """Return a function that puts names in place of the numbers in a cell or a row. None if it has no class labels.

    The number -1, a missing label in `datasets`, becomes None.

    Args:
        feature: Type of the cell, as `Features.to_dict` of `datasets` describes it. For a row, those of its columns.
    """
    if not isinstance(feature, Mapping):
        return None
    kind = feature.get("_type")
    if kind == "ClassLabel":
        names: dict[int, str | None] = {**dict(enumerate(feature["names"])), -1: None}
        # Another program may have changed the cells and kept the description.
        return lambda cell: names.get(cell, cell) if type(cell) is int else cell
    if isinstance(kind, str):  # a list, or a type without parts
        of_item = name_labels(feature.get("feature"))
        return None if of_item is None else _in_items(of_item)
    changes = {name: change for name, each in feature.items() if (change := name_labels(each)) is not None}
    return _in_entries(changes) if changes else None


def name_labels_of_parquet(metadata: Mapping[bytes, bytes] | None) -> Change | None:
    """Return the function of `name_labels` for the rows of a Parquet file, from what `datasets` has written there."""
    try:
        return name_labels(json.loads((metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError):  # another program has written the file
        return None


def _in_entries(changes: Mapping[str, Change]) -> Change:
    def change(cell: Any) -> Any:
        if not isinstance(cell, dict):
            return cell
        return {name: changes[name](value) if name in changes else value for name, value in cell.items()}

    return change


def _in_items(of_item: Change) -> Change:
    return lambda cell: [of_item(item) for item in cell] if isinstance(cell, list) else cell
