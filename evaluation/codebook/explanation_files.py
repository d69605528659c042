"""Files that explain the codes of a run: JSON for programs, and tables for readers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.codebook.explanation import Explanation
from lpc_lightning.files.json_files import read_if_whole, write_json, write_text
from lpc_lightning.files.markdown import escape_markdown, markdown_table
from lpc_lightning.inference.checkpoints import run_folder
from lpc_lightning.inference.generation import Answered, marked

JSON, TEXT = "codes.json", "codes.md"
"""Names of the files."""
LONGEST = 160
"""Characters of an answer or a prompt in a table at most. The JSON file has the whole texts."""


@dataclass(frozen=True)
class TextTable:
    """A table of texts with its title, and notes below it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def check_files(folder: Path, checkpoint: Path) -> None:
    """Check that a folder has no files of these names, or those of an earlier explanation of the same checkpoint.

    Args:
        folder: Output folder. In the folder of a run, files from the end of its fit count as those of any checkpoint.
        checkpoint: The checkpoint to explain.

    Raises:
        ConfigError: A file of another origin would be replaced.
    """
    existing = [folder / name for name in (JSON, TEXT) if (folder / name).exists()]
    if not existing:
        return
    try:
        content = json.loads((folder / JSON).read_text(encoding="utf-8"))
        ours, explained = "codes" in content, content.get("checkpoint")
    except (OSError, ValueError, AttributeError):
        ours, explained = False, None
    if not ours:
        raise ConfigError(
            f"output: {existing[0]} exists and does not explain codes, expected another folder (--output), or move it."
        )
    if explained is not None and not _is_same(Path(explained), checkpoint, folder):
        raise ConfigError(
            f"output: {folder / JSON} explains {explained}, expected no explanation of another checkpoint than "
            f"{checkpoint}, which would replace it. Give another folder (--output), or move it."
        )


def _is_same(explained: Path, checkpoint: Path, folder: Path) -> bool:
    if folder.resolve() == run_folder(checkpoint).resolve():  # which may have been moved since
        return explained.name == checkpoint.name
    return explained.resolve() == checkpoint.resolve()


def write_explanation(
    folder: Path, explanation: Explanation, origin: Mapping[str, Any], answered: Answered | None = None
) -> str:
    """Write `codes.json` and `codes.md`.

    Args:
        folder: Output folder. It is created if it does not exist.
        explanation: The explanation.
        origin: The policy and the pairs, as JSON values.
        answered: A prompt with its answers under the prior and under codes. None: no answers.

    Returns:
        The content of `codes.md`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {**origin, **asdict(explanation), "answered": None if answered is None else asdict(answered)}
    write_json(folder / JSON, content)
    text = "\n".join(["# Codes", "", *_markdown(content)])
    write_text(folder / TEXT, text)
    return text


def read_explanation(folder: Path) -> dict[str, Any] | None:
    """Read `codes.json` of a folder. None if there is none, or if it is damaged."""
    return read_if_whole(folder / JSON, "Its codes are not shown.") or None


def explanation_tables(content: Mapping[str, Any]) -> Iterator[TextTable]:
    """Yield the tables for readers.

    Args:
        content: Content of `codes.json`.
    """
    codes = content["codes"]
    rows = [
        [
            str(code["code"]),
            _label(code["label"]),
            f"{code['share']:.3f}",
            str(code["likeliest"]),
            _tokens(code["raised"]),
            _tokens(code["lowered"]),
        ]
        for code in codes
    ]
    header = ["code", "label", "mean prior", "pairs", "raises", "lowers"]
    yield TextTable(f"{len(codes)} codes over {content['pairs']} pairs", header, rows, list(_notes(content)))
    rows = [
        [str(code["code"]), f"{each['probability']:.3f}", _short(each["prompt"])]
        for code in codes
        for each in code["prompts"]
    ]
    yield TextTable("Prompts for which a code is likeliest", ["code", "probability", "prompt"], rows)
    rows = [
        [
            str(code["code"]),
            f"{each['margin']:+.2f}",
            f"{each['prior_margin']:+.2f}",
            *(_short(each[part]) for part in ("prompt", "chosen", "rejected")),
        ]
        for code in codes
        for each in code["decided"]
    ]
    yield TextTable(
        "Pairs that a code decides",
        ["code", "margin under it", "under the prior", "prompt", "chosen", "rejected"],
        rows,
        ["Margin: reward of the chosen minus that of the rejected answer. Above 0 the label is predicted."],
    )
    if answered := content["answered"]:
        rows = [[each["under"], marked(each["text"], each["finished"])] for each in answered["answers"]]
        yield TextTable(f"One prompt under each code: {answered['prompt'][-1]['content']}", ["under", "answer"], rows)


def _markdown(content: Mapping[str, Any]) -> Iterator[str]:
    for table in explanation_tables(content):
        yield f"## {escape_markdown(table.title)}\n"
        yield markdown_table(table.header, table.rows, left=len(table.header)) + "\n"
        yield from (f"{escape_markdown(note)}\n" for note in table.notes)


def _notes(content: Mapping[str, Any]) -> Iterator[str]:
    if (step := content.get("step")) is not None:
        checkpoint = content["checkpoint"]
        yield f"Weights: {'those of the fit' if checkpoint is None else Path(checkpoint).name}, step {step}."
    among = "all tokens of the vocabulary" if content["whole_vocabulary"] else "the tokens of these answers"
    yield (
        f"Pairs: those for which the code is likeliest under the prior. Raises, lowers: {among} whose logits the code "
        "moves most, in nats, compared with the mean over codes."
    )
    columns = content["columns"]
    if any(code["label"] for code in content["codes"]):
        best = columns[0]
        yield (
            f"Label: the most frequent {best['column']} of the pairs for which the code is likeliest under the "
            f"{best['codes_by']}, and how many of these pairs have it."
        )
    elif columns:
        yield "No code has a label, because no column of the data matches the codes."
    for match in columns:
        yield (
            f"Column {match['column']} against the likeliest code under the {match['codes_by']}: normalized mutual "
            f"information {match['nmi']:.2f} (shuffled {match['nmi_shuffled']:.2f}), purity {match['purity']:.2f}."
        )


def _label(label: Mapping[str, Any] | None) -> str:
    return "" if label is None else f"{label['column']} {label['value']} ({label['pairs']} of {label['of']})"


def _tokens(tokens: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{json.dumps(each['text'], ensure_ascii=False)} {each['shift']:+.2f}" for each in tokens)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else line[: LONGEST - 4] + " ..."
