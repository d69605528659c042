"""The memory model's formula against what real training steps of two small models take up."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.live_memory import peak_bytes
from benchmarks.memory_model import LLAMA_3_8B, Architecture, Machine, Step, cases, chunk, memory, table
from lpc_lightning.algorithms import DPO
from lpc_lightning.data import SyntheticPreferences
from lpc_lightning.policy import TinyPolicy, logprobs
from lpc_lightning.reference import pair_pass

MODELS: dict[str, dict[str, Any]] = {
    "wide, large vocabulary": {
        "width": 192,
        "layers": 3,
        "heads": 4,
        "options": {"vocab_size": 8192, "num_key_value_heads": 2, "intermediate_size": 512},
    },
    "deep": {
        "width": 128,
        "layers": 10,
        "heads": 4,
        "options": {"num_key_value_heads": 4, "intermediate_size": 448, "tie_word_embeddings": True},
    },
}
ROWS = 512
"""Tokens of a row, and of a batch that a cached reference is worked out with."""
WIDE, DEEP = MODELS
CASES = [
    (WIDE, "live", True, True, "bf16-mixed"),
    (WIDE, "live", False, True, "32-true"),
    (WIDE, "cached", True, False, "bf16-mixed"),
    (WIDE, "cached", False, False, "32-true"),
    (DEEP, "live", True, False, "32-true"),
    (DEEP, "live", False, False, "bf16-mixed"),
    (DEEP, "cached", True, True, "32-true"),
    (DEEP, "cached", False, True, "bf16-mixed"),
]
"""Model, reference, chunks, checkpointing, precision: of any two of these, every pair of values."""


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


class Largest(Callback):
    """The batch that reads most."""

    tokens = answers = row = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        rows, width = batch.input_ids.shape
        if rows * width > self.tokens:
            self.tokens, self.row, self.answers = rows * width, width, len(batch.read_at)


def test_the_count_of_live_bytes() -> None:
    def run() -> None:
        first = torch.zeros(1000, dtype=torch.float64)  # 8000
        second = torch.cat([first, first])  # 16000
        del first
        torch.zeros(10, dtype=torch.uint8)
        del second
        torch.ones(500, dtype=torch.float32)

    assert 24_000 <= peak_bytes(run) <= 24_100


def test_the_cases_hold_every_pair_of_values() -> None:
    for columns in combinations(zip(*CASES, strict=True), 2):
        assert len(set(zip(*columns, strict=True))) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("model", "reference", "chunked", "checkpointing", "precision"), CASES)
def test_the_formula_is_within_15_percent(
    model: str,
    reference: Any,
    chunked: bool,
    checkpointing: bool,
    precision: Any,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if chunked:
        monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 2**19)
    monkeypatch.setattr(pair_pass, "BATCH_TOKENS", ROWS)
    policy = TinyPolicy(**MODELS[model], attention="sdpa", gradient_checkpointing=checkpointing)
    largest = Largest()
    data = SyntheticPreferences(
        train_pairs=24, validation_pairs=2, test_pairs=2, batch_size=8, row_tokens=ROWS, cache_dir=str(cache_dir)
    )

    def train() -> None:
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(
            accelerator="cpu",
            precision=precision,
            max_steps=3,
            limit_val_batches=0,
            callbacks=[largest],
            enable_checkpointing=False,
            **quiet,
        )
        module = DPO(
            policy=policy,
            reference=reference,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
        )
        trainer.fit(module, datamodule=data)

    measured = peak_bytes(train)
    step = Step(
        tokens=largest.tokens,
        answers=largest.answers,
        row=largest.row,
        precision=precision,
        checkpointing=checkpointing,
        chunked=chunked,
        live_reference=reference == "live",
    )
    parts = memory(Architecture.of(policy.load_config()), step)
    assert parts.total == pytest.approx(measured, rel=0.15), parts


def test_cases_have_the_chunks_of_a_gpu() -> None:
    """2^28 logits of 128,256 are 2,093 tokens: 2,600 answers are two equal chunks, 10,400 are five."""
    chunks = {
        step.answers: chunk(LLAMA_3_8B, step) for rows in cases().values() for step in rows.values() if step.chunked
    }
    assert chunks == {2600: 1300, 10400: 2080}


def test_weights_are_counted_as_published() -> None:
    assert LLAMA_3_8B.weights == 8_030_261_248


def test_the_documentation_holds_the_tables_as_printed() -> None:
    message = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
    for heading, rows in cases().items():
        assert f"**{heading}**\n\n{table(rows, LLAMA_3_8B, Machine())}\n" in message


def test_documentation_states_the_longest_batch() -> None:
    """SmolLM2-135M, whose sizes are in its config.json."""
    smollm2 = Architecture(49152, 576, 30, 9, 3, 64, 1536, tied=True)
    step = "Step(tokens=3312, answers=2940, row=0, live_reference=False)"
    message = " ".join((Path(__file__).parents[2] / "docs" / "performance.md").read_text().split())
    found = memory(smollm2, Step(tokens=3312, answers=2940, row=0, live_reference=False)).total / 2**30
    assert f"{found:.1f} GiB by the memory model" in message
    assert step in message
