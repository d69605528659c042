"""Tests of batches with several pairs of one prompt."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lpc_lightning.algorithms import DPO
from lpc_lightning.data import BatchOrder, ByAnnotator, ByPrompt, PreferenceData
from lpc_lightning.data.batching.loading import TrainingBatches, next_to_each_other
from tests.fixtures.ordered_pairs import PairsToOrder


def epoch_of(order: ByPrompt | None, prompts: list[int], batch_size: int, devices: int = 1) -> list[list[int]]:
    plans = [TrainingBatches(PairsToOrder(prompts=prompts), batch_size, 5, r, devices, order) for r in range(devices)]
    return [batch for plan in plans for batch in plan]


@pytest.mark.parametrize("devices", [1, 2])
def test_rankings_of_four_answers_are_in_one_batch(devices: int) -> None:
    prompts = [number % 20 for number in range(120)]  # six pairs each
    batches = epoch_of(ByPrompt(6), prompts, 12, devices)
    assert sorted(pair for batch in batches for pair in batch) == list(range(120))
    for batch in batches:
        assert sorted(Counter(prompts[pair] for pair in batch).values()) == [6, 6]


def test_null_fills_batches_with_one_prompt() -> None:
    prompts = [0] * 10 + [1] * 9 + [*range(2, 7)]
    batches = epoch_of(ByPrompt(), prompts, 4)
    counts = [max(Counter(prompts[pair] for pair in batch).values()) for batch in batches]
    assert sorted(counts)[-4:] == [4, 4, 4, 4], "two batches of each of the two"
    plain = epoch_of(None, prompts, 4)
    assert sum(max(Counter(prompts[pair] for pair in batch).values()) for batch in plain) < sum(counts)


def test_run_longer_than_a_batch() -> None:
    prompts = [0] * 8 + [1] * 8
    assert {len({prompts[pair] for pair in batch}) for batch in epoch_of(ByPrompt(6), prompts, 4)} == {1}


def test_pairs_per_prompt_below_one() -> None:
    with pytest.raises(ValueError, match=r"data\.batch_order\.pairs_per_prompt: found 0, expected at least 1"):
        ByPrompt(0)


def test_next_to_each_other() -> None:
    assert next_to_each_other(["b", "a", "b", "c", "a", "b"]) == [0, 2, 5, 1, 4, 3]
    assert next_to_each_other(range(5)) == [0, 1, 2, 3, 4]


ANSWERS = ("Yes.", "No, never.", "Perhaps.", "It depends on the case.")


@pytest.mark.parametrize("order", [None, ByPrompt(6), ByAnnotator(2)], ids=str)
def test_evaluation_reads_a_prompt_once(
    order: BatchOrder | None, tmp_path: Path, write_rows: Any, fit_run: Any, small_policy: Any
) -> None:
    """Not with pairs of annotators together: their evidence is that of the batches in the order of the data."""
    # The six pairs of four answers to six questions. Those of a question are not next to each other.
    pairs = enumerate(itertools.combinations(ANSWERS, 2))
    rows = [
        {"prompt": f"{{}} question {number}?", "chosen": chosen, "rejected": rejected, "annotator": f"a{place % 2}"}
        for place, (chosen, rejected) in pairs
        for number in range(6)
    ]
    files = {
        stage: str(write_rows([row | {"prompt": row["prompt"].format(stage)} for row in rows], f"{stage}.jsonl"))
        for stage in ("train", "validation")
    }
    data = PreferenceData(files, batch_size=6, batch_order=order, cache_dir=str(tmp_path / "cache"))
    fit_run(DPO(policy=small_policy()), data, max_epochs=1, limit_val_batches=2)
    loader: Any = data.val_dataloader()
    batches = list(loader)
    store = data.pairs["validation"]
    together = not isinstance(order, ByAnnotator)
    assert [len(set(batch.prompts)) for batch in batches] == [1 if together else 6] * 6
    assert sorted(name for batch in batches for name in batch.ids) == sorted(pair.id for pair in store)
    read = {name for batch in batches[:2] for name in batch.ids}
    assert {store[index].id for index in data.reads("validation")} == read
    if together:
        pair = store[0]
        answers = {tuple(ids) for each in store for ids in (each.chosen_ids, each.rejected_ids)}
        assert batches[0].tokens == len(pair.prompt_ids) + sum(map(len, answers))
