"""Files with the results of adaptation: the scores, and the code weights that `generate` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.adaptation.pairs import AdaptationPairs, AdaptationReport
from lpc_lightning.evaluation.adaptation.scores import Score
from lpc_lightning.files.json_files import write_json

SCORES, WEIGHTS = "adaptation.json", "code_weights.json"


def check_origins(output: Path, origins: Mapping[str, Mapping[str, Any]], texts: Sequence[str]) -> None:
    """Check that a folder has no results but earlier ones of the same models on the same pairs.

    Args:
        output: Output folder of several models.
        origins: The policy and the pairs of each model by its name, as in `write_adaptation`.
        texts: Names of files in the folder that cover all models.

    Raises:
        ConfigError: Results of another origin, or a file that is not a result, would be replaced.
    """
    records = {path.parent.name: path for path in sorted(output.glob(f"*/{SCORES}"))}
    remedy = "Give another folder (--output), or move it."
    for name, path in records.items():
        found = _origin(path, remedy)
        if (ours := origins.get(name)) is None:
            text = f"found results of {_describe(found)} in {path}, expected results of the models of this command"
        elif differing := [key for key in ours if found.get(key) != ours[key]]:
            of, expected = (_describe({key: each.get(key) for key in differing}) for each in (found, ours))
            text = f"found results of {of} in {path}, expected {expected}"
        else:
            continue
        raise ConfigError(f"output: {text}. {remedy}")
    for text in texts:
        if not records and (output / text).exists():
            raise ConfigError(f"output: found {output / text} without the results of a model, expected none. {remedy}")


def _origin(path: Path, remedy: str) -> dict[str, Any]:
    """Return the policy and the pairs of a result.

    Raises:
        ConfigError: The file is no result of the command, or has no origin.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or "scores" not in content:
        raise ConfigError(f"output: found {path}, which is no result of this command, expected none. {remedy}")
    if not isinstance(content.get("origin"), dict):
        raise ConfigError(
            f"output: found results in {path} without their checkpoint and pairs, as earlier versions and the callback "
            f"AnnotatorAdaptation write them, expected results that name both. {remedy}"
        )
    origin: dict[str, Any] = content["origin"]
    return origin


def _describe(origin: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {'null' if value is None else value}" for name, value in origin.items())


def write_adaptation(
    folder: Path, report: AdaptationReport, pairs: AdaptationPairs, origin: Mapping[str, Any] | None = None
) -> None:
    """Write `adaptation.json` and, if the policy has codes, `code_weights.json` with K numbers for each annotator.

    Args:
        folder: Output folder. It is created if it does not exist.
        report: The results.
        pairs: The collector that made the report. Its settings are written, too.
        origin: The policy and the pairs, as JSON values. None: those of the run whose folder it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores = {
        "origin": origin,
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
    return {name: value for name, value in asdict(score).items() if not name.startswith("of_")}
