"""Command line of the package: `extract`, then `analyse`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.code_finding.assignment import score_assignment
from benchmarks.code_finding.extraction import extract
from benchmarks.code_finding.known import rows_by_name, score_known
from benchmarks.code_finding.mixture import COMPONENTS
from benchmarks.code_finding.pairs import Pairs
from benchmarks.code_finding.scores import Scores, write_rows
from benchmarks.code_finding.unknown import KNOWN, score_unknown, simulate_annotators, split_annotators
from lpc_lightning.cli.machine import default_precision
from lpc_lightning.data import DataError
from lpc_lightning.data.sources.columns import Columns
from lpc_lightning.evaluation.statistics.seeds import estimate
from lpc_lightning.policy import PretrainedPolicy


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    add_extract(commands)
    add_analyse(commands)
    options = parser.parse_args()
    options.run(options)


def add_extract(commands: argparse._SubParsersAction) -> None:
    """Add the command that makes the pass."""
    parser = commands.add_parser("extract", help="one pass over the pairs of a file")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="folder of the policy")
    parser.add_argument("--data", type=Path, required=True, help="file of preference pairs with train and test split")
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 18, 24, 30], help="layers of mean states")
    parser.add_argument("--factor", default="factor", help="column of the reader or group, for inspection")
    parser.add_argument("--group", help="entry that divides the factors further, such as meta.opinion_group")
    parser.add_argument("--train-prompts", type=int, help="number of training prompts, drawn by seed 0; default: all")
    parser.add_argument(
        "--precision",
        default=default_precision("cpu"),
        help="precision of the pass; default: bf16-mixed, on a CPU without AVX512-BF16 and AMX 32-true",
    )
    parser.add_argument("--out", type=Path, required=True, help="npz file to write")
    parser.set_defaults(run=_extract)


def add_analyse(commands: argparse._SubParsersAction) -> None:
    """Add the command that writes the tables."""
    parser = commands.add_parser("analyse", help="tables from the values of extract, as CSV files")
    parser.add_argument("values", type=Path, help="npz file of extract")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="tables to write; default: all")
    parser.add_argument("--layer", type=int, default=18, help="layer whose states find groups and predict readers")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256], help="pairs of a reader")
    parser.add_argument("--prompts", type=int, nargs="+", default=[30, 100], help="prompts that assignment reads")
    parser.add_argument("--codes", type=int, nargs="+", default=[4], help="numbers of codes")
    parser.add_argument(
        "--pairs-each", type=int, help="pairs of a simulated annotator; default: the annotators of the data"
    )
    parser.add_argument(
        "--labels", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16], help="known labels of an annotator"
    )
    parser.add_argument("--components", type=int, default=COMPONENTS, help="components that groups are found in")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", required=True, help="start of the names of the CSV files")
    parser.set_defaults(run=_analyse)


def _analyse(options: argparse.Namespace) -> None:
    pairs = Pairs.load(options.values)
    if options.layer not in pairs.mean:
        sys.exit(f"--layer: found {options.layer}, expected a layer of {options.values}: {sorted(pairs.mean)}.")
    for part in options.parts:
        PARTS[part](pairs, options)


def _known(pairs: Pairs, options: argparse.Namespace) -> None:
    scores = score_known(pairs, rows_by_name(list(pairs.mean)), options.sizes, options.seeds)
    scores.write(Path(f"{options.out}_known.csv"), "gradient", "pairs")


def _unknown(pairs: Pairs, options: argparse.Namespace) -> None:
    if options.pairs_each is None:
        splits = [split_annotators(pairs, seed) for seed in options.seeds]
    else:
        splits = [simulate_annotators(pairs, options.pairs_each, seed) for seed in options.seeds]
    result = score_unknown(
        splits, rows_by_name([options.layer]), options.codes, options.labels, options.seeds, options.components
    )
    for method in ("EM", "clusters"):
        for count in options.codes:
            arms = [f"{name}, {method}, {count}" for name in rows_by_name([options.layer])]
            part = Scores(result.scores.prompts, {key: v for key, v in result.scores.correct.items() if key[0] in arms})
            part.write(Path(f"{options.out}_{method.lower()}_{count}.csv"), arms[0], "labels")
    references = {key: v for key, v in result.scores.correct.items() if key[0] in (KNOWN, "own majority")}
    Scores(result.scores.prompts, references).write(Path(f"{options.out}_references.csv"), "", "labels")
    estimates = {arm: estimate(values) for arm, values in result.information.items()}
    rows = [[arm, *(f"{value:.4f}" for value in (e.mean, e.low, e.high)), e.n] for arm, e in estimates.items()]
    write_rows(Path(f"{options.out}_groups.csv"), ["arm", "nmi", "low", "high", "seeds"], rows)


def _assignment(pairs: Pairs, options: argparse.Namespace) -> None:
    scores = score_assignment(pairs, [options.layer], options.prompts, options.seeds)
    scores.write(Path(f"{options.out}_assignment.csv"), "last states", "prompts")


PARTS: dict[str, Callable[[Pairs, argparse.Namespace], None]] = {
    "known": _known,
    "unknown": _unknown,
    "assignment": _assignment,
}
"""Tables by name."""


def _extract(options: argparse.Namespace) -> None:
    try:
        pairs = extract(
            options.data,
            PretrainedPolicy(options.model),
            options.layers,
            Columns(factor=options.factor),
            options.train_prompts,
            options.group,
            options.precision,
        )
    except DataError as error:
        sys.exit(str(error))
    pairs.save(options.out)
    print(f"{options.out}: {(pairs.part == 'train').sum()} training pairs, {(pairs.part == 'test').sum()} test pairs")


if __name__ == "__main__":
    main()
