"""Training of DPO and LPC-DPO on built-in pairs, with a table and a picture of the codebook."""

from __future__ import annotations

import csv
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib.image
import yaml

from lpc_lightning.cli.function_command import run_function
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation.command import ablate
from lpc_lightning.evaluation.figures import make_figure
from lpc_lightning.evaluation.report.runs.fit import METRICS, read_curves
from lpc_lightning.files.json_files import replaced_file, write_text
from lpc_lightning.files.markdown import markdown_table
from lpc_lightning.files.output_paths import check_folder

CONFIGS = Path(str(files("lpc_lightning"))) / "configs"
ARMS = {"none": "DPO", "marginal": "LPC-DPO, exact marginal, warm start"}
"""Arms of the grid `demo.yaml` by their value on its axis `latent`."""
ACCURACY = "val/rewards/accuracies"
NMI = "val/mutual_information/factor_normalized"
STEPS = 512
INTERVAL = 8.0
"""Seconds between two lines that report the progress."""
LIMITS = (
    "Shown: the codebook finds the factors of the built-in pairs (NMI 1 is perfect). Both arms have one learning "
    "rate.\n"
    "Not shown: that LPC beats a tuned DPO, or anything about real preferences. One seed, a tiny random policy."
)


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    run_function(demo, list(arguments[1:]), arguments[0])


def demo(output: str = "runs/demo", processes: int = 2) -> None:
    """Fit DPO and LPC-DPO to built-in preference pairs, and show what the codebook has found.

    The fits take some two minutes on two cores. OUTPUT gets their runs, `demo.md` and `demo.png`. The command can be
    repeated: finished fits are kept.

    Args:
        output: Folder for the runs, the table and the picture.
        processes: Fits that run at the same time.

    Raises:
        ConfigError: A fit failed.
    """
    folder = Path(output)
    check_folder(folder, "output")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Two fits of a tiny policy to 4,096 built-in pairs: {' and '.join(ARMS.values())}.", flush=True)
    runs = {name: folder / "fits" / "cells" / f"latent={value},seed=1" for value, name in ARMS.items()}
    with report_progress(runs):
        finished = ablate([str(_grid(folder))], output=str(folder / "fits"), processes=processes)
    if not finished:
        raise ConfigError(
            f"demo: found a failed fit in {folder / 'fits'}, expected two finished fits. See its log.txt."
        )
    text = table(runs)
    write_text(folder / "demo.md", f"{text}\n\n{LIMITS}\n")
    draw(runs, folder / "demo.png")
    print(f"\n{text}\n\n{LIMITS}\n\nThe picture: {folder / 'demo.png'}")


def _grid(folder: Path) -> Path:
    """Write the shipped grid with absolute paths, so that the command runs in any folder."""
    grid = yaml.safe_load((CONFIGS / "ablation" / "demo.yaml").read_text(encoding="utf-8"))
    path = folder / "demo.yaml"
    write_text(path, yaml.safe_dump(_absolute(grid), sort_keys=False))
    return path


def _absolute(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _absolute(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_absolute(entry) for entry in value]
    return value.replace("=configs/", f"={CONFIGS}/") if isinstance(value, str) else value


@contextmanager
def report_progress(runs: dict[str, Path]) -> Iterator[None]:
    """Print the step of each fit every few seconds.

    Args:
        runs: Folders of the fits by the name of the arm.
    """
    done, start = threading.Event(), time.perf_counter()

    def report() -> None:
        while not done.wait(INTERVAL):
            states = "; ".join(f"{name.partition(',')[0]}: {_state(folder)}" for name, folder in runs.items())
            print(f"{time.perf_counter() - start:4.0f} s  {states}", flush=True)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _state(folder: Path) -> str:
    if (folder / "results.json").is_file():
        return "finished"
    metrics = folder / "run" / METRICS
    if not metrics.is_file():
        return "starting, tokens, reference, warm start"
    with metrics.open(encoding="utf-8", newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]
    return f"step {max(steps, default=0)} of {STEPS}"


def table(runs: dict[str, Path]) -> str:
    """Compare the arms on validation and test pairs.

    Args:
        runs: Folders of the finished fits by the name of the arm.

    Returns:
        A Markdown table.
    """
    rows = []
    for name, folder in runs.items():
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))["metrics"]
        record = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
        accuracies = [f"{results[f'{stage}/rewards/accuracies']:.3f}" for stage in ("val", "test")]
        rows.append([name, *accuracies, f"{results[NMI]:.3f}" if NMI in results else "", f"{record['seconds']:.0f} s"])
    return markdown_table(["arm", "validation accuracy", "test accuracy", "NMI of codes and factors", "time"], rows)


def draw(runs: dict[str, Path], path: Path) -> None:
    """Draw the accuracy of the arms over training beside the last heat map of codes by factors.

    Args:
        runs: As for `table`.
        path: Image file to write.
    """
    figure = make_figure(13, 5)
    curves, codes = figure.subplots(1, 2, width_ratios=(1, 1.6))
    for name, folder in runs.items():
        _, curve = read_curves(folder / "run" / METRICS)[ACCURACY]
        curves.plot(curve.steps, curve.values, marker="o", label=name)
    curves.set(xlabel="step", ylabel="validation accuracy under the prior", ylim=(0.45, 1.02))
    curves.legend(loc="lower right")
    curves.grid(alpha=0.3)
    *_, heat_map = sorted(folder for run in runs.values() for folder in run.glob("run/codebook/*_heatmap_factor.png"))
    codes.imshow(matplotlib.image.imread(heat_map))
    codes.axis("off")
    with replaced_file(path) as file:
        figure.savefig(file, dpi=130)
