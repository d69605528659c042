"""What was answered to each document, and what it scored, out of lm-eval's samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lpc_lightning.evaluation.benchmarks.results import plain

NUMBERS = (int, float, np.number)


def scores_of_task(found: Mapping[str, Any]) -> dict[str, float]:
    """A task's or group's scores and standard errors, by name.

    Args:
        found: lm-eval's results of it: `acc,none`, `acc_stderr,none` ("N/A" where there is none), `alias`,
            `sample_len`, and so on.
    """
    return {short(name): float(value) for name, value in found.items() if "," in name and isinstance(value, NUMBERS)}


def short(metric: str) -> str:
    """lm-eval's name, `METRIC,FILTER`, without the filter that does nothing."""
    return metric.removesuffix(",none")


def items_of_task(task: str, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One item per document, in their order.

    Args:
        task: Its name.
        samples: lm-eval's, one for each document and filter of the answers.
    """
    items: dict[int, dict[str, Any]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        new = {
            "task": task,
            "doc_id": sample["doc_id"],
            "doc_hash": sample["doc_hash"],
            "metrics": {},
            "response": plain(_response(sample["resps"])),
        }
        item = items.setdefault(sample["doc_id"], new)
        for metric in sample["metrics"]:
            item["metrics"][short(f"{metric},{sample['filter']}")] = plain(sample[metric])
    return list(items.values())


def _response(answers: Sequence[Sequence[Any]]) -> Any:
    """What was answered to a document's requests, each put once or several times.

    A log-probability comes with whether greedy decoding would have said the same, which is left out.
    """
    values = [[answer[0] if isinstance(answer, tuple) else answer for answer in repeats] for repeats in answers]
    single = [repeats[0] if len(repeats) == 1 else repeats for repeats in values]
    return single[0] if len(single) == 1 else single
