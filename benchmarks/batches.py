"""Batches of a file's pairs, for measurements without a trainer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from lpc_lightning.data import BatchOrder, DataError, PreferenceData
from lpc_lightning.data.batching.layouts import SharedPrefixLayout
from lpc_lightning.data.batching.loading import TrainingBatches
from lpc_lightning.policy import PolicySpec
from lpc_lightning.types import PreferenceBatch


def step_options(description: str | None, steps: int, batch_size: int) -> argparse.ArgumentParser:
    """Make a parser with the policy, the pairs and the number of steps. See `batches_of` for the batches.

    Args:
        description: Docstring of the benchmark.
        steps: Default number of steps that count.
        batch_size: Default number of pairs in a batch.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="folder of the policy")
    parser.add_argument("--data", type=Path, required=True, help="file of preference pairs")
    parser.add_argument("--steps", type=int, default=steps, help="steps that count, after one that does not")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="pairs in a batch")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of prompt and answer; answers are cut")
    return parser


def batches_of(
    options: argparse.Namespace, policy: PolicySpec, order: BatchOrder | None = None
) -> list[PreferenceBatch]:
    """Return one batch for each step, and one before them. End the program if the pairs cannot be read."""
    try:
        return first_batches(options.data, policy, options.steps + 1, options.batch_size, options.max_length, order)
    except DataError as error:
        sys.exit(str(error))


def first_batches(
    data: Path,
    policy: PolicySpec,
    count: int,
    batch_size: int = 4,
    max_length: int = 512,
    order: BatchOrder | None = None,
) -> list[PreferenceBatch]:
    """Return the first batches that a fit would train on. The reference's log-probabilities are 0.

    Args:
        data: File of preference pairs.
        policy: The policy, whose tokenizer is used.
        count: Number of batches.
        batch_size: Pairs in a batch.
        max_length: Tokens of prompt and answer; answers are cut.
        order: Order of the pairs. None: `Shuffled`.

    Raises:
        DataError: Unreadable data, or too few pairs.
    """
    source = PreferenceData(
        str(data),
        batch_size=batch_size,
        max_length=max_length,
        too_long="truncate_answer",
        validation_share=0.0,
        test_split=None,
    )
    pairs = source.load("train", policy.load_tokenizer())
    assert pairs is not None
    plan = list(TrainingBatches(pairs, batch_size, 0, order=order))[:count]
    if len(plan) < count:
        raise DataError(
            f"{data}: found {len(pairs)} pairs to train on, expected {count} batches of "
            f"{batch_size}. Take fewer or smaller batches, or a larger file."
        )
    pairs = pairs.with_reference(np.zeros((len(pairs), 2)))  # the values do not change the time of a step
    layout = SharedPrefixLayout(0, None)
    return [layout([pairs[place] for place in places]) for places in plan]
