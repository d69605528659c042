"""What each code of a policy stands for: its tokens, its prompts, the pairs that it decides, and its answers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.cli.function_command import run_function
from lpc_lightning.data import DataError, PreferenceDataModule
from lpc_lightning.data.sources.columns import Columns
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.accuracy.preferences import evaluate_pairs
from lpc_lightning.evaluation.accuracy.scored_pairs import PairsFile, check_unused
from lpc_lightning.evaluation.codebook.explanation import Explanation, ExplanationPairs
from lpc_lightning.evaluation.codebook.explanation_files import JSON, TEXT, check_files, write_explanation
from lpc_lightning.evaluation.codebook.pair_keys import find_examples
from lpc_lightning.files.output_paths import check_folder, claim_output_folder, number_repeated
from lpc_lightning.inference.checkpoints import (
    checkpoint_origin,
    read_checkpoint,
    run_folder,
    trained_template,
)
from lpc_lightning.inference.generate import conditions
from lpc_lightning.inference.generation import Decoding, answers
from lpc_lightning.inference.opening import open_module, short_name, view_module
from lpc_lightning.inference.prompts import text_prompt
from lpc_lightning.inference.run_data import data_name, data_of_run, difference, read_rows, recorded_rows
from lpc_lightning.policy.precision import TRAINER_PRECISION, WEIGHTS_TYPE, Precision, resolve_precision

MOST_ANSWERS = 8
"""Most codes that answer if none are chosen."""


def main(arguments: list[str]) -> None:
    """Run the command."""
    run_function(explain, arguments[1:], arguments[0])


def explain(
    checkpoints: list[str],
    preferences: str | None = None,
    output: str | None = None,
    prompt: str | None = None,
    codes: list[int] | None = None,
    max_new_tokens: int = 64,
    tokens: int = 10,
    examples: int = 3,
    whole_vocabulary: bool = False,
    split: str | None = None,
    columns: Columns | None = None,
    bad_rows: Literal["error", "skip"] = "error",
    limit: int | float | None = None,
    batch_size: int | None = None,
    max_length: int = 1024,
    precision: Precision = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Explain the codes of a policy: their tokens, their prompts, the pairs that they decide, and their answers.

    For each code: the tokens that it raises and lowers most (LMHead(e_k) against the mean over codes), the prompts for
    which the prior makes it likeliest, the pairs whose reward margin it changes most against the prior's z, and its
    answer to one prompt beside those of other codes. If source, factor or annotator of the pairs matches the codes, by
    normalized mutual information, each code gets its most frequent value as a label.

    The text is printed and written to codes.md, and everything to codes.json. `lpc-lightning report` shows them. A fit
    with codes writes both at its end, without answers (callback `CodeExplanations`).

    Args:
        checkpoints: Checkpoints whose latent has codes (runs/version_0/checkpoints/best.ckpt).
        preferences: File of preference pairs. null: the validation pairs of the run, as in its config.yaml.
        output: Folder for the files, with a folder for each checkpoint. null: the folder of the run, which takes the
            files of one checkpoint.
        prompt: Prompt to answer. Defaults to that of the first pair.
        codes: Codes to answer under, from 0. null: those that are likeliest for some pair, at most 8, the most used.
        max_new_tokens: Tokens of an answer at most. 0: no answers.
        tokens: Tokens that a code raises, and tokens that it lowers, at most.
        examples: Prompts and pairs of each code at most.
        whole_vocabulary: Choose the tokens from the whole vocabulary. false: from the tokens of the pairs' answers.
        split: Use the rows of `preferences` with this value in the column `split`. null: `test` if the file has this
            column, else all.
        columns: Names of the columns of `preferences`, and how their cells are read, as `data.columns` of a fit. null:
            the defaults.
        bad_rows: Treatment of pairs of `preferences` that cannot be used. `error`: stop and list them. `skip`: leave
            them out and count them.
        limit: Use the first pairs of `preferences` up to this number; below 1: this share of them. null: all of them.
        batch_size: Pairs in a batch. null: 8 for `preferences`, and as in its validation for the pairs of the run.
        max_length: Most tokens of a prompt with its longer answer, for `preferences`. Longer pairs are left out and
            counted in the output.
        precision: `float32`, weights of any type converted to float32; `bfloat16`, weights in their stored type and
            arithmetic in bfloat16; `auto`, bfloat16 if the device multiplies it fast, else float32.
        device: Device: `auto`, `cpu`, `cuda` ...
        trust_remote_code: Run Python code that comes with the model or its tokenizer. Read that code first.

    Raises:
        ConfigError: A latent has no codes, a setting is out of range or has no effect, the validation pairs of the run
            have changed, or files of another checkpoint would be replaced.
        DataError: There are no such pairs.
    """
    for name, value, least in (
        ("tokens", tokens, 1),
        ("examples", examples, 0),
        ("max_new_tokens", max_new_tokens, 0),
        ("batch_size", batch_size, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name}: found {value}, expected at least {least}.")
    if prompt is not None and not prompt.strip():
        raise ConfigError(f"prompt: found {prompt!r}, expected text.")
    settings: dict[str, Any] = {"split": split, "columns": columns or Columns(), "bad_rows": bad_rows}
    settings |= {"limit": limit, "max_length": max_length}
    if preferences is None:
        check_unused(settings, "All validation pairs of the run are used, as its config.yaml reads them.")
    computed = resolve_precision(precision, device)
    stage: Literal["validation", "test"] = "validation" if preferences is None else "test"
    for path, folder in zip(checkpoints, _folders(checkpoints, output), strict=True):
        origin = checkpoint_origin(read_checkpoint(Path(path), weights=False), Path(path))
        with claim_output_folder(folder, "output"):
            data: PreferenceDataModule
            if preferences is None:
                data = _run_data(Path(path), origin)
                data.eval_batch_size = batch_size or data.eval_batch_size
            else:
                data = PairsFile(preferences, batch_size=batch_size or 8, **settings)
                data.template_settings = trained_template(origin)
            module = open_module(path, device, trust_remote_code, WEIGHTS_TYPE[computed])
            table = _codes(module, path)
            opened = view_module(module, path, data.template_settings)
            conditions(opened, None, codes or [], None)  # unknown codes are refused before the pass over the pairs
            collector = ExplanationPairs()
            print(f"{path}: {evaluate_pairs(module, data, collector, stage, TRAINER_PRECISION[computed])}")
            head = module.policy.head
            explanation = collector.explain(table, head, module.tokenizer, tokens, examples, whole_vocabulary)
            assert explanation is not None  # without pairs, evaluate_pairs raises an error
            explanation = explanation.with_texts(find_examples(data, stage, explanation.shown_pairs))
            answered = None
            if max_new_tokens:
                question = next(data.kept_examples(stage)).prompt if prompt is None else text_prompt(prompt)
                under = conditions(opened, None, _used_codes(explanation) if codes is None else codes, None)
                answered = next(answers(opened, [question], under, Decoding(max_new_tokens)))
            facts = {"checkpoint": os.path.abspath(path), "step": origin.get("step"), "preferences": preferences}
            print(f"\n{write_explanation(folder, explanation, facts, answered)}")
            print(f"Wrote {os.path.relpath(folder / TEXT)}, and the whole texts to {JSON} beside it.")


def _folders(checkpoints: Sequence[str], output: str | None) -> list[Path]:
    """Return the folder for the files of each checkpoint.

    Raises:
        ConfigError: Two checkpoints have the same folder, or a folder has other files of these names.
    """
    if output is None:
        folders = [run_folder(Path(path)) for path in checkpoints]
    else:
        folders = [Path(output) / name for name in number_repeated([short_name(path) for path in checkpoints])]
    first: dict[Path, str] = {}
    for path, folder in zip(checkpoints, folders, strict=True):
        if (place := folder.resolve()) in first:
            raise ConfigError(
                f"output: found {first[place]} and {path}, whose files would both go to {folder}, expected a folder "
                "for each checkpoint. Give another folder (--output), which gets one for each."
            )
        first[place] = path
    for path, folder in zip(checkpoints, folders, strict=True):
        check_folder(folder, "output")
        check_files(folder, Path(path))
    return folders


def _codes(module: PreferenceModule, path: str) -> Tensor:
    """Return the codes of a module's latent, which must have some."""
    space = module.latent
    if space is None or not space.has_codes:
        found = "no latent" if space is None else f"the latent {type(space).__name__}, which has no codes,"
        raise ConfigError(f"checkpoints: found {found} in {path}, expected one with codes, such as MarginalSpace.")
    return space.codes


def _run_data(path: Path, origin: Mapping[str, Any]) -> PreferenceDataModule:
    """Make the data of the run that wrote a checkpoint.

    Args:
        path: The checkpoint.
        origin: Result of `checkpoint_origin`.

    Raises:
        ConfigError: The run has no config with data, or its data cannot be made here, or its validation pairs are not
            those of the fit. A checkpoint of an earlier version has no record of them, and any are taken.
        DataError: The data cannot be read.
    """
    config = run_folder(path) / "config.yaml"
    expected = "Give a file of pairs: --preferences pairs.jsonl."
    if not origin["data"]:
        raise ConfigError(f"preferences: found no config.yaml with data in {run_folder(path)}. {expected}")
    try:
        data = data_of_run(origin)
    except ConfigError as error:
        raise ConfigError(f"preferences: {config}: {error}. {expected}") from error
    if (recorded := recorded_rows(origin, "validation")) is None:
        return data
    advice = f"Run the command in the folder of the fit ({origin['data_folder']}) with its files. {expected}"
    try:
        found = read_rows(data, "validation")
    except DataError as error:
        raise DataError(f"preferences: {config}: {error} {advice}") from error
    if found != recorded:
        raise ConfigError(
            f"preferences: {config} names {data_name(data, 'validation')}, in which the validation pairs have changed, "
            f"or which is another file: {difference(found, recorded)}. {advice}"
        )
    return data


def _used_codes(explanation: Explanation) -> list[int]:
    """Return the codes that are likeliest for some pair, the most used ones, in order."""
    ranked = sorted(explanation.codes, key=lambda code: (-code.likeliest, -code.share))
    return sorted(code.code for code in ranked[:MOST_ANSWERS] if code.likeliest)
