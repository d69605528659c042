"""Files with the results of adaptation: the scores, and the code weights that `generate` reads."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lpc_lightning.evaluation.adaptation.pairs import AdaptationPairs, AdaptationReport
from lpc_lightning.evaluation.adaptation.scores import Score
from lpc_lightning.files.json_files import write_json

SCORES, WEIGHTS = "adaptation.json", "code_weights.json"


def write_adaptation(folder: Path, report: AdaptationReport, pairs: AdaptationPairs) -> None:
    """Write `adaptation.json` and, if the policy has codes, `code_weights.json` with K numbers for each annotator.

    Args:
        folder: Output folder. It is created if it does not exist.
        report: The results.
        pairs: The collector that made the report. Its settings are written, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores = {
        "column": pairs.column,
        "shots": pairs.shots,
        "rounds": pairs.rounds,
        "seed": pairs.seed,
        "annotators": report.annotators,
        "labelled": report.labelled,
        "baselines": {name: _to_json(score) for name, score in report.baselines.items()},
        "scores": {
            inference: {str(n): _to_json(score) for n, score in by_n.items()}
            for inference, by_n in report.scores.items()
        },
    }
    write_json(folder / SCORES, scores)
    if report.weights:
        write_json(folder / WEIGHTS, {name: weights.tolist() for name, weights in report.weights.items()})


def _to_json(score: Score) -> dict[str, Any]:
    return {name: value for name, value in asdict(score).items() if name not in ("deviations", "shares")}
