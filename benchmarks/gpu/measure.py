"""One case: its step times, rates, memory and padding."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.gpu import ours, trl_side
from benchmarks.gpu.cases import Case
from benchmarks.gpu.lengths import FITTED, Lengths
from benchmarks.gpu.models import SHAPES, config_of, tokenizer_of
from benchmarks.gpu.pairs import RandomTokens
from benchmarks.workload import work
from lpc_lightning.types import TokenizedPair


class Bench:
    """What all cases share: the device, its peak and the lengths of the pairs."""

    def __init__(self, device: str, peak: float, scratch: Path, lengths: Lengths | None = None) -> None:
        """Keep the settings.

        Args:
            device: `cpu` or `cuda`.
            peak: Fastest bfloat16 product in floating-point operations a second.
            scratch: Folder for caches, runs and lengths.
            lengths: Of all pairs; None draws them for each data set.
        """
        self.device, self.peak, self.scratch, self.lengths = device, peak, scratch, lengths
        self._first: dict[tuple[Path, int], list[str]] = {}
        """Ids of the first batch that our side trained on, by lengths file and batch size."""

    def lengths_file(self, case: Case) -> Path:
        """Write the lengths of a case's pairs, one batch a step, and return the file.

        Cases of the same data read the same lengths from the start.
        """
        count = case.steps * case.pairs
        if self.lengths is None:
            most = SHAPES[case.shape]["max_position_embeddings"]
            drawn = FITTED[case.data].draw(count)
            lengths = [tuple(min(length, most // 2 - 1) for length in pair) for pair in drawn]
        else:
            lengths = [self.lengths[number % len(self.lengths)] for number in range(count)]
        path = self.scratch / f"lengths-{case.shape}-{case.data}-{count}.json"
        path.write_text(json.dumps(lengths))
        return path

    def pairs(self, case: Case) -> dict[str, TokenizedPair]:
        """Return all pairs of a case by id, in shuffled order."""
        file = self.lengths_file(case)
        vocabulary = SHAPES[case.shape]["vocab_size"]
        data = RandomTokens(str(file), vocabulary, batch_size=case.pairs, cache_dir=str(self.scratch))
        store = data.load("train", tokenizer_of())
        assert store is not None
        shuffled = [store[index] for batch in data.training_batches(store, ours.SEED) for index in batch]
        return {pair.id: pair for pair in shuffled}

    def trl_batches(self, case: Case) -> list[list[TokenizedPair]]:
        """Return the pairs of each step of TRL: our first batch, where it is known, then the others, shuffled.

        Both sides train on the same pairs. Our loader may choose which of them share a batch; TRL draws at random.
        """
        pairs = self.pairs(case)
        first = self._first.get((self.lengths_file(case), case.pairs), [])
        ids = [*first, *(each for each in pairs if each not in first)]
        return [[pairs[each] for each in ids[start : start + case.pairs]] for start in range(0, len(ids), case.pairs)]

    def run(self, case: Case) -> dict[str, Any]:
        """Train one case and return its numbers."""
        before = _allocated(self.device)
        counters.clear()
        shapes: list[tuple[int, ...]]
        if case.side == "TRL":
            batches = self.trl_batches(case)
            times, reference = trl_side.train(case, batches, self.scratch, self.device)
            clock, first = times.clock, times.first
            shapes = [padded_shape(batch) for batch in batches]
            losses = None
        else:
            recorder = ours.fit(case, self.lengths_file(case), self.scratch, self.device)
            clock, first, shapes = recorder.clock, recorder.first, recorder.shapes
            reference = float(recorder.reference["seconds"])
            losses = [each.float().tolist() for each in recorder.losses]
            batches = _batches_of(recorder.pairs, self.pairs(case))
            self._first[self.lengths_file(case), case.pairs] = recorder.pairs[0]
        return {
            "case": asdict(case),
            "method": case.method,
            "work": case.work,
            **rates(case, clock.seconds(), batches, self.peak),
            **shape_costs(clock.host, shapes, batches),
            "peak_gib": _peak(self.device),
            "start_gib": before,
            "reference_s": reference,
            "first_step": {name: first.get(name, first.get(f"train/{name}")) for name in FIRST},
            "first_pairs": [pair.id for pair in batches[0]],
            "losses": losses,
            "graphs": counters["stats"]["unique_graphs"],
            "graph_breaks": dict(counters["graph_break"]),
        }


FIRST = ("loss", "logps/chosen", "logps/rejected")
"""Metrics of the first step that both sides log."""


def rates(case: Case, seconds: Sequence[float], batches: list[list[TokenizedPair]], peak: float) -> dict[str, Any]:
    """Return medians and means over the steps after the warm-up.

    Args:
        case: The case.
        seconds: Of each step that was taken.
        batches: The pairs of each step.
        peak: Floating-point operations a second that count as 1.
    """
    config = config_of(case.shape)
    works = [work(batch, config) for batch in batches]
    # A run that was stopped early keeps its last half.
    warmup = min(case.warmup, len(seconds) // 2)
    steady = list(zip(seconds, works, strict=False))[warmup:]
    median = statistics.median(second for second, _ in steady)
    mean = sum(second for second, _ in steady) / len(steady)
    # Forward once and backward twice; the reference is not in the step.
    flops = [3 * each.forward_flops / second for second, each in steady]
    return {
        "steps": len(seconds),
        "median_s": median,
        "mean_s": mean,
        "slowest_s": max(second for second, _ in steady),
        "pairs_per_s": case.pairs / median,
        "pairs_per_s_mean": case.pairs / mean,
        "tokens_per_s": statistics.median(each.tokens / second for second, each in steady),
        "tokens": statistics.mean(each.tokens for _, each in steady),
        "mfu": statistics.median(flops) / peak if peak else None,
        "step_s": list(seconds),
    }


def shape_costs(
    host: Sequence[float], shapes: Sequence[tuple[int, ...]], batches: list[list[TokenizedPair]]
) -> dict[str, Any]:
    """Return the distinct shapes, what the first step of each took on the host, and the padding.

    Args:
        host: The host's clock before the first step and after each.
        shapes: (rows, row width, ...) of each batch.
        batches: The pairs of each step.
    """
    first: dict[str, float] = {}
    for number, (start, end) in enumerate(pairwise(host)):
        first.setdefault("x".join(map(str, shapes[number])), end - start)
    taken = len(host) - 1
    computed = sum(shape[0] * shape[1] for shape in shapes[:taken])
    least = sum(_tokens(pair) for batch in batches[:taken] for pair in batch)
    return {"shapes": len(first), "first_of_shape_s": first, "padding": 1 - least / computed}


def padded_shape(batch: list[TokenizedPair]) -> tuple[int, int]:
    """Return rows and width of a batch with one row for each sequence, as TRL pads it."""
    longest = max(len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in batch)
    return 2 * len(batch), longest


def _tokens(pair: TokenizedPair) -> int:
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def _batches_of(ids: list[list[str]], pairs: dict[str, TokenizedPair]) -> list[list[TokenizedPair]]:
    """Return the pairs of each step that our side took.

    Raises:
        RuntimeError: A pair came twice, so that the sides did not train on the same pairs.
    """
    taken = [each for batch in ids for each in batch]
    if len(set(taken)) < len(taken):
        raise RuntimeError(f"ours: found {len(taken)} pairs in {len(ids)} steps, expected each of them once.")
    return [[pairs[each] for each in batch] for batch in ids]


def _allocated(device: str) -> float | None:
    return torch.cuda.memory_allocated() / 2**30 if device == "cuda" else None


def _peak(device: str) -> float | None:
    """Return the most memory taken from the driver. It includes what CUDA graphs keep for their next replay."""
    return torch.cuda.max_memory_reserved() / 2**30 if device == "cuda" else None
