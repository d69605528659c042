"""Benchmarks and preference accuracy of any models, side by side."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from lpc_lightning.cli.function_command import run_function
from lpc_lightning.data.sources.columns import Columns
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.accuracy.scored_pairs import remarks
from lpc_lightning.evaluation.benchmarks.results import BenchmarkResults, scores
from lpc_lightning.evaluation.benchmarks.tasks import PAPER_TASKS
from lpc_lightning.evaluation.comparison.comparison import (
    compare,
    holds_no_other_results,
    to_markdown,
    write_comparison,
)
from lpc_lightning.evaluation.comparison.model_scores import ModelScores, scores_of
from lpc_lightning.evaluation.comparison.one_model import describe, evaluate_model
from lpc_lightning.evaluation.comparison.request import EvalRequest
from lpc_lightning.evaluation.comparison.score_tables import score_tables
from lpc_lightning.evaluation.comparison.stored import claim_name
from lpc_lightning.evaluation.tables import score
from lpc_lightning.files.markdown import markdown_table
from lpc_lightning.files.output_paths import check_folder, check_name, number_repeated
from lpc_lightning.files.path_variables import expand_path
from lpc_lightning.inference.opening import short_name
from lpc_lightning.latent import PriorMode
from lpc_lightning.policy.precision import (
    PRECISION_ADVICE,
    Precision,
    device_type,
    resolve_precision,
    warn_of_slow_products,
)


def main(arguments: list[str]) -> None:
    """Run the command. The exit code is 1 if a model or a benchmark failed."""
    if not run_function(evaluate, arguments[1:], arguments[0]):
        sys.exit(1)


def evaluate(
    models: list[str],
    tasks: list[str] | None = None,
    data_dir: str | None = None,
    preferences: list[str] | None = None,
    output: str = "results",
    names: list[str] | None = None,
    columns: Columns | None = None,
    bad_rows: Literal["error", "skip"] = "error",
    max_length: int | None = 1024,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    batch_size: int | Literal["auto"] = "auto",
    precision: Precision = "auto",
    prior_mode: PriorMode | None = None,
    share_contexts: bool = True,
    device: str = "auto",
    trust_remote_code: bool = False,
    seed: int = 1234,
    again: bool = False,
) -> bool:
    """Run lm-eval's benchmarks on models with their latent, optionally with preference accuracy, and compare models.

    Each model's scores go to OUTPUT/NAME/results.json, and every item goes to items.jsonl. Existing results with the
    same settings are read and not computed again. If a folder has results of other settings, weights or preference
    pairs, it keeps them, and the new ones go to NAME-2. Commands that run together keep their results apart. After an
    interruption or a failure, run the same command again to complete the results. With several models, the first is the
    baseline of OUTPUT/comparison.md, .csv and .json, or of comparison-2 if those files compare other results. They have
    the differences to the baseline and their significance: McNemar's exact test, or sign flips of items, or of whole
    prompts where preference pairs share one, corrected by Holm.

    Args:
        models: Models to evaluate, the baseline first: checkpoints (runs/version_0/checkpoints/best.ckpt), exported
            folders, plain models (a folder, a hub name or a GGUF file), or folders of existing results.
        tasks: Names of lm-eval tasks or groups, or paths of task files (.yaml); `none` for no benchmarks. null: the
            paper's tasks, arc_easy, arc_challenge, gsm8k, truthfulqa_mc1 and truthfulqa_mc2.
        data_dir: Folder with the tasks' data (arc/, gsm8k/, truthfulqa/). null: the data comes from the hub.
        preferences: Files of preference pairs to score. If a file has a column `split`, the rows of `test` are used. A
            checkpoint is scored by its algorithm's reward, any other model by mean log-probability. Files in the form
            of RM-Bench (lists of three answers) and of RewardBench (a column `subset`) also get the scores that these
            benchmarks define, under every mode of z, without and with length normalization.
        output: Folder for the results.
        names: Names of the models in tables and folders, one per model. null: names made from the models' paths.
        columns: Names of the columns of these pairs, and how their cells are read, as `data.columns` of a fit. null:
            the defaults.
        bad_rows: Treatment of pairs that cannot be used. `error`: stop and list them. `skip`: leave them out and count
            them.
        max_length: Most tokens of a prompt with its longer answer. Longer pairs are left out and counted. null: no
            limit, which scores of a benchmark need to be comparable.
        limit: Number of documents per task, and of pairs, from the start; below 1: a share of them. null: all of them.
        num_fewshot: Number of examples before each question. null: each task's own number. A task whose own number is
            0, such as truthfulqa_mc1, always has no examples, and a line names it.
        apply_chat_template: Format the benchmarks' prompts as conversations, with the tokenizer's chat template.
        batch_size: Number of sequences per batch. `auto` uses what fits into memory.
        precision: `float32`, weights of any type converted to float32; `bfloat16`, weights in their stored type and
            arithmetic in bfloat16; `auto`, bfloat16 if the device multiplies it fast, else float32.
        prior_mode: How z is computed from the prior: `mean`, `sample`, `argmax`, or the number of a code. null: the
            model's own setting.
        share_contexts: Read a context once for all its continuations. This is faster, and scores differ by rounding
            only. If false, requests are batched exactly like in stock lm-eval.
        device: Device to run on: `auto`, `cpu`, `cuda` ...
        trust_remote_code: Run Python code that comes with the model or its tokenizer. Read that code first.
        seed: Seed of few-shot examples and of all other random draws. A task that shuffles its documents while they are
            loaded uses lm-eval's default seeds instead.
        again: Compute results again even if they exist.

    Returns:
        True if all results of all models exist.

    Raises:
        ConfigError: A setting is invalid for every model. Raised before anything runs.
        DataError: The file of preference pairs does not exist, or has no pairs.
    """
    named_models = name_models(models, names)
    check_folder(Path(output), "output")
    request = EvalRequest(
        tasks=PAPER_TASKS if tasks is None else tuple(task for task in tasks if task != "none"),
        data_dir=None if data_dir is None else expand_path(data_dir, "data_dir"),
        preferences=tuple(preferences or ()),
        columns=columns or Columns(),
        bad_rows=bad_rows,
        max_length=max_length,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        batch_size=batch_size,
        precision=resolve_precision(precision, device),
        prior_mode=prior_mode,
        share_contexts=share_contexts,
        device=device,
        trust_remote_code=trust_remote_code,
        seed=seed,
    )
    request.check()
    warn_of_slow_products(device_type(device), request.precision, PRECISION_ADVICE)
    model_scores, failures = list[ModelScores](), list[str]()
    for number, (name, model) in enumerate(named_models, 1):
        if number > 1:
            _free_memory()
        print(f"Model {number} of {len(named_models)}: {name} ({model})", flush=True)
        try:
            folder, results, missing = evaluate_model(model, name, request, Path(output), again)
        except Exception as error:  # any error: the other models are still evaluated
            reason = describe(error)
            failures.append(reason if reason.startswith(f"{name}:") else f"{name}: {reason}")
            continue
        failures += [f"{name}, {task}: {reason}" for task, reason in missing.items()]
        print(f"\n{table(results)}\n", flush=True)
        for sentence in remarks(results.record.get("tasks", {})):
            print(f"{sentence}\n", flush=True)
        for text in score_tables(results.record.get("tasks", {})).values():
            print(f"{text}\n", flush=True)
        model_scores.append(scores_of(name, results, os.path.relpath(folder, output)))
    if len(model_scores) > 1:
        if model_scores[0].name != named_models[0][0]:
            print(f"{named_models[0][0]} has no results. The baseline is {model_scores[0].name}.")
        _compare(model_scores, Path(output))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return not failures


def name_models(models: Sequence[str], names: Sequence[str] | None) -> list[tuple[str, str]]:
    """Return (name, model) for each model, with distinct names.

    Args:
        models: Paths or hub names of the models.
        names: Their names. None: names are made from `models`, with numbers added to repeated names.

    Raises:
        ConfigError: The number of names is not the number of models, two names are equal, or a name is no folder's.
    """
    if names is None:
        names = number_repeated([short_name(model) for model in models])
    if len(names) != len(models):
        raise ConfigError(f"names: found {len(names)} for {len(models)} models, expected one for each.")
    for name in names:
        check_name(name, "names")
    if len(set(names)) < len(names):
        raise ConfigError(f"names: found {', '.join(names)}, expected no two equal names.")
    return list(zip(names, models, strict=True))


def table(results: BenchmarkResults) -> str:
    """Format a model's scores as a Markdown table with one score per line."""
    records = results.record.get("tasks", {})
    rows = [
        [task, metric, score(*value_and_error), str(records.get(task, {}).get("items", "-"))]
        for task, metrics in results.metrics.items()
        for metric, value_and_error in scores(metrics).items()
    ]
    rows += [[task, "failed", "-", "-"] for task in results.failures]
    return markdown_table(["task", "metric", "score", "items"], rows, left=2)


def _compare(model_scores: Sequence[ModelScores], output: Path) -> None:
    """Write and print a comparison. One of other results in the folder stays."""
    comparison = compare(model_scores)

    def is_free(name: str) -> bool:
        return holds_no_other_results(output / f"{name}.json", model_scores)

    with claim_name(output, "comparison", is_free) as name:
        write_comparison(output, comparison, name)
    print(to_markdown(comparison))
    print(f"\nWrote {output / f'{name}.md'}, .csv and .json.")


def _free_memory() -> None:
    """Free the previous model. Its parts refer to each other, so the garbage collector must run."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
