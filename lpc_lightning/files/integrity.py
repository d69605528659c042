"""Detection of files whose content is not what was written.

A zip file, such as a checkpoint of torch, holds a checksum of each of its entries. torch's own reader does not compare
them. For other files, `write_digests` writes the SHA-256 of each file into `digests.json` beside them: the shards of a
checkpoint, an exported folder, and a prepared model.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

from lpc_lightning.errors import DamagedFileError

DIGESTS = "digests.json"
"""File with the SHA-256 of the files beside it, by name."""
CHUNK = 1 << 20
"""Bytes that are read at a time."""
ADAPTER, BASE = "adapter_config.json", "base_model_name_or_path"
"""File with the settings of an adapter, and its key with the name of the base model."""
READERS = 8
"""Most threads that read one file."""
READER_BYTES = 1 << 20
"""Bytes of a file for each thread: the threads of a small file would cost more time than they save."""


def is_archive(path: Path) -> bool:
    """Return whether a file is a complete zip file, as `torch.save` writes it. Its entries are not read."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # a damaged end of the file
        return False


def check_archive(path: Path, tensors: bool = True) -> None:
    """Compare the entries of a file written by `torch.save` with their checksums. Entries are read in parallel.

    Args:
        path: The file.
        tensors: False leaves out the entries that hold only numbers of tensors.

    Raises:
        DamagedFileError: An entry is missing or has other content, or the file is no zip file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [each for each in archive.infolist() if tensors or "/data/" not in each.filename]
        readers = min(READERS, 1 + path.stat().st_size // READER_BYTES)
        with ThreadPoolExecutor(readers) as threads:
            list(threads.map(partial(_read, path), [entries[start::readers] for start in range(readers)]))
    except Exception as error:  # a damaged directory of entries can raise any exception
        raise DamagedFileError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def _read(path: Path, entries: Iterable[zipfile.ZipInfo]) -> None:
    # A file of its own: before Python 3.13, threads that share a ZipFile move each other's position.
    with zipfile.ZipFile(path) as archive:
        for entry in entries:
            _read_entry(archive, entry)


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    if entry.compress_type != zipfile.ZIP_STORED:  # torch compresses nothing. A compressed entry could fill the memory
        raise zipfile.BadZipFile(f"found the compressed entry {entry.filename!r}, expected entries that are stored")
    with archive.open(entry) as file:
        while file.read(CHUNK):  # compares the checksum at the end of the entry
            pass


@cache
def code_digest(*folders: str) -> str:
    """Return a SHA-256 of the source code of folders of this package, such as `data/tokenization`.

    It is part of the keys of caches, so that values of older code are not used.
    """
    package = Path(__file__).parents[1]
    files = sorted(file for folder in folders for file in (package / folder).rglob("*.py"))
    parts = [(str(file.relative_to(package)), digest_of(file)) for file in files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests_of(paths: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of files by name. The files are read in parallel.

    That of an adapter's settings leaves out the name of the base model, which is another one on another machine.
    """
    files = sorted(paths)
    with ThreadPoolExecutor() as threads:
        return dict(zip((file.name for file in files), threads.map(_movable_digest, files), strict=True))


def _movable_digest(path: Path) -> str:
    if path.name != ADAPTER:
        return digest_of(path)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # damaged
        return digest_of(path)
    if isinstance(settings, dict):
        settings.pop(BASE, None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def write_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Write `digests.json` of a folder.

    Args:
        folder: The folder.
        digests: SHA-256 by name of file (see `digests_of`).
    """
    (folder / DIGESTS).write_text(json.dumps(dict(digests), indent=1) + "\n", encoding="utf-8")


def read_digests(folder: Path) -> dict[str, str]:
    """Read `digests.json` of a folder.

    Raises:
        DamagedFileError: It is missing or not of its form.
    """
    path = folder / DIGESTS
    try:
        digests = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(digests, dict) or not all(
        isinstance(value, str) and Path(name).name == name for name, value in digests.items()
    ):
        raise DamagedFileError(f"{path}: found other content, expected an object with a SHA-256 for each file's name")
    return digests


def check_digests(folder: Path, share: slice = slice(None)) -> None:
    """Compare the files of a folder with its `digests.json`. Files that it does not list are not compared.

    Args:
        folder: The folder.
        share: Part of the files to compare, in alphabetical order.

    Raises:
        DamagedFileError: A file is missing or has other content, or `digests.json` is missing or damaged.
    """
    if changed := changed_files(folder, share):
        raise DamagedFileError(f"{folder / changed[0]} does not have the SHA-256 in {folder / DIGESTS}")


def check_listed(path: Path) -> None:
    """Compare one file with the `digests.json` beside it, if there is one.

    Raises:
        DamagedFileError: The file has other content or is not listed, or `digests.json` is damaged.
    """
    if not (path.parent / DIGESTS).is_file():
        return
    expected = read_digests(path.parent).get(path.name)
    if expected is None:
        raise DamagedFileError(f"{path} has no SHA-256 in {path.parent / DIGESTS}")
    if digest_of(path) != expected:
        raise DamagedFileError(f"{path} does not have the SHA-256 in {path.parent / DIGESTS}")


def changed_files(folder: Path, share: slice = slice(None), weights: bool = True) -> list[str]:
    """Return the names of the files that do not have the SHA-256 in the folder's `digests.json`.

    Args:
        folder: The folder.
        share: Part of the files to compare, in alphabetical order.
        weights: False leaves out the safetensors files, which are large.

    Raises:
        DamagedFileError: A file is missing, or `digests.json` is missing or damaged.
    """
    expected = read_digests(folder)
    names = sorted(name for name in expected if weights or not name.endswith(".safetensors"))[share]
    try:
        found = digests_of(folder / name for name in names)
    except OSError as error:
        raise DamagedFileError(f"{folder} is incomplete ({error}), expected the files in its {DIGESTS}") from error
    return [name for name in names if found[name] != expected[name]]
