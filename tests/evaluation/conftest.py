"""Fixtures: small benchmarks with the layout of the real ones, a model for them, and folders of ablations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from lpc_lightning.policy import CausalPolicy, TinyPolicy

BASE = ["--config=base.yaml", "--trainer.max_steps=8"]
"""Arguments of the base of written ablations."""
WORDS = ("stone", "river", "lamp", "garden", "winter", "salt", "paper", "engine", "cloud", "bread", "glass", "horse")


def _arc(name: str, count: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(count):
        text = [f"{WORDS[(number + step) % 12]} {name}{number}" * (1 + step % 2) for step in range(3 + number % 3)]
        labels = list("ABCDE" if number % 2 else "12345")[: len(text)]
        choices = {"text": text, "label": labels}
        question = f"Which {WORDS[number % 12]} is it, {name} {number}?"
        rows.append(
            {
                "id": f"{name}_{number}",
                "question": question,
                "choices": choices,
                "answerKey": labels[number % len(text)],
            }
        )
    return rows


def _gsm8k(name: str, count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"{name}: what is {n} + {n + 1}?", "answer": f"<<{n}+{n + 1}={2 * n + 1}>>.\n#### {2 * n + 1}"}
        for n in range(count)
    ]


def _truthfulqa(count: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(count):
        texts = [f"It is the {WORDS[(number + step) % 12]}." for step in range(4)]
        one, some = [1, 0, 0, 0], [1, int(number % 2), 0, 0]
        rows.append(
            {
                "question": f"What about the {WORDS[number % 12]}?",
                "mc1_targets": {"choices": texts, "labels": one},
                "mc2_targets": {"choices": texts, "labels": some},
            }
        )
    return rows


def _truthfulqa_text(count: int) -> list[dict[str, Any]]:
    return [
        {
            "type": "Adversarial",
            "category": "Misconceptions",
            "question": f"What about the {WORDS[number % 12]}?",
            "best_answer": "Nothing",
            "correct_answers": ["Nothing", f"The {WORDS[number % 12]} is fine."],
            "incorrect_answers": ["It breaks", "It sings."],
            "source": "https://example.org",
        }
        for number in range(count)
    ]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def documents() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The rows of each file, by folder and split."""
    sizes = {"train": 8, "validation": 3, "test": 12}
    return {
        "arc/ARC-Easy": {split: _arc(f"easy {split}", size) for split, size in sizes.items()},
        "arc/ARC-Challenge": {split: _arc(f"hard {split}", size) for split, size in sizes.items()},
        "gsm8k": {split: _gsm8k(split, sizes[split]) for split in ("train", "test")},
        "truthfulqa/multiple_choice": {"validation": _truthfulqa(11)},
        "truthfulqa/generation": {"validation": _truthfulqa_text(5)},
    }


@pytest.fixture
def data_dir(documents: dict[str, dict[str, list[dict[str, Any]]]], tmp_path: Path) -> Path:
    """Folder with all documents."""
    for folder, splits in documents.items():
        for split, rows in splits.items():
            write_rows(tmp_path / "data" / folder / f"{split}.jsonl", rows)
    return tmp_path / "data"


@pytest.fixture
def task_file(tmp_path: Path) -> Callable[..., str]:
    """Function that writes the file of a multiple-choice task, with its data beside it, and returns its path.

    `code` defines `process_results(doc, results)`, which replaces the scores of lm-eval.
    """

    def write(name: str, rows: Sequence[dict[str, Any]], code: str | None = None, **settings: Any) -> str:
        folder = tmp_path / "tasks" / name
        write_rows(folder / "rows.jsonl", rows)
        task: dict[str, Any] = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices.text}}",
            "doc_to_target": "{{choices.label.index(answerKey)}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 7},
        }
        text = yaml.safe_dump(task | settings, sort_keys=False)
        if code is not None:
            (folder / "own.py").write_text(code)
            text += "process_results: !function own.process_results\n"
        (folder / f"{name}.yaml").write_text(text)
        return str(folder / f"{name}.yaml")

    return write


@pytest.fixture(scope="session")
def loud_policy(perturb: Callable[..., None]) -> tuple[CausalPolicy, PreTrainedTokenizerBase]:
    """A tiny policy with large weights. Under a new one, the likelihood of a choice depends mainly on its length."""
    spec = TinyPolicy(width=16, layers=1, heads=2, context=1024)
    policy = spec.build()
    perturb(policy, deviation=0.6)
    return policy.eval(), spec.load_tokenizer()


@pytest.fixture
def stock(loud_policy: tuple[CausalPolicy, PreTrainedTokenizerBase]) -> HFLM:
    """lm-eval's own HFLM with the same policy."""
    policy, tokenizer = loud_policy
    return HFLM(pretrained=policy.causal_lm, tokenizer=tokenizer, batch_size=4)


@pytest.fixture(scope="session")
def write_ablation(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function that writes the folder of an ablation as `lpc-lightning ablate` does, and returns its path.

    `value` takes a cell's values in order and its seed. It returns `val/rewards/accuracies`, or a text: the error of a
    failed cell, or None: the cell was never started. The metric rises to the value over four validations, and the
    training loss falls from 0.7 over eight steps. Each seed has prompts of its own.
    """

    def write(
        axes: Mapping[str, Sequence[Any]],
        seeds: Sequence[int | None],
        value: Callable[..., float | str | None],
        name: str = "trial",
    ) -> Path:
        folder = tmp_path_factory.mktemp("ablation") / name
        folder.mkdir()
        ablation: dict[str, Any] = {"name": name, "base": BASE}
        ablation |= {"axes": {**axes, **({} if None in seeds else {"seed": seeds})}, "skip": []}
        ablation |= {"command": f"lpc-lightning ablate {name}.yaml"}
        ablation |= {"versions": {"date": "2026-11-22", "packages": {"torch": "2.13.0"}}}
        (folder / "ablation.json").write_text(json.dumps(ablation))
        for values in product(*axes.values()):
            for seed in seeds:
                if (result := value(*values, seed)) is not None:
                    _write_cell(folder / "cells", dict(zip(axes, values, strict=True)), seed, result)
        return folder

    return write


def _write_cell(folder: Path, axes: Mapping[str, Any], seed: int | None, value: float | str) -> None:
    parts = [f"{axis}={axis_value}" for axis, axis_value in axes.items()] + ([] if seed is None else [f"seed={seed}"])
    cell, failed = folder / ",".join(parts), isinstance(value, str)
    run = cell / "run"
    run.mkdir(parents=True)
    latent = (
        None if axes.get("latent") in (None, "none") else {"class_path": "lpc.Space", "init_args": {"num_codes": 4}}
    )
    model = {"class_path": "lpc.DPO", "init_args": {"beta": 0.1}}
    config: dict[str, Any] = {"seed_everything": seed, "model": model, "latent": latent, "trainer": {"max_steps": 8}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    axes = axes if seed is None else {**axes, "seed": seed}
    arguments = [*BASE, *(f"--{axis}={axis_value}.yaml" for axis, axis_value in axes.items())]
    state: dict[str, Any] = {"axes": axes, "seed": seed, "fingerprint": "f", "arguments": arguments, "attempts": 1}
    state |= {"places": [*len(BASE) * ["base"], *(f"axes.{axis}" for axis in axes)], "weights": "last", "tuned": {}}
    state |= {"status": "failed" if failed else "finished", "error": value if failed else None}
    state |= {"seconds": 10.0 + (seed or 0), "peak_bytes": 2**30 * (2 if latent else 1)}
    (cell / "cell.json").write_text(json.dumps(state))
    if isinstance(value, str):
        return
    lines = ["epoch,step,train/loss,val/latent/codebook_perplexity,val/rewards/accuracies"]
    for step in range(8):
        lines.append(f"0,{step},{0.7 - step / 20},,")
        if step % 2:
            lines.append(f"0,{step},,{9 - step if latent else ''},{0.5 + (value - 0.5) * (step + 1) / 8}")
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")
    results: dict[str, Any] = {
        "axes": axes,
        "metrics": {"val/rewards/accuracies": value, "test/rewards/accuracies": value - 0.1},
    }
    results |= {"parameters": {"policy": 1000, "latent": 24 if latent else 0}, "step": 8}
    (cell / "results.json").write_text(json.dumps(results))
    labels = {"flipped": False, "tokens": [3, 3], "margins": {"prior": 1.0}}
    for stage in ("validation", "test"):
        write_rows(cell / f"pairs_{stage}.jsonl", [{"prompt": f"{number} of {seed}", **labels} for number in range(4)])
