"""Benchmarks and preference accuracy of any models, side by side."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.benchmarks.results import BenchmarkResults, scores
from lpc_lightning.evaluation.benchmarks.tasks import PAPER_TASKS
from lpc_lightning.evaluation.comparison.comparison import compare, to_markdown, write_comparison
from lpc_lightning.evaluation.comparison.model_scores import ModelScores, scores_of
from lpc_lightning.evaluation.comparison.one_model import EvalRequest, describe, evaluate_model
from lpc_lightning.evaluation.tables import markdown_table, score
from lpc_lightning.function_command import run_function
from lpc_lightning.inference.opening import short_name
from lpc_lightning.latent import PriorMode
from lpc_lightning.paths import expand_path
from lpc_lightning.policy.precision import is_bfloat16_fast


def main(arguments: list[str]) -> None:
    """Run the command. Its exit code is 1 where a model or a benchmark has failed."""
    if not run_function(evaluate, arguments[1:], arguments[0]):
        sys.exit(1)


def evaluate(
    models: list[str],
    tasks: list[str] | None = None,
    data_dir: str | None = None,
    preferences: str | None = None,
    output: str = "results",
    names: list[str] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    batch_size: int | Literal["auto"] = "auto",
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    prior_mode: PriorMode | None = None,
    share_contexts: bool = True,
    device: str = "auto",
    seed: int = 1234,
    again: bool = False,
) -> bool:
    """Run lm-eval's benchmarks, and preference accuracy if asked, on models with their latent; compare several.

    Each model's scores go to OUTPUT/NAME/results.json, with every item in items.jsonl. What is there already with the
    same settings is read and not run again, so that a command that was interrupted, or that failed in part, can be
    given again. Of several models, the first is the baseline of OUTPUT/comparison.md, .csv and .json, which tell the
    differences to it with their significance: McNemar's exact test or a paired bootstrap, corrected by Holm.

    Args:
        models: What to evaluate, the baseline first: checkpoints (runs/version_0/checkpoints/best.ckpt), exported
            folders, plain models (a folder, a hub name or a GGUF file), or folders of results written earlier.
        tasks: lm-eval's names of tasks or groups, or paths of task files (.yaml); `none` for no benchmarks. null: those
            of the paper, arc_easy, arc_challenge, gsm8k, truthfulqa_mc1 and truthfulqa_mc2.
        data_dir: Folder with the tasks' data (arc/, gsm8k/, truthfulqa/). null: the data comes from the hub.
        preferences: A file of preference pairs to score; of one with a column `split`, the rows of `test`. A checkpoint
            scores them by its algorithm's reward, any other model by mean log-probability.
        output: Folder for the results.
        names: Names of the models in tables and folders, as many as models. null: made from their paths.
        limit: Documents of each task, and pairs, from the start. null: all of them.
        num_fewshot: Examples in front of each question. null: each task's own number.
        apply_chat_template: Put the benchmarks' prompts as conversations, in the tokenizer's chat template.
        batch_size: Sequences at a time; `auto` takes what fits.
        precision: `float32`; `bfloat16`, weights as they are stored and arithmetic in bfloat16; `auto`, bfloat16 where
            the device multiplies it fast.
        prior_mode: How z is taken from the prior: `mean`, `sample`, `argmax`, or the number of a code. null: as the
            model's own settings say.
        share_contexts: Read a context once for all its continuations: faster, and the same scores but for rounding.
            Without, requests are batched exactly as stock lm-eval does it.
        device: Where to run: `auto`, `cpu`, `cuda` ...
        seed: Seed of few-shot examples and of whatever is drawn.
        again: Run anew what has results already.

    Returns:
        Whether all models have all results.

    Raises:
        ConfigError: Settings that no model could be evaluated with; told before anything runs.
        DataError: The file of preference pairs is not there or holds none.
    """
    named = name_models(models, names)
    wanted = EvalRequest(
        tasks=PAPER_TASKS if tasks is None else tuple(task for task in tasks if task != "none"),
        data_dir=None if data_dir is None else expand_path(data_dir, "data_dir"),
        preferences=preferences,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        batch_size=batch_size,
        precision=_precision(device) if precision == "auto" else precision,
        prior_mode=prior_mode,
        share_contexts=share_contexts,
        device=device,
        seed=seed,
    )
    wanted.check()
    found, failures = list[ModelScores](), list[str]()
    for number, (name, model) in enumerate(named, 1):
        if number > 1:
            _free_memory()
        print(f"Model {number} of {len(named)}: {name} ({model})", flush=True)
        try:
            results, missing = evaluate_model(model, name, wanted, Path(output), again)
        except Exception as error:  # whatever it is, the other models are worth having
            failures.append(f"{name}: {describe(error)}")
            continue
        failures += [f"{name}, {task}: {why}" for task, why in missing.items()]
        print(f"\n{table(results)}\n", flush=True)
        found.append(scores_of(name, results))
    if len(found) > 1:
        if found[0].name != named[0][0]:
            print(f"{named[0][0]} has no results: differences are to {found[0].name}.")
        _compare(found, Path(output))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return not failures


def name_models(models: Sequence[str], names: Sequence[str] | None) -> list[tuple[str, str]]:
    """A name for each model, no two alike.

    Raises:
        ConfigError: Other than one name a model, or two alike.
    """
    if names is None:
        short = [short_name(model) for model in models]
        seen = Counter[str]()
        names = []
        for name in short:
            seen[name] += 1
            names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    if len(names) != len(models):
        raise ConfigError(f"names: found {len(names)} for {len(models)} models, expected one for each.")
    if len(set(names)) < len(names):
        raise ConfigError(f"names: found {', '.join(names)}, expected no two alike.")
    return list(zip(names, models, strict=True))


def table(results: BenchmarkResults) -> str:
    """A model's scores, one a line."""
    records = results.record.get("tasks", {})
    rows = [
        [task, metric, score(*found), str(records.get(task, {}).get("items", "-"))]
        for task, metrics in results.metrics.items()
        for metric, found in scores(metrics).items()
    ]
    rows += [[task, "failed", "-", "-"] for task in results.failures]
    return markdown_table(["task", "metric", "score", "items"], rows, left=2)


def _compare(found: Sequence[ModelScores], output: Path) -> None:
    comparison = compare(found)
    output.mkdir(parents=True, exist_ok=True)
    write_comparison(output, comparison)
    print(to_markdown(comparison))
    print(f"\nWrote {output / 'comparison.md'}, .csv and .json.")


def _precision(device: str) -> Literal["float32", "bfloat16"]:
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device.partition(":")[0]
    return "bfloat16" if is_bfloat16_fast(kind) else "float32"


def _free_memory() -> None:
    """Let go of the model before: its parts know each other, which only the collector sees through."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
