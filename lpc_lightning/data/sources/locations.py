"""Places that hold rows: files, a JSON file of splits, folders, and data sets on the hub."""

from __future__ import annotations

import glob
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpc_lightning.data.sources.class_labels import name_labels
from lpc_lightning.data.sources.files import Rows, has_known_ending, json_rows, parse_json, reader_of
from lpc_lightning.data.sources.progress_bars import hidden_progress_bars
from lpc_lightning.data.sources.rows import BadRow, DataError, OnBad
from lpc_lightning.data.sources.strict_json import JsonParser, Marked
from lpc_lightning.data.sources.unread_files import warn_of_unread
from lpc_lightning.files.integrity import digest_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import Dataset

DEFAULT_SPLIT = "train"


class Location(ABC):
    """Place that holds rows. It may have splits of its own."""

    @property
    def has_splits(self) -> bool:
        """True if it has splits of its own. Otherwise a column of its rows may hold the splits."""
        return False

    @property
    def known_splits(self) -> tuple[str, ...]:
        """Names of its own splits that are known without the network."""
        return ()

    def own_splits(self) -> tuple[str, ...]:
        """Return the names of its own splits. Those of a hub data set are looked up on the hub.

        Raises:
            DataError: The hub cannot be read.
        """
        return self.known_splits

    @abstractmethod
    def rows(self, split: str | None, bad: OnBad, only: str | None = None) -> Rows:
        """Yield the rows of a split, each with its place.

        Args:
            split: One of the location's own splits. None if it has none.
            bad: Callback for each row that cannot be parsed.
            only: Column to read. Other columns may then be left out, and rows without the column too.

        Raises:
            DataError: The location has no such split, or cannot be read.
        """

    @abstractmethod
    def key(self, split: str | None) -> str:
        """Return a text that changes whenever `rows` would yield other rows or other places."""


@dataclass(frozen=True)
class Files(Location):
    """Files of rows, in the order of their paths."""

    paths: tuple[Path, ...]

    def rows(self, split: str | None, bad: OnBad, only: str | None = None) -> Rows:
        """See `Location.rows`."""
        for path, name in zip(self.paths, self._names, strict=True):
            yield from reader_of(path)(path, name, bad, only)

    def key(self, split: str | None) -> str:
        """See `Location.key`."""
        return ", ".join(_file_key(path, name) for path, name in zip(self.paths, self._names, strict=True))

    @property
    def _names(self) -> list[str]:
        """Names in places: those of the files, or their paths below a common folder if two files have one name."""
        names = [path.name for path in self.paths]
        if len(set(names)) == len(names):
            return names
        top = os.path.commonpath([path.absolute().parent for path in self.paths])
        return [path.absolute().relative_to(top).as_posix() for path in self.paths]


@dataclass(frozen=True)
class JsonSplits(Location):
    """A JSON file with a list of rows for each split."""

    path: Path
    splits: tuple[str, ...]
    has_splits = True

    @property
    def known_splits(self) -> tuple[str, ...]:
        """See `Location`."""
        return self.splits

    def rows(self, split: str | None, bad: OnBad, only: str | None = None) -> Rows:
        """See `Location.rows`."""
        name = _require(split, self.splits, self.path)
        parser = JsonParser()
        yield from json_rows(parse_json(self.path, parser)[name], f"{self.path.name}[{name}]", parser, bad)

    def key(self, split: str | None) -> str:
        """See `Location.key`."""
        return f"{_file_key(self.path, self.path.name)} [{split or DEFAULT_SPLIT}]"


@dataclass(frozen=True)
class FolderOfFiles(Location):
    """A folder with files for each split, as downloaded from the hub. `datasets` assigns the files to splits."""

    folder: Path
    files: Mapping[str, Files]
    has_splits = True

    @property
    def known_splits(self) -> tuple[str, ...]:
        """See `Location`."""
        return tuple(self.files)

    def rows(self, split: str | None, bad: OnBad, only: str | None = None) -> Rows:
        """See `Location.rows`."""
        yield from self.files[_require(split, self.known_splits, self.folder)].rows(None, bad, only)

    def key(self, split: str | None) -> str:
        """See `Location.key`."""
        return self.files[_require(split, self.known_splits, self.folder)].key(None)


@dataclass(frozen=True)
class SavedDataset(Location):
    """A folder written by `save_to_disk` of `datasets`: one data set, or one for each split."""

    name: str
    datasets: Mapping[str, Dataset] | Dataset

    @property
    def has_splits(self) -> bool:
        """See `Location`."""
        return isinstance(self.datasets, dict)

    @property
    def known_splits(self) -> tuple[str, ...]:
        """See `Location`."""
        return tuple(self.datasets) if isinstance(self.datasets, dict) else ()

    def rows(self, split: str | None, bad: OnBad, only: str | None = None) -> Rows:
        """See `Location.rows`."""
        dataset, name = self._split(split)
        dataset = dataset.with_format(None)  # a stored format may leave out columns, or make arrays of cells
        return dataset_rows(dataset if only is None else _columns(dataset, only), name, bad)

    def key(self, split: str | None) -> str:
        """See `Location.key`."""
        dataset, name = self._split(split)
        # The fingerprint is stored in the folder, so that it stays if a file is replaced.
        files = [Path(file["filename"]) for file in dataset.cache_files]
        contents = ", ".join(_file_key(path, path.name) for path in files)
        return f"dataset {name} {dataset._fingerprint} {contents}"

    def _split(self, split: str | None) -> tuple[Dataset, str]:
        if not isinstance(self.datasets, dict):
            return self.datasets, f"{self.name}[{DEFAULT_SPLIT}]"
        name = _require(split, tuple(self.datasets), self.name)
        return self.datasets[name], f"{self.name}[{name}]"


@dataclass(frozen=True)
class HubDataset(Location):
    """A data set on the Hugging Face hub."""

    name: str
    config: str | None
    has_splits = True

    def rows(self, split: str | None, bad: OnBad, only: str | None = None) -> Rows:
        """See `Location.rows`."""
        return dataset_rows(self._load(split), f"{self.name}[{split or DEFAULT_SPLIT}]", bad)

    def key(self, split: str | None) -> str:
        """See `Location.key`."""
        return f"dataset {self.name}[{split or DEFAULT_SPLIT}] {self._load(split)._fingerprint}"

    def own_splits(self) -> tuple[str, ...]:
        """See `Location.own_splits`."""
        import datasets

        with self._reading("its splits"):
            return tuple(datasets.get_dataset_split_names(self.name, self.config))

    def _load(self, split: str | None) -> Dataset:
        import datasets

        split = split or DEFAULT_SPLIT
        with self._reading(f"{self.name}[{split}]"):
            return datasets.load_dataset(self.name, self.config, split=split)

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        with hidden_progress_bars():
            try:
                yield
            except Exception as error:  # the hub raises many kinds of exceptions
                raise DataError(
                    f"There is no local file {self.name}, and the hub could not be read for {what}, configuration "
                    f"{self.config}: {type(error).__name__}: {error}. Use the path of a file, or an existing hub name, "
                    "configuration and split (data.path, data.config, data.train_split and its like)."
                ) from error


def open_location(path: str | Path | Sequence[str], config: str | None = None) -> Location:
    """Return the location of a path.

    Args:
        path: A file, a folder, a pattern such as `data/*.jsonl`, a list of files and patterns, or a hub name.
        config: Configuration of a folder from the hub or of a hub data set.

    Raises:
        DataError: There is no such file or folder, a file cannot be read, a list has a file twice or a folder, or a
            configuration is given for rows without one.
    """
    if not isinstance(path, str | Path):
        _refuse_config(config, ", ".join(map(str, path)), "plain files")
        return Files(_each_once([file for each in path for file in _files(each)]))
    local = Path(path).expanduser()
    if local.is_dir():
        return _open_folder(local, config)
    if not local.is_file() and not glob.has_magic(str(path)):
        _refuse_missing(str(path), local)
        return HubDataset(str(path), config)
    files = _files(path)
    _refuse_config(config, path, "plain files")
    splits = _json_splits(files[0]) if len(files) == 1 else None
    return Files(files) if splits is None else JsonSplits(files[0], splits)


def _refuse_config(config: str | None, path: object, kind: str) -> None:
    if config is not None:
        raise DataError(
            f"{path}: found config={config!r} for {kind}, which have no configurations. Remove it (`data.config`)."
        )


def _files(path: str | Path) -> tuple[Path, ...]:
    """Return a file, or the files that match a pattern, sorted."""
    local = Path(path).expanduser()
    if local.is_file():
        files: tuple[Path, ...] = (local,)
    else:
        # `**` matches a file once for each way to divide its folders.
        matches = set(glob.glob(str(local), recursive=True)) if glob.has_magic(str(local)) else set()
        files = tuple(Path(match) for match in sorted(matches) if Path(match).is_file())
    if not files and local.is_dir():
        raise DataError(
            f"{path}: found a folder in a list of files, expected a file or a pattern, such as {path}/*.jsonl. A "
            "folder must be the whole path."
        )
    if not files:
        what = "that matches the pattern " if glob.has_magic(str(local)) else ""
        raise DataError(f"There is no file {what}{path} (looked at {local.absolute()}). Correct the path.")
    for file in files:
        reader_of(file)
    return files


def _each_once(files: Sequence[Path]) -> tuple[Path, ...]:
    """Return the files of a list.

    Raises:
        DataError: A file occurs twice, so that its rows would be read twice.
    """
    first: dict[Path, Path] = {}
    for file in files:
        other = first.setdefault(file.resolve(), file)
        if other is not file:
            also = "" if other == file else f", also as {other}"
            raise DataError(
                f"{file}: found the file twice in a list{also}, expected each file once. Remove it, or narrow a "
                "pattern that covers it. A mixture repeats pairs by a weight (`--data PreferenceMixture`)."
            )
    return tuple(files)


def _json_splits(path: Path) -> tuple[str, ...] | None:
    """Return the names of the splits if a JSON file holds a list of objects for each split."""
    if path.suffix.lower() != ".json":
        return None
    content = parse_json(path, JsonParser())
    if not isinstance(content, dict) or not content or set(content) == {"data"}:
        return None
    is_split = [
        isinstance(rows, list) and all(isinstance(row, dict | Marked) for row in rows) for rows in content.values()
    ]
    return tuple(content) if all(is_split) and any(content.values()) else None


_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")


def _open_folder(folder: Path, config: str | None) -> Location:
    import datasets

    is_saved = any((folder / name).is_file() for name in _SAVED)
    if is_saved:
        _refuse_config(config, folder, "folders written by `save_to_disk`")
    with hidden_progress_bars():
        try:
            if is_saved:
                saved = SavedDataset(folder.name, datasets.load_from_disk(str(folder)))
                warn_of_unread(folder, None, [])
                return saved
            by_split = datasets.load_dataset_builder(str(folder), config).config.data_files
            files = {str(split): Files(tuple(Path(str(file)) for file in paths)) for split, paths in by_split.items()}
        except Exception as error:  # datasets raises many kinds of exceptions
            content = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
            raise DataError(
                f"The folder {folder} cannot be read as a data set: {error}. It holds: {content or 'nothing'}. "
                "Expected files of rows, or a folder written by `save_to_disk` of datasets."
            ) from error
    for split_files in files.values():
        for file in split_files.paths:
            reader_of(file)
    warn_of_unread(folder, config, [file for split_files in files.values() for file in split_files.paths])
    return FolderOfFiles(folder, files)


def _refuse_missing(path: str, local: Path) -> None:
    """Refuse what looks like a path of this machine and not like the name of a data set."""
    if path.startswith(("/", ".", "~")) or path.count("/") > 1 or has_known_ending(path):
        raise DataError(f"There is no file or folder {path} (looked at {local.absolute()}).")


def _require(split: str | None, splits: Sequence[str], place: object) -> str:
    name = split or DEFAULT_SPLIT
    if name not in splits:
        raise DataError(
            f"{place} has no split {name!r}. It has: {', '.join(splits)}. Set the split (data.train_split, "
            "data.validation_split, data.test_split; adapt: `--split`) to one of these, or give the files of one split "
            "as the path: evaluate scores the split test."
        )
    return name


def _file_key(path: Path, name: str) -> str:
    """Return the name and the SHA-256 of a file."""
    return f"file {name} {digest_of(path)}"


def dataset_rows(dataset: Dataset, name: str, bad: OnBad) -> Rows:
    """Yield the rows of a data set, with the names of class labels. Rows whose text is not UTF-8 are bad."""
    number, named = 0, name_labels(dataset.features.to_dict())
    while number < len(dataset):
        try:
            for row in dataset.skip(number) if number else dataset:
                number += 1
                yield f"{name} row {number}", row if named is None else named(row)
        except UnicodeDecodeError as error:
            number += 1
            bad(f"{name} row {number}", BadRow("invalid UTF-8", f"{error.reason} at byte {error.start} of a text"))


def _columns(dataset: Dataset, only: str) -> Any:
    return dataset.select_columns([only]) if only in dataset.column_names else dataset.select([])
