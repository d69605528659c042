"""The files of preference pairs that are measured, and what each is called in tables and folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

NAMES = {
    "hh": "hh_helpful_harmless.jsonl",
    "ultrafeedback": "ultrafeedback_binarized_1200.jsonl",
    "polite": "polite_vs_impolite_1100.jsonl",
}
"""What `docs/performance.md` measures: files that do not come with the project."""


def find_files(given: Sequence[str], folder: Path) -> dict[str, Path]:
    """Look files up before anything is measured.

    Args:
        given: For each a path, or one of `NAMES`.
        folder: Where the files of `NAMES` are.

    Returns:
        Each file by its name or, for a path, by the file's own without its ending.

    Raises:
        SystemExit: There is no such file, or two of them are called the same.
    """
    files: dict[str, Path] = {}
    for each in given:
        path = folder / NAMES[each] if each in NAMES else Path(each).expanduser()
        title = each if each in NAMES else path.name.partition(".")[0]
        if not path.exists():
            raise SystemExit(
                f"--data: found no file {path}, expected one of preference pairs: give the path of your own "
                f"(--data my_pairs.jsonl), or the folder of {', '.join(NAMES)} by --data-dir."
            )
        if title in files:
            raise SystemExit(
                f"--data: found {files[title]} and {path}, both called {title}, expected files of different names: "
                "copy or link one under another name."
            )
        files[title] = path
    return files
