"""Run the project and TRL in turn on the same work, each measurement in a fresh process, and tabulate.

    python -m benchmarks.run --data my_pairs.jsonl

README.md beside this file describes what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.data_files import NAMES, find_files
from benchmarks.report import DTYPES, SPLIT, render
from lpc_lightning.cli.machine import default_precision
from lpc_lightning.policy.precision import warn_of_slow_products

BETA, SEED = 0.1, 0
DATA = {"validation_share": 0.0, "test_split": None, "too_long": "truncate_answer"}
"""Settings of our data that make the pairs TRL's: all rows of the file's train split, answers cut at the end where a
sequence is too long (TRL's `keep_start`)."""
OURS = {
    "ours, live reference": ["--model.reference=live"],
    "ours": ["--model.reference=cached"],
    "ours + LPC gumbel": ["--model.reference=cached", "--latent=configs/latent/gumbel.yaml"],
    "ours + LPC marginal K=32": ["--model.reference=cached", "--latent=configs/latent/marginal.yaml"],
}
TRL = {
    "TRL": [],
    "TRL precomputed": ["--precompute"],
    "TRL + Liger": ["--liger"],
    "TRL + Liger precomputed": ["--liger", "--precompute"],
}
STANDARD = ["TRL", "TRL precomputed", "ours, live reference", "ours", "ours + LPC gumbel", "ours + LPC marginal K=32"]


def main() -> None:
    """Run all requested measurements."""
    options = _options()
    files = find_files(options.data, options.data_dir)
    options.out.mkdir(parents=True, exist_ok=True)
    machine = options.out / "machine.json"
    measure = ["-m", "benchmarks.machine", options.device, str(options.peak_seconds), str(machine)]
    call(measure, options.out / "machine.log")
    cells: list[dict[str, Any]] = []
    results = {"command": shlex.join(sys.argv), "machine": json.loads(machine.read_text()), "cells": cells}
    for (data, path), precision in product(files.items(), options.precision):
        cells.append(_cell(options, data, path, precision))
        # Each time: a long benchmark that is stopped keeps what it has.
        (options.out / "results.json").write_text(json.dumps(results, indent=1))
        (options.out / "table.md").write_text(render(results))
    print(render(results))


def _cell(options: argparse.Namespace, data: str, path: Path, precision: str) -> dict[str, Any]:
    """One data set at one precision: all sides, in turn, `rounds` times."""
    folder = options.out / f"{data}-{precision}"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        return _measure(options, data, path, precision, folder, Path(cache))


def _measure(
    options: argparse.Namespace, data: str, path: Path, precision: str, folder: Path, cache: Path
) -> dict[str, Any]:
    settings = {
        "path": str(path),
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        **DATA,
    }
    tokens = {**settings, "cache_dir": str(cache)}
    workload = {"model": options.model, "data": tokens, "seed": SEED, "steps": options.steps}
    pairs = folder / "pairs.jsonl"
    call(["-m", "benchmarks.workload", json.dumps(workload), str(pairs)], folder / "pairs.log")
    commands = _commands(options, settings, precision, pairs)
    sides: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for number in range(options.rounds):
        for name in turns(commands, number):
            command = commands[name]
            output = folder / f"{name.replace(' ', '_')}-{number}.json"
            load = os.getloadavg()[0]
            print(f"{data} {precision} {name}, round {number + 1}: load {load:.2f} ...", end=" ", flush=True)
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as scratch:
                # All find the tokens ready, and each works the reference out by itself.
                (Path(scratch) / "tokens").symlink_to(cache / "tokens")
                places = {"OUTPUT": str(output), "FOLDER": scratch}
                call([_fill_in(argument, places) for argument in command], output.with_suffix(".log"))
            print(f"{time.perf_counter() - start:.0f} s", flush=True)
            recording = json.loads(output.read_text())
            sides[name].append(recording | {"load": [load, os.getloadavg()[0]], "command": shlex.join(command)})
    steps = [json.loads(line) for line in pairs.read_text().splitlines()]
    _check_order(sides, steps)
    return {
        "data": data,
        "precision": precision,
        "batch_size": options.batch_size,
        "warmup": options.warmup,
        "work": [step["work"] for step in steps],
        "sides": sides,
    }


def turns(names: Iterable[str], number: int) -> list[str]:
    """The sides in the order of a round: every other one backwards, so that none always comes first; splits once."""
    in_order = [name for name in names if number == 0 or not name.startswith(SPLIT)]
    return in_order[::-1] if number % 2 else in_order


def _commands(options: argparse.Namespace, data: dict[str, Any], precision: str, pairs: Path) -> dict[str, list[str]]:
    """What runs each side, by name; OUTPUT stands for the file that it writes, FOLDER for a scratch folder."""
    also = {name: shlex.split(flags) for name, _, flags in (each.partition("=") for each in options.also)}
    variants = OURS | also
    ours = {name: _ours(options, data, precision, flags) for name, flags in variants.items()}
    shared = ["--model", options.model, "--pairs", str(pairs), "--output", "OUTPUT", "--precision", precision]
    shared += ["--device", options.device, "--lr", str(options.lr), "--beta", str(BETA)]
    known = ours | {name: ["-m", "benchmarks.trl_dpo", *shared, *flags] for name, flags in TRL.items()}
    names = options.sides or [*STANDARD, *also]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--sides: found {unknown}, expected some of {', '.join(known)}.")
    chosen = {name: known[name] for name in names}
    if options.split:
        split = [name for name in names if name in variants]
        chosen |= {SPLIT + name: _ours(options, data, precision, variants[name], split=True) for name in split}
    return chosen


def _ours(
    options: argparse.Namespace, data: dict[str, Any], precision: str, flags: list[str], split: bool = False
) -> list[str]:
    """`lpc-lightning fit` as users run it, with the recorder as its only callback."""
    recorder = {"class_path": "benchmarks.recorder.StepRecorder", "init_args": {"output": "OUTPUT", "split": split}}
    settings = {
        "trainer.accelerator": "gpu" if options.device == "cuda" else "cpu",
        "trainer.devices": 1,
        "trainer.precision": precision,
        "trainer.default_root_dir": "FOLDER",
        "data.cache_dir": "FOLDER",
        "trainer.num_sanity_val_steps": 0,
        "trainer.limit_val_batches": 0,
        "trainer.logger": "false",
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "model.beta": BETA,
        "model.optimizer.lr": options.lr,
        "model.warmup_ratio": 0.0,
        "policy.dtype": "bfloat16" if precision == "bf16-true" else "float32",
        "callbacks": json.dumps([recorder]),
        "policy.path": options.model,
        "trainer.max_steps": options.steps,
        "seed_everything": SEED,
        **{f"data.{name}": "null" if value is None else value for name, value in data.items()},
    }
    groups = {
        "trainer": "configs/trainer/cpu.yaml",
        "policy": "configs/policy/smollm2_135m_instruct.yaml",
        "data": "configs/data/hh.yaml",
        "model": "DPO",
    }
    arguments = [f"--{name}={value}" for name, value in {**groups, **settings}.items()]
    return ["-m", "lpc_lightning", "fit", *arguments, *flags]


def _fill_in(argument: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        argument = argument.replace(name, place)
    return argument


def call(arguments: list[str], log: Path) -> None:
    """Run Python in a process of its own; what it prints goes to `log`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    with log.open("w") as file:
        done = subprocess.run([sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        raise SystemExit(f"{shlex.join(arguments)} failed:\n{log.read_text()[-3000:]}")


def _check_order(sides: dict[str, list[dict[str, Any]]], steps: list[dict[str, Any]]) -> None:
    expected = [[pair["id"] for pair in step["pairs"]] for step in steps]
    for name, runs in sides.items():
        for run in runs:
            if run["pairs"] != expected:
                raise SystemExit(f"{name} did not train on the pairs of the other sides, in their order.")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="folder of the policy")
    parser.add_argument(
        "--data",
        nargs="+",
        default=list(NAMES),
        metavar="FILE",
        help="files of preference pairs, in any form that `data.path` takes, of whose split column `train` is read; "
        f"or {', '.join(NAMES)}: known files in --data-dir (default: these)",
    )
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("LPC_DATA_DIR") or "data") / "preferences")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=["bf16-mixed", "bf16-true", "32-true"],
        help="default: bf16-mixed, on a CPU without AVX512-BF16 and AMX 32-true",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a prompt with its longer answer")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2, help="first steps that are not counted, at least 1")
    parser.add_argument("--lr", type=float, default=1e-6, help="learning rate of the policy, cosine without warm-up")
    parser.add_argument("--peak-seconds", type=float, default=1.0, help="how long to try each shape of matrices")
    parser.add_argument("--rounds", type=int, default=1, help="times that the sides take their turns")
    parser.add_argument("--sides", nargs="+", help=f"which ones: {', '.join([*TRL, *OURS])}, or names of --also")
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="NAME=FLAGS",
        help="one more variant of our side, by flags of `lpc-lightning fit`: --also 'padded=--data.layout=padded'",
    )
    parser.add_argument("--split", action="store_true", help="also time the parts of our steps, in runs of their own")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    options.precision = options.precision or [default_precision(options.device)]
    for precision in options.precision:
        warn_of_slow_products(options.device, DTYPES[precision], "Take --precision 32-true.")
    if not 1 <= options.warmup < options.steps:
        parser.error(
            f"--warmup: found {options.warmup} of {options.steps} steps, expected from 1 to one less than all."
        )
    return options


if __name__ == "__main__":
    main()
