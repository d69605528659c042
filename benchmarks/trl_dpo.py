"""TRL's side: its `DPOTrainer` as its users run it, on our tokens in our order."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.recording import Recording


class TokenisedDPOTrainer(DPOTrainer):
    """Takes the pairs as token ids, so that both sides train on the same tokens, and times the reference's own pass.

    TRL's own tokenization would put a newline behind each answer where the chat template writes one there.
    """

    precompute_seconds = 0.0

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, *arguments: Any, **options: Any) -> Dataset:
        start = time.perf_counter()
        logps = super()._precompute_ref_logps(*arguments, **options)
        self.precompute_seconds += time.perf_counter() - start
        return logps


class Recorder(TrainerCallback):
    """Fills the recording from what the trainer logs."""

    def __init__(self, pairs: list[list[str]]) -> None:
        self.recording, self._pairs = Recording(), pairs

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Record the step, which has one log."""
        if logs and "loss" in logs:
            step = len(self.recording.loss)
            self.recording.end_step(float(logs["loss"]), float(logs["rewards/margins"]), self._pairs[step])


def dpo_config(folder: str, pairs: int, steps: int, *, mixed: bool, cpu: bool, **settings: Any) -> DPOConfig:
    """Return TRL's settings for the benchmark: fused AdamW, cosine from the first step, nothing saved or reported.

    Args:
        folder: Output folder.
        pairs: Pairs in a batch.
        steps: Optimizer steps.
        mixed: True computes in bfloat16 under autocast.
        cpu: True trains on the CPU.
        settings: Further fields of `DPOConfig`. `checkpointing` is activation checkpointing, whose field has one name
            until transformers 5.22 and another one since.
    """
    name = "activation_checkpointing"
    name = name if name in DPOConfig.__dataclass_fields__ else "gradient_checkpointing"
    fixed: dict[str, Any] = {
        "per_device_train_batch_size": pairs,
        "max_steps": steps,
        "max_length": None,  # the pairs are cut already
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "optim": "adamw_torch_fused",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": mixed,
        name: settings.pop("checkpointing", False),
        "train_sampling_strategy": "sequential",
        "use_cpu": cpu,
        "dataloader_pin_memory": not cpu,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return DPOConfig(folder, **(fixed | settings))


def dataset_of(steps: list[list[dict[str, Any]]]) -> Dataset:
    """Return the pairs of all steps, in order, as TRL's token columns."""
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_list([{column: pair[column] for column in columns} for step in steps for pair in step])


def main() -> None:
    """Train and write the recording."""
    options = _options()
    steps = [json.loads(line)["pairs"] for line in options.pairs.read_text().splitlines()]
    weights = torch.bfloat16 if options.precision == "bf16-true" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        config = dpo_config(
            folder,
            pairs=len(steps[0]),
            steps=len(steps),
            mixed=options.precision == "bf16-mixed",
            cpu=options.device == "cpu",
            beta=options.beta,
            learning_rate=options.lr,
            logging_steps=1,
            use_liger_kernel=options.liger,
            precompute_ref_log_probs=options.precompute,
        )
        policy = AutoModelForCausalLM.from_pretrained(options.model, dtype=weights)
        # With precomputed log-probabilities TRL needs no second model: the policy itself is run before training.
        reference = None if options.precompute else AutoModelForCausalLM.from_pretrained(options.model, dtype=weights)
        rows = dataset_of(steps)
        recorder = Recorder([[pair["id"] for pair in step] for step in steps])
        trainer = TokenisedDPOTrainer(
            policy,
            reference,
            config,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(options.model),
            callbacks=[recorder],
        )
        check_tokens(trainer, steps)
        trainer.train()
    if options.precompute:
        passed = {"in_step": False, "pairs": len(rows), "seconds": trainer.precompute_seconds}
        recorder.recording.reference = passed
    recorder.recording.write(options.output)


def check_tokens(trainer: DPOTrainer, steps: list[list[dict[str, Any]]]) -> None:
    """Compare what the trainer's loader yields with the pairs, batch by batch.

    Raises:
        RuntimeError: They differ.
    """
    for number, (batch, step) in enumerate(zip(trainer.get_train_dataloader(), steps, strict=True)):
        mask = batch["attention_mask"].bool()
        tokens = [row[real].tolist() for row, real in zip(batch["input_ids"], mask, strict=True)]
        expected = [pair["prompt_ids"] + pair[side] for side in ("chosen_ids", "rejected_ids") for pair in step]
        answers = [len(pair[side]) for side in ("chosen_ids", "rejected_ids") for pair in step]
        if tokens != expected or batch["completion_mask"].sum(1).tolist() != answers:
            raise RuntimeError(
                f"step {number}: TRL's batch does not hold our tokens in our order; nothing was measured."
            )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=Path, required=True, help="written by benchmarks.workload")
    parser.add_argument("--output", required=True)
    parser.add_argument("--precision", choices=["bf16-mixed", "bf16-true", "32-true"], required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--beta", type=float, required=True)
    parser.add_argument("--liger", action="store_true", help="Liger's kernels, for GPUs")
    parser.add_argument("--precompute", action="store_true", help="the reference's log-probabilities before training")
    return parser.parse_args()


if __name__ == "__main__":
    main()
