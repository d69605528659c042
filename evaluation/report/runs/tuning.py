"""Read the choices on tuned axes that `lpc-lightning ablate` has written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from lpc_lightning.evaluation.report.runs.records import GroupTuning
from lpc_lightning.evaluation.report.runs.settings import as_value

TUNING = "tuning.json"


def read_tunings(folder: Path) -> Iterator[GroupTuning]:
    """Yield the tuning of each group of an ablation's cells. Without `tuning.json` there is none."""
    if not (folder / TUNING).is_file():
        return
    for group in json.loads((folder / TUNING).read_text(encoding="utf-8"))["groups"]:
        tune, values = group["tune"], group["values"]
        listed = {name: ", ".join(map(str, tune[name])) for name in ("values", "seeds")}
        best = {"max": "largest", "min": "smallest"}[tune["mode"]]
        yield GroupTuning(
            ablation=folder.resolve().name,
            axes={axis: as_value(value) for axis, value in group["axes"].items()},
            axis=tune["axis"],
            section=f"{tune['axis']} of {listed['values']} by the {best} {tune['by']}, seeds {listed['seeds']}, "
            f"widened at most {tune['widen']} times{_with(tune.get('arguments', []))}",
            value=as_value(group["value"]),
            note=group["note"],
            scores={entry["value"]: {cell["seed"]: cell["score"] for cell in entry["cells"]} for entry in values},
            added=tuple(entry["value"] for entry in values if entry["added"]),
            by=tune["by"],
        )


def _with(arguments: Sequence[str]) -> str:
    return f", with {' '.join(arguments)}" if arguments else ""
