"""The least work of a step, against what torch counts while one is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.workload import work, write_pairs
from lpc_lightning.data import DataError, PreferenceData
from lpc_lightning.data.batching.loading import TrainingBatches
from lpc_lightning.policy import TinyPolicy
from lpc_lightning.types import TokenizedPair

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


def counted(tokens: int) -> float:
    """Floating-point operations of a forward pass of the model over one row, by torch."""
    model = LlamaForCausalLM._from_config(CONFIG, attn_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    return float(counter.get_total_flops())


def test_answer_costs_what_torch_counts(make_pairs: Callable[..., list[TokenizedPair]]) -> None:
    (pair,) = make_pairs([(3, 5, 4)])
    d, layers, visible = CONFIG.hidden_size, CONFIG.num_hidden_layers, 4 * CONFIG.num_attention_heads * 8
    # torch counts all of a row's scores and the head at all of its tokens; we count what is seen and what is scored.
    seen = {n: n * (n + 1) // 2 for n in range(1, 9)}
    forward = counted(8) + layers * visible * (seen[8] - 8 * 8) - 2 * d * 64 * (8 - 5)
    second = counted(7) + layers * visible * (seen[7] - 7 * 7) - 2 * d * 64 * (7 - 4)
    prompt = counted(3) + layers * visible * (seen[3] - 3 * 3) - 2 * d * 64 * 3
    found = work([pair], CONFIG)
    assert (found.tokens, found.answers) == (12, 9)
    assert found.forward_flops == pytest.approx(forward + second - prompt)


def test_the_pairs_are_those_that_our_loader_draws(tmp_path: Path) -> None:
    spec = TinyPolicy()
    folder = tmp_path / "model"
    spec.build().causal_lm.save_pretrained(folder)
    spec.load_tokenizer().save_pretrained(folder)
    rows = [{"id": str(n), "prompt": f"say {n}", "chosen": "yes " * n, "rejected": "no"} for n in range(1, 10)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data: dict[str, Any] = {"path": str(path), "batch_size": 3, "test_split": None, "validation_share": 0.0}
    data["cache_dir"] = str(tmp_path)
    write_pairs(str(folder), data, 7, 2, tmp_path / "out.jsonl")
    steps = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    module = PreferenceData(**data)
    store = module.load("train", spec.load_tokenizer())
    assert store is not None
    expected = [[store[n] for n in batch] for batch in TrainingBatches(store, 3, 7)][:2]
    assert [[pair["id"] for pair in step["pairs"]] for step in steps] == [[p.id for p in batch] for batch in expected]
    assert steps[0]["pairs"][0]["chosen_ids"] == expected[0][0].chosen_ids
    with pytest.raises(DataError, match=r"found 9 pairs to train on, expected 4 batches of 3\. Take fewer steps"):
        write_pairs(str(folder), data, 7, 4, tmp_path / "out.jsonl")
