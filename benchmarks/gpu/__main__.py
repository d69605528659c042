"""Measure on one GPU what the project and TRL take for the same work, in one process and a few minutes.

python -m benchmarks.gpu --output runs/bench-gpu
python -m benchmarks.gpu --tiny --output runs/bench-tiny      # on a CPU, without timing claims
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import shlex
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

STARTED = time.perf_counter()
RESERVE = 5.0
"""Seconds that a part needs at least; with less left it is not started."""


@dataclass
class Run:
    """One run of the benchmark."""

    bench: Any
    results: Any
    log: TextIO
    deadline: float
    folder: Path
    scratch: Path
    tiny: bool
    only: re.Pattern[str]
    """What the names of cases and commands have to match."""

    def attempt(self, name: str, part: str, run: Callable[[], dict[str, Any]], limit: float, **row: Any) -> None:
        """Run something within its limit and what is left of the time, and write what came out."""
        from benchmarks.gpu.guard import attempt

        if not self.only.search(name):
            return
        left = self.deadline - time.perf_counter()
        if left < RESERVE:
            outcome: dict[str, Any] = {"status": "left out: no time left", "seconds": 0.0}
        else:
            self.log.write(f"\n===== {name}\n")
            outcome = attempt(run, min(limit, left), self.log)
        self.results.add(part, {"name": name, **row, **outcome})
        print(f"{time.perf_counter() - STARTED:6.1f} s  {name}: {_describe(outcome)}", flush=True)

    def steps(self, cases: Iterable[Any]) -> None:
        """Part b: train and time."""
        for case in cases:
            row = {"case": vars(case), "work": case.work, "method": case.method}
            self.attempt(case.name, "steps", partial(self.bench.run, case), case.limit + 30, **row)

    def profiles(self) -> None:
        """Part c: a few steps under the profiler."""
        from benchmarks.gpu import ours
        from benchmarks.gpu.cases import profiled_cases
        from benchmarks.gpu.trace import StepProfiler

        for number, case in enumerate(profiled_cases(self.tiny)):
            trace = self.folder / f"trace-{number}.json.gz"
            profiler = StepProfiler(case.warmup, 3, trace)

            def run(case: Any = case, profiler: StepProfiler = profiler) -> dict[str, Any]:
                file = self.bench.lengths_file(case)
                ours.fit(case, file, self.scratch, self.bench.device, extra=profiler)
                return {"trace": profiler.trace.name, **profiler.summary}

            self.attempt(case.name, "profiles", run, 75.0)

    def smoke(self) -> None:
        """Part a: every command."""
        from benchmarks.gpu.smoke import Smoke, run_cell

        for cell in Smoke(self.scratch / "smoke", self.bench.device, self.tiny).cells():
            self.attempt(cell.name, "smoke", partial(run_cell, cell), 60.0)

    def agreement(self) -> None:
        """Part d: compiled against eager, and z against all codes."""
        from benchmarks.gpu.agreement import agreement_cases, compare_compiled, compare_paths

        base, latent = agreement_cases(self.tiny)
        run = partial(compare_compiled, self.bench, base)
        self.attempt(f"compiled and eager: {base.work}", "agreement", run, 120.0)
        run = partial(compare_paths, self.bench, latent)
        self.attempt(f"z and all codes: {latent.work}", "agreement", run, 60.0)


def main() -> None:
    """Run the requested parts for as long as time is left."""
    options = _options()
    options.output.mkdir(parents=True, exist_ok=True)
    log = _log_of_everything(options.output / "log.txt")
    print("importing ...", flush=True)
    import torch

    from benchmarks.gpu.cases import best_batch_cases, further_cases, main_cases
    from benchmarks.gpu.guard import free_memory
    from benchmarks.gpu.lengths import measure, read
    from benchmarks.gpu.measure import Bench
    from benchmarks.gpu.report import Results
    from benchmarks.machine import describe, peak_flops
    from lpc_lightning.cli.log import set_up_logging

    set_up_logging()
    warnings.filterwarnings("ignore")
    device = "cpu" if options.tiny or not torch.cuda.is_available() else "cuda"
    if device == "cpu" and not options.tiny:
        raise SystemExit("found no GPU, expected one; `--tiny` runs everything in miniature on a CPU.")
    peak = peak_flops(device, torch.bfloat16, options.peak_seconds)
    torch._logging.set_logs(recompiles=True, graph_breaks=True)
    free_memory()
    gc.freeze()  # what the imports made stays, and need not be searched after every part
    facts = describe(device) | {
        "command": shlex.join(sys.argv),
        "bf16_tflops": round(peak / 1e12, 2),
        "import_s": round(time.perf_counter() - STARTED, 1),
    }
    lengths = None if options.lengths is None else read(options.lengths)
    if options.data is not None:
        lengths = measure(options.data, options.tokenizer, options.max_length)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(device, peak, Path(scratch), lengths)
        results = Results(options.output, facts)
        results.write()
        deadline = STARTED + options.seconds
        run = Run(bench, results, log, deadline, options.output, Path(scratch), options.tiny, options.only)
        parts = options.parts
        if "b" in parts:
            run.steps(main_cases(options.tiny))
        if "c" in parts:
            run.profiles()
        if "a" in parts:
            run.smoke()
        if "d" in parts:
            run.agreement()
        if "b" in parts:
            run.steps(further_cases(options.tiny))
            run.steps(best_batch_cases(options.tiny))
    print((options.output / "results.md").read_text())


def _parts(text: str) -> list[str]:
    """Split the value of `--parts`."""
    parts = text.split(",")
    if unknown := set(parts) - set("abcd"):
        raise argparse.ArgumentTypeError(f"found {', '.join(sorted(unknown))}, expected some of a, b, c, d, as in b,c")
    return parts


def _log_of_everything(path: Path) -> TextIO:
    """Send all that is written to the standard error output, by libraries in C++ as well, to a file, and return it."""
    path.unlink(missing_ok=True)
    log = path.open("a", buffering=1)  # both write to its end
    sys.stderr.flush()
    os.dup2(log.fileno(), 2)
    return log


def _describe(outcome: dict[str, Any]) -> str:
    if "median_s" in outcome:
        mfu = "" if outcome["mfu"] is None else f", MFU {100 * outcome['mfu']:.1f} %"
        memory = "" if outcome["peak_gib"] is None else f", {outcome['peak_gib']:.1f} GiB"
        return f"{1e3 * outcome['median_s']:.1f} ms a step, {outcome['pairs_per_s']:.1f} pairs/s{mfu}{memory}"
    return str(outcome.get("left_out") or outcome["status"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/bench-gpu"), help="folder for results and log")
    parser.add_argument("--seconds", type=float, default=460.0, help="time for everything, imports included")
    parser.add_argument(
        "--parts", type=_parts, default=list("abcd"), help="commands, step times, profile, agreement; default: a,b,c,d"
    )
    parser.add_argument("--only", type=re.compile, default="", metavar="REGEX", help="of cases and commands, by name")
    parser.add_argument("--tiny", action="store_true", help="everything in miniature on a CPU, without timing claims")
    parser.add_argument("--lengths", type=Path, help="file of token lengths, written by benchmarks.gpu.lengths")
    parser.add_argument("--data", type=Path, help="file of preference pairs whose lengths are taken")
    parser.add_argument("--tokenizer", default="models/SmolLM2-135M-Instruct", help="tokenizer of --data")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a prompt with its longer answer")
    parser.add_argument("--peak-seconds", type=float, default=0.5, help="how long to try each shape of matrices")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc(file=sys.stdout)
        sys.exit(1)
