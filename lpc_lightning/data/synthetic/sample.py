"""Writer of generated pairs to a JSON lines file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lpc_lightning.data.synthetic.generator import PreferenceGenerator

TEST_SHARE = 0.2
"""Share of the rows in the split `test`."""


def write_sample(path: Path, generator: PreferenceGenerator, count: int) -> None:
    """Write pairs in the format of `PreferenceData`, with a column `split` that is `train` or `test`.

    Args:
        path: File to write, ending in `.jsonl`.
        generator: Generator of the pairs.
        count: Number of rows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(generator, count)]
    path.write_text("".join(lines), encoding="utf-8")


def _rows(generator: PreferenceGenerator, count: int) -> Iterator[dict[str, Any]]:
    test = round(count * TEST_SHARE)
    for split, number in (("train", count - test), ("test", test)):
        for example in generator.examples(number, split):
            yield {
                "id": example.id,
                "split": split,
                "source": example.source,
                "factor": example.factor,
                "annotator": example.annotator,
                "prompt": example.prompt[0]["content"],
                "chosen": example.chosen,
                "rejected": example.rejected,
            }
