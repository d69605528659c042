"""How much slower a fit becomes beside one busy process, by how long OpenMP's threads spin at a barrier.

    python -m benchmarks.neighbour
    python -m benchmarks.neighbour config=configs/experiment/smollm2.yaml --spin-counts 1500 300000

Settings stand before `--spin-counts`, which takes all values behind it.

Each measurement is a `lpc-lightning fit` in a fresh process, without validation. The machine must be quiet otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from lpc_lightning.files.markdown import markdown_table

SPIN_COUNTS = (1_000, 1_500, 3_000, 300_000)
"""Values of GOMP_SPINCOUNT: the project's is the second, GNU OpenMP's default the last."""
WARMUP = 2
"""Steps before those that are measured."""


def main() -> None:
    """Measure, alone and beside a busy process in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each fit")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind")
    parser.add_argument("--spin-counts", type=int, nargs="+", default=SPIN_COUNTS, help="values of GOMP_SPINCOUNT")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="SETTING=VALUE",
        default=["policy.layers=12"],
        help="settings of the fit; the policy of configs/experiment/tiny.yaml with 12 layers if there are none",
    )
    options = parser.parse_intermixed_args()
    settings = dict(setting.split("=", 1) for setting in options.settings)
    kinds = [(count, is_beside) for count in options.spin_counts for is_beside in (False, True)]
    seconds: dict[tuple[int, bool], list[float]] = {kind: [] for kind in kinds}
    for number in range(options.rounds):
        for spin_count, is_beside in kinds:
            print(f"round {number + 1}, GOMP_SPINCOUNT={spin_count}, {_PLACE[is_beside]} ...", end=" ", flush=True)
            seconds[spin_count, is_beside].append(measure(spin_count, is_beside, options.steps, settings))
            print(f"{seconds[spin_count, is_beside][-1]:.2f} s", flush=True)
    print(f"\nSeconds of {options.steps} steps, {' '.join(options.settings)}, medians of {options.rounds}:\n")
    print(render(seconds))


def measure(spin_count: int, is_beside: bool, steps: int, settings: Mapping[str, str]) -> float:
    """Return the seconds of some steps of a fit in a fresh process.

    Args:
        spin_count: GOMP_SPINCOUNT of that process.
        is_beside: Run another process all the time that needs a whole core.
        steps: Number of steps that are measured, after those for warm-up.
        settings: Settings of the fit that replace those of the measurement.
    """
    waiting = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in waiting}
    environment["GOMP_SPINCOUNT"] = str(spin_count)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "recording.json"
        recorder = {"class_path": "benchmarks.recorder.StepRecorder", "init_args": {"output": str(output)}}
        all_settings = {
            "config": "configs/experiment/tiny.yaml",
            "data.train_pairs": 8 * (WARMUP + steps),
            "data.validation_pairs": 0,
            "data.batch_size": 8,
            "data.cache_dir": folder,
            "trainer.default_root_dir": folder,
            "callbacks": json.dumps([recorder]),
            "trainer.max_steps": WARMUP + steps,
            "trainer.logger": "false",
            "trainer.enable_checkpointing": "false",
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
            **settings,
        }
        command = [
            sys.executable,
            "-m",
            "lpc_lightning",
            "fit",
            *(f"--{name}={value}" for name, value in all_settings.items()),
        ]
        with busy_process() if is_beside else nullcontext():
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        ended = json.loads(output.read_text())["ended"]
    return ended[-1] - ended[-1 - steps]


@contextmanager
def busy_process() -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that needs a whole core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


_PLACE = {False: "alone", True: "beside a busy process"}


def render(seconds: Mapping[tuple[int, bool], Sequence[float]]) -> str:
    """Return a Markdown table of medians.

    Args:
        seconds: Measurements by spin count, alone (false) and beside a busy process (true).
    """
    rows = []
    for spin_count in dict.fromkeys(count for count, _ in seconds):
        alone, beside = (statistics.median(seconds[spin_count, is_beside]) for is_beside in (False, True))
        rows.append([str(spin_count), f"{alone:.2f}", f"{beside:.2f}", f"{beside / alone:.2f}"])
    return markdown_table(["GOMP_SPINCOUNT", "alone", "beside a busy process", "ratio"], rows)


if __name__ == "__main__":
    main()
