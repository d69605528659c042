"""TRL's side at its best: precomputed reference, fused head, the same tokens, weights, order and optimizer."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from benchmarks.gpu.cases import Case
from benchmarks.gpu.clock import StepClock
from benchmarks.gpu.models import config_of, random_model, tokenizer_of
from benchmarks.gpu.ours import BETA, LEARNING_RATE
from benchmarks.trl_dpo import TokenisedDPOTrainer, check_tokens, dataset_of, dpo_config
from lpc_lightning.types import TokenizedPair


class StepTimes(TrainerCallback):
    """Times the steps without waiting for the device, and keeps the first log."""

    def __init__(self, device: str, limit: float) -> None:
        """Keep the settings.

        Args:
            device: `cpu` or `cuda`.
            limit: Seconds after which training stops at the end of a step.
        """
        self.clock, self.limit = StepClock(device), limit
        self.first: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.clock.mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the step."""
        self.clock.mark()
        if self.clock.host[-1] - self.clock.host[0] > self.limit:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Keep what is logged of the first step."""
        self.first = self.first or dict(logs or {})


def train(case: Case, batches: list[list[TokenizedPair]], scratch: Path, device: str) -> tuple[StepTimes, float]:
    """Train and return the step times, and the seconds that the reference took before the first step.

    Args:
        case: What to train.
        batches: The pairs of each step.
        scratch: Folder for the run.
        device: `cpu` or `cuda`.
    """
    # Accelerate keeps the precision of the first run of a process.
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    rows = [[asdict(pair) for pair in batch] for batch in batches]
    config = dpo_config(
        str(scratch / f"trl-{time.time_ns()}"),
        pairs=case.pairs,
        steps=case.steps,
        mixed=case.precision == "bf16-mixed",
        cpu=device == "cpu",
        beta=BETA,
        learning_rate=LEARNING_RATE,
        checkpointing=case.checkpointing,
        precompute_ref_log_probs=True,
        logging_first_step=True,
    )
    dtype = torch.bfloat16 if case.precision == "bf16-true" else torch.float32
    with torch.device(device):
        model = random_model(config_of(case.shape), dtype, seed=0)
    times = StepTimes(device, case.limit)
    trainer = TokenisedDPOTrainer(
        model,
        None,
        config,
        train_dataset=dataset_of(rows),
        processing_class=tokenizer_of(),
        callbacks=[times],
    )
    check_tokens(trainer, rows)
    trainer.train()
    return times, trainer.precompute_seconds
