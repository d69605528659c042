"""The command `alpaca`: write answers in the format of the package `alpaca_eval`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lpc_lightning.data import DataError
from lpc_lightning.data.sources.prompts import INPUT, SYSTEM_NAMES
from lpc_lightning.data.sources.reading import read_rows
from lpc_lightning.data.sources.rows import BadRow, check_text
from lpc_lightning.errors import ConfigError
from lpc_lightning.files.json_files import write_json
from lpc_lightning.files.output_paths import check_file, claim_output_file
from lpc_lightning.inference.fingerprint import model_identity
from lpc_lightning.inference.generate import conditions
from lpc_lightning.inference.generation import Decoding, answers
from lpc_lightning.inference.opening import open_policy
from lpc_lightning.inference.prompts import text_prompt
from lpc_lightning.latent import PriorMode
from lpc_lightning.policy.precision import WEIGHTS_ADVICE, warn_of_slow_products

Row = dict[str, str]


def alpaca(
    model: str,
    instructions: str,
    output: str = "model_outputs.json",
    generator: str | None = None,
    prior_mode: PriorMode | None = None,
    limit: int | None = None,
    max_new_tokens: int = 2048,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Answer AlpacaEval's instructions. Judging the answers is a step of your own, which needs a paid API.

    The file that is written is what alpaca_eval reads: `pip install alpaca-eval`, set OPENAI_API_KEY, and
    `alpaca_eval --model_outputs model_outputs.json`. An interrupted command continues where it stopped: the same
    command answers what is not answered yet, and ends with the same file.

    Args:
        model: A checkpoint, an exported folder, or any plain model: a folder, a hub name or a GGUF file.
        instructions: The instructions: `alpaca_eval.json` of the hub data set tatsu-lab/alpaca_eval, or any JSON list
            (or JSON lines) of objects with `instruction` and, if known, `dataset`.
        output: The file to write; its settings go to a file beside it, `model_outputs.settings.json`.
        generator: The model's name on the leaderboard. null: the name it has in other tables.
        prior_mode: How z is taken from the prior: `mean`, `sample`, `argmax`, or the number of a code. null: the
            model's own setting.
        limit: Answer only so many instructions, from the first. null: all of them.
        max_new_tokens: Tokens of an answer at most.
        temperature: Divides the logits before a token is drawn. 0 takes the likeliest token.
        top_p: Draw among the likeliest tokens that together have this probability.
        seed: Seed of all draws.
        batch_size: Instructions that are answered at a time.
        dtype: Type of the weights: `auto`, `float32`, `bfloat16` or `float16`.
        device: Where to run: `auto`, `cpu`, `cuda` ...
        trust_remote_code: Run Python code that comes with the model or its tokenizer. Read that code first.

    Raises:
        ConfigError: A setting is invalid or does not fit the model, or `output` is not free for the answers.
        DataError: A file that is read is missing or invalid, or an instruction leaves no room for an answer.
        CheckpointError, UnsupportedPolicyError: The model cannot be opened.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: found {limit}, expected at least 1.")
    check_file(Path(output), "output")
    requested = read_instructions(instructions)[:limit]
    decoding = Decoding(max_new_tokens, temperature, top_p, seed=seed, batch_size=batch_size)
    opened = open_policy(model, dtype, device, generator, trust_remote_code)
    warn_of_slow_products(opened.policy.model.device.type, opened.origin["dtype"], WEIGHTS_ADVICE)
    (under,) = conditions(opened, prior_mode, [], None)
    settings = {"generator": opened.name, **model_identity(model), "prior_mode": prior_mode}
    settings |= {"dtype": dtype, **asdict(decoding)}
    del settings["batch_size"]  # it does not change the answers
    path = Path(output)
    with claim_output_file(path, "output"):
        rows = _resume(path, requested, settings)
        if rows:
            print(f"{path} holds {len(rows)} of {len(requested)} answers already.")
        left = requested[len(rows) :]
        prompts = [text_prompt(row["instruction"]) for row in left]
        unfinished = 0
        with tqdm(total=len(requested), initial=len(rows), unit="answer") as bar:
            for row, answered in zip(left, answers(opened, prompts, [under], decoding), strict=True):
                (answer,) = answered.answers
                rows.append({**row, "output": answer.text, "generator": opened.name})
                unfinished += not answer.finished
                bar.update()
                if len(rows) % batch_size == 0 or len(rows) == len(requested):
                    write_json(path, rows)
        if unfinished:
            print(f"{unfinished} answers were cut at {max_new_tokens} tokens or at the end of the context.")
        print(f"Wrote {path}. To judge it (a paid API): alpaca_eval --model_outputs {path}")


def read_instructions(path: str) -> list[Row]:
    """Read `instruction` and `dataset` of each row.

    Raises:
        DataError: A row has no instruction or an invalid field. The message names file, row and field.
    """
    instructions = []
    for place, row in read_rows(path):
        for field in ("instruction", "dataset"):
            if not isinstance(row.get(field, ""), str):
                raise DataError(f"{place}: found {row[field]!r} for `{field}`, expected text.")
            try:
                check_text(row.get(field, ""))
            except BadRow as fault:
                raise DataError(f"{place}: {fault}. Expected `{field}` as text in UTF-8.") from fault
        if not row.get("instruction", "").strip():
            raise DataError(f"{place}: found no text for `instruction`; the row has {', '.join(row)}.")
        if more := next((field for field in (INPUT, *SYSTEM_NAMES) if row.get(field)), None):
            raise DataError(
                f"{place}: found `{more}`, which AlpacaEval 2 does not have. Put it into `instruction`, as the model "
                "is to read it."
            )
        instructions.append({"dataset": row.get("dataset", ""), "instruction": row["instruction"]})
    return instructions


def _resume(path: Path, requested: Sequence[Row], settings: Mapping[str, Any]) -> list[Row]:
    """Read the answers of an interrupted command. Check that instructions and settings are the same."""
    beside = path.with_suffix(".settings.json")
    if not path.exists():
        write_json(beside, settings)
        return []
    advice = "Give another --output, or remove that file."
    try:
        rows, written = json.loads(path.read_text(encoding="utf-8")), json.loads(beside.read_text(encoding="utf-8"))
        if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
            raise ValueError("it holds no list of objects")
    except (OSError, ValueError) as error:
        raise DataError(f"output: {path} is there and cannot be gone on with ({error}). {advice}") from error
    for name, value in settings.items():
        if written.get(name) != value:
            found = written.get(name)
            raise ConfigError(f"output: {path} was written with {name} {found!r}, now it is {value!r}. {advice}")
    for number, (row, instruction) in enumerate(zip(rows, requested, strict=False), 1):
        if {**row, **instruction} != row:
            raise ConfigError(f"output: row {number} of {path} answers another instruction. {advice}")
    if len(rows) > len(requested):
        raise ConfigError(f"output: {path} holds {len(rows)} answers to {len(requested)} instructions. {advice}")
    return rows
