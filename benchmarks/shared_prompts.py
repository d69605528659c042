"""What batches of one prompt save: passes and steps of pairs in random order, and with those of a prompt together.

    python -m benchmarks.shared_prompts --data $LPC_DATA_DIR/preferences/ukp_convarg_crowdsample.jsonl

A prompt and an answer that stand in several pairs of a batch are read once. Batches of both orders are taken in turn.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.batches import first_batches
from benchmarks.latent_cost import Stepper
from lpc_lightning.data import ByPrompt, DataError
from lpc_lightning.policy import PretrainedPolicy
from lpc_lightning.types import PreferenceBatch

RANDOM, TOGETHER = "random", "by prompt"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="folder of the policy")
    parser.add_argument("--data", type=Path, required=True, help="file of preference pairs")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs-per-prompt", type=int, help="most pairs of a prompt in a run; default: a batch")
    parser.add_argument("--max-length", type=int, default=512)
    options = parser.parse_args()
    policy = PretrainedPolicy(options.model)
    orders = {RANDOM: None, TOGETHER: ByPrompt(options.pairs_per_prompt)}
    size = policy, options.steps + 1, options.batch_size, options.max_length  # a step before those that count
    try:
        batches = {name: first_batches(options.data, *size, order) for name, order in orders.items()}
    except DataError as error:
        sys.exit(str(error))
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
