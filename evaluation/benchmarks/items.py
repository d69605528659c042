"""Scores and answers of single documents, extracted from lm-eval's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lpc_lightning.evaluation.benchmarks.results import to_json_value

NUMBERS = (int, float, np.number)


def scores_of_task(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores and standard errors of a task or group, by name.

    Args:
        results: lm-eval's results of the task: `acc,none`, `acc_stderr,none` ("N/A" if absent), `alias`, `sample_len`
            and so on. Entries that are not scores are left out.
    """
    return {
        metric_name(name): float(value) for name, value in results.items() if "," in name and isinstance(value, NUMBERS)
    }


def metric_name(lm_eval_name: str) -> str:
    """Remove the filter `none` from lm-eval's `METRIC,FILTER`. Other filters stay."""
    return lm_eval_name.removesuffix(",none")


def items_of_task(task: str, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one item per document, in the order of the documents.

    Args:
        task: Name of the task.
        samples: lm-eval's samples, one per document and answer filter.
    """
    items: dict[int, dict[str, Any]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        new = {
            "task": task,
            "doc_id": sample["doc_id"],
            "doc_hash": sample["doc_hash"],
            "metrics": {},
            "response": to_json_value(_response(sample["resps"])),
        }
        item = items.setdefault(sample["doc_id"], new)
        for metric in sample["metrics"]:
            item["metrics"][metric_name(f"{metric},{sample['filter']}")] = to_json_value(sample[metric])
    return list(items.values())


def _response(answers: Sequence[Sequence[Any]]) -> Any:
    """Return the answers to a document's requests, where each request has one or several answers.

    An answer with a log-probability also has a boolean: whether greedy decoding gives the same text. It is left out.
    """
    values = [[answer[0] if isinstance(answer, tuple) else answer for answer in repeats] for repeats in answers]
    single = [repeats[0] if len(repeats) == 1 else repeats for repeats in values]
    return single[0] if len(single) == 1 else single
