"""What batches of one prompt save: passes and steps of pairs in random order, and with those of a prompt together.

    python -m benchmarks.shared_prompts --data $LPC_DATA_DIR/preferences/ukp_convarg_crowdsample.jsonl
    python -m benchmarks.shared_prompts --data $LPC_DATA_DIR/preferences/polis_votes.jsonl --pairs-per-annotator 8

A prompt and an answer that stand in several pairs of a batch are read once. Batches of both orders are taken in turn.
The second command compares batches of annotators, eight pairs each: of any, and of those who have the same prompts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from benchmarks.batches import batches_of, step_options
from benchmarks.latent_cost import Stepper
from lpc_lightning.data import BatchOrder, ByAnnotator, ByPrompt
from lpc_lightning.policy import PretrainedPolicy
from lpc_lightning.types import PreferenceBatch

RANDOM, TOGETHER = "random", "by prompt"


def main() -> None:
    """Measure and print a table."""
    parser = step_options(__doc__, steps=6, batch_size=8)
    runs = parser.add_mutually_exclusive_group()
    runs.add_argument("--pairs-per-prompt", type=int, help="most pairs of a prompt in a run; default: a batch")
    runs.add_argument("--pairs-per-annotator", type=int, help="pairs of an annotator in a run, in both orders")
    options = parser.parse_args()
    policy = PretrainedPolicy(options.model)
    orders: dict[str, BatchOrder | None] = {RANDOM: None, TOGETHER: ByPrompt(options.pairs_per_prompt)}
    if run := options.pairs_per_annotator:
        orders = {RANDOM: ByAnnotator(run), TOGETHER: ByAnnotator(run, shared_prompts=True)}
    batches = {name: batches_of(options, policy, order) for name, order in orders.items()}
    stepper = Stepper(policy, None)
    passes: dict[str, list[float]] = {name: [] for name in orders}
    steps: dict[str, list[float]] = {name: [] for name in orders}
    for both in zip(*batches.values(), strict=True):
        for name, batch in zip(orders, both, strict=True):
            start = time.perf_counter()
            with torch.no_grad():
                stepper.module.policy(batch).logps()
            passed = time.perf_counter()
            stepper.step(batch)
            passes[name].append(passed - start)
            steps[name].append(time.perf_counter() - passed)
    print("| pairs of a batch | tokens/pair | pass, s/pair | ratio | step, s/pair | ratio |")
    print("|---|---:|---:|---:|---:|---:|")
    print(*rows(batches, passes, steps), sep="\n", flush=True)


def rows(
    batches: dict[str, list[PreferenceBatch]], passes: dict[str, list[float]], steps: dict[str, list[float]]
) -> list[str]:
    """Means over the batches but the first, which differ in length, and their ratios to those of random order."""

    def per_pair(values: Sequence[float], name: str) -> float:
        return sum(values[1:]) / sum(batch.pairs for batch in batches[name][1:])

    lines = []
    for name in batches:
        tokens = per_pair([batch.tokens for batch in batches[name]], name)
        cells = [f"{tokens:.0f}"]
        for taken in (passes, steps):
            seconds = {order: per_pair(values, order) for order, values in taken.items()}
            cells += [f"{seconds[name]:.3f}", f"{seconds[name] / seconds[RANDOM]:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
