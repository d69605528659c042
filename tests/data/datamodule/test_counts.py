"""Tests of the logged counts of pairs: too long, bad, and of each stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lpc_lightning.data import SyntheticPreferences
from lpc_lightning.data.sources.rows import DataError
from tests.data.datamodule.conftest import Fit, Row, row, tiny


def long_rows() -> list[Row]:
    """Return rows with prompts and answers of different lengths."""
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu"
    sizes = [(1, 1, 2), (8, 2, 1), (2, 9, 1), (2, 1, 9), (9, 9, 1), (12, 1, 2), (1, 12, 11)]
    texts = [[" ".join((words * size).split()[: 6 * size]) for size in triple] for triple in sizes]
    return [
        {"prompt": " ".join(reversed(prompt.split())), "chosen": chosen, "rejected": rejected}
        for prompt, chosen, rejected in texts
    ]


def token_counts(rows: list[Row]) -> list[tuple[int, int]]:
    """Count the tokens of each prompt, and of the prompt with its longer answer, from the text of the template."""
    tokenizer = tiny().load_tokenizer()

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    counts = []
    for example in rows:
        prompt = count(f"<|im_start|>user\n{example['prompt']}<|im_end|>\n<|im_start|>assistant\n")
        answers = [count(example[side]) + 1 for side in ("chosen", "rejected")]
        counts.append((prompt, prompt + max(answers)))
    return counts


LIMITS = {"max_length": 90, "max_prompt_length": 60}


def test_too_long_drop_counts_pairs(data: Any, write_rows: Any, tmp_path: Path) -> None:
    counts = token_counts(long_rows())
    prompt = sum(prompt > 60 for prompt, _ in counts)
    pair = sum(prompt <= 60 and whole > 90 for prompt, whole in counts)
    assert prompt
    assert pair
    assert prompt + pair < len(counts)
    run = Fit(tmp_path, data(write_rows(long_rows()), validation_share=0.0, too_long="drop", **LIMITS))
    assert run.metrics == {
        "data/train/read": len(counts),
        "data/train/held_apart": 0,
        "data/train/kept": len(counts) - prompt - pair,
        "data/train/dropped/prompt_longer_than_max_prompt_length": prompt,
        "data/train/dropped/pair_longer_than_max_length": pair,
    }


@pytest.mark.parametrize("too_long", ["truncate_prompt", "truncate_answer"])
def test_too_long_truncate_counts_pairs(too_long: str, data: Any, write_rows: Any, tmp_path: Path) -> None:
    cut = data(write_rows(long_rows()), validation_share=0.0, too_long=too_long, max_length=90)
    metrics = Fit(tmp_path, cut).metrics
    long = [whole > 90 for _, whole in token_counts(long_rows())]
    dropped = sum(value for name, value in metrics.items() if "/dropped/" in name)
    what = too_long.replace("truncate_answer", "truncate_answers").removeprefix("truncate_")
    assert metrics[f"data/train/cut/{what}"] == sum(long) - dropped > 0
    assert metrics["data/train/kept"] == len(long) - dropped == len(cut.pairs["train"])
    for pair in cut.pairs["train"]:
        assert len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) <= 90


def test_too_long_error_names_the_pair(data: Any, write_rows: Any, tmp_path: Path) -> None:
    rows = data(write_rows(long_rows()), validation_share=0.0, too_long="error", **LIMITS)
    prompt, _ = token_counts(long_rows())[1]
    with pytest.raises(DataError, match=rf"Pair 'pairs\.jsonl line 2': .*{prompt} prompt tokens .*max_length=90"):
        Fit(tmp_path, rows)


def faulty_rows() -> list[Any]:
    return [row(0), row(1) | {"chosen": None}, row(2, rejected=" "), row(3, chosen="Bad 3."), "{oops", row(5)]


def test_bad_rows_skip_counts_rows(data: Any, write_rows: Any, tmp_path: Path) -> None:
    run = Fit(tmp_path, data(write_rows(faulty_rows()), validation_share=0.0, bad_rows="skip"))
    kinds = ("missing_answer", "empty_answer", "equal_answers", "invalid_json")
    counts = {"read": 6, "kept": 2, "held_apart": 0} | {f"bad/{kind}": 1 for kind in kinds}
    assert run.metrics == {f"data/train/{name}": count for name, count in counts.items()}
    assert run.trainer.global_step == 1


def test_bad_rows_error_lists_all_rows(data: Any, write_rows: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        Fit(tmp_path, data(write_rows(faulty_rows()), validation_share=0.0))
    text = str(caught.value)
    assert text.startswith("4 rows cannot be used.")
    for number, reason in ((2, "missing answer"), (3, "empty answer"), (4, "equal answers"), (5, "invalid JSON")):
        assert f"{reason}: pairs.jsonl line {number}" in text
    assert "`--data.bad_rows skip`" in text


def test_metrics_have_the_stage_name(tmp_path: Path) -> None:
    made = SyntheticPreferences(train_pairs=6, validation_pairs=3, batch_size=2, cache_dir=str(tmp_path / "cache"))
    metrics = Fit(tmp_path, made).metrics
    assert metrics["data/train/kept"] == 6
    assert metrics["data/validation/kept"] == 3
