"""What few-shot inference has found, on disk: the scores, and weights that `generate` takes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from lpc_lightning.evaluation.adaptation.pairs import AdaptationPairs, AdaptationReport

SCORES, WEIGHTS = "adaptation.json", "code_weights.json"


def write_adaptation(folder: Path, report: AdaptationReport, asked: AdaptationPairs) -> None:
    """Write `adaptation.json` and, where there are codes, `code_weights.json`: K numbers by annotator.

    Args:
        folder: Made where it is missing.
        report: What was found.
        asked: By which settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores = {
        "column": asked.column,
        "shots": asked.shots,
        "rounds": asked.rounds,
        "seed": asked.seed,
        "annotators": report.annotators,
        "baselines": {name: asdict(each) for name, each in report.baselines.items()},
        "scores": {
            kind: {str(n): asdict(each) for n, each in scores.items()} for kind, scores in report.scores.items()
        },
    }
    _write(folder / SCORES, scores)
    if report.weights:
        _write(folder / WEIGHTS, {name: weights.tolist() for name, weights in report.weights.items()})


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
