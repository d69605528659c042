"""Files of a folder that belong to no split."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path

from lpc_lightning.data.sources.files import has_known_ending

MOST_NAMES = 5
"""Number of files that the warning names."""
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
"""Files that describe a data set and hold no rows."""


def warn_of_unread(folder: Path, config: str | None, read: Collection[Path]) -> None:
    """Warn of the files of rows in a folder that are not read. Hidden files and descriptions are no such files.

    Args:
        folder: The folder.
        config: Its configuration that is read. None: its default.
        read: Files of its splits.
    """
    known = {path.resolve() for path in read}
    unread = [
        name
        for name in sorted(path.relative_to(folder) for path in folder.rglob("*"))
        if has_known_ending(name.name)
        and name.name not in DESCRIPTIONS
        and not any(part.startswith((".", "__")) for part in name.parts)
        and (folder / name).is_file()
        and (folder / name).resolve() not in known
    ]
    if unread:
        names = ", ".join(name.as_posix() for name in unread[:MOST_NAMES])
        more = f" and {len(unread) - MOST_NAMES} more" if len(unread) > MOST_NAMES else ""
        split = "split" if config is None else f"split of the configuration {config!r}"
        # The level of this line: the text is shown once, however often the folder is opened.
        warnings.warn(
            f"{folder}: no row of {names}{more} is read, because `datasets` assigns these files to no {split}. To "
            "read them, set data.path to files: a pattern, a list, or a mapping of train, validation and test.",
            stacklevel=1,
        )
