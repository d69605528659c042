"""The folder of an export: what may be replaced, and a folder that is complete or as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lpc_lightning.distributed.checkpoint_io import CheckpointWriteError
from lpc_lightning.errors import ConfigError, DamagedFileError
from lpc_lightning.files.json_files import read_json_object
from lpc_lightning.files.output_paths import check_folder
from lpc_lightning.files.whole_folders import content_of, whole_folder
from lpc_lightning.policy.pretrained import ORIGIN
from lpc_lightning.policy.start_adapter import ADAPTER

FILES = "files"
"""Key of the record with the names of all files that `export` has written."""
LAST = ("config.json", ADAPTER)
"""Files without which neither transformers nor a command of this suite opens the folder."""


def check_free(target: Path, overwrite: bool) -> None:
    """Check that the folder is new or empty, or that it holds an earlier export and nothing else.

    Raises:
        ConfigError: It holds other files, or an earlier export without `overwrite`, or it is no folder.
    """
    check_folder(target, "output")
    if not target.is_dir() or not (found := {path.name for path in content_of(target)}):
        return
    written = _files_of_export(target)
    if not written:
        raise ConfigError(
            f"output: {target} is not empty and no earlier export, expected a folder that is new or empty."
        )
    if not overwrite:
        raise ConfigError(f"output: {target} holds an earlier export. Expected another folder, or --overwrite.")
    if others := sorted(found - written):
        raise ConfigError(
            f"output: found {others[0]} in {target}, which export has not written and --overwrite would delete. "
            f"Expected an earlier export and nothing else ({len(others)} other files). Move them, or give another "
            "folder."
        )


def _files_of_export(folder: Path) -> set[str]:
    """Return the names of the files that `export` has written, as its record lists them. Empty for other folders."""
    try:
        record = read_json_object(folder / ORIGIN)
    except DamagedFileError:
        return set()
    is_record = {"algorithm", "policy", "latent", FILES} <= set(record)
    return set(map(str, record[FILES])) if is_record and isinstance(record[FILES], list) else set()


@contextmanager
def replacing(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a folder whose files are those of `target` when it is complete. It is removed on failure.

    Raises:
        ConfigError: See `check_free`.
        CheckpointWriteError: The files cannot be written.
    """
    try:
        # Files may have come while the model was loaded and written.
        with whole_folder(target, LAST, lambda: check_free(target, overwrite)) as folder:
            yield folder
            for file in folder.glob("*.safetensors"):  # safetensors writes them readable only by their owner
                file.chmod((folder / ORIGIN).stat().st_mode)
    except (OSError, SafetensorError) as error:
        raise CheckpointWriteError(
            f"output: could not write {target}: {error}. Expected a folder with enough space and write permission."
        ) from error
