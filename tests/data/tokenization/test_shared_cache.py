"""Tests of a token cache that several processes and users share, and of entries with flipped bits."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpc_lightning.data.sources.example_source import ExamplesInMemory
from lpc_lightning.data.tokenization import token_cache
from lpc_lightning.data.tokenization.lengths import LengthPolicy
from lpc_lightning.data.tokenization.template import Template
from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.data.tokenization.token_cache import load_or_tokenize
from lpc_lightning.files import integrity
from lpc_lightning.types import PreferenceExample
from tests.fixtures.damage import bit_flips, zeroed_blocks

EXAMPLES = [
    PreferenceExample(str(number), ({"role": "user", "content": f"Egg {number}?"},), "yes " * (number % 3 + 1), "no")
    for number in range(5)
]


@pytest.fixture
def template(tokenizers: Any) -> Template:
    return make_template(tokenizers["chatml"])


@pytest.fixture
def load(template: Template, tmp_path: Path) -> Any:
    """Function that loads the pairs of a source from one cache."""

    def run(key: str = "eggs", examples: Any = EXAMPLES) -> Any:
        source = ExamplesInMemory(examples, key)
        return load_or_tokenize(source, template, LengthPolicy(), bad_rows="skip", cache_dir=tmp_path)

    return run


def entry_of(root: Path) -> Path:
    (entry,) = (root / "tokens").iterdir()
    return entry


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report.json", "pairs.arrow"])
def test_damaged_entry_is_equal_or_rebuilt(
    name: str, load: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, report = load()
    pairs, file = list(store), entry_of(tmp_path) / name
    good, rebuilt = file.read_bytes(), 0
    number = len(good) if name == "report.json" else 200
    damaged = [*bit_flips(good, number), *zeroed_blocks(good, max(16, len(good) // 40))]
    assert len(damaged) > 200
    for bad in damaged:
        file.write_bytes(bad)
        caplog.clear()
        store, found = load()
        assert (list(store), found) == (pairs, report)
        rebuilt += "damaged" in caplog.text
        assert file.read_bytes() == good or "damaged" not in caplog.text
    assert rebuilt > 0.8 * len(damaged)


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077])
def test_entries_follow_the_umask(mask: int, load: Any, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        load()
    finally:
        os.umask(before)
    entry = entry_of(tmp_path)
    assert entry.stat().st_mode & 0o777 == 0o777 & ~mask
    files = [*entry.iterdir(), *(tmp_path / "locks").iterdir()]
    assert len(files) == 3
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~mask}


def test_dangling_leftovers_are_removed(load: Any, tmp_path: Path) -> None:
    root = tmp_path / "tokens"
    root.mkdir()
    dangling, young = root / "a.unfinished", root / "b.unfinished"
    for link in (dangling, young):
        link.symlink_to(tmp_path / "nowhere")
    day = time.time() - 25 * 3600
    os.utime(dangling, (day, day), follow_symlinks=False)
    (file := root / "c.unfinished").touch()
    os.utime(file, (day, day))
    load()
    assert [link.is_symlink() for link in (dangling, young)] == [False, True]
    assert not file.exists()


def test_dangling_entry_is_replaced(load: Any, tmp_path: Path) -> None:
    store, _ = load()
    entry = entry_of(tmp_path)
    entry.rename(tmp_path / "aside")
    entry.symlink_to(tmp_path / "nowhere")
    assert list(load()[0]) == list(store)
    assert entry.is_dir()
    assert not entry.is_symlink()


def _load_often(load: Any, times: int, failures: Any) -> None:
    logging.disable()
    for _ in range(times):
        try:
            store, report = load()
            if len(list(store)) != 5 or report.kept != 5:
                failures.put(f"{len(store)} pairs")
        except Exception as error:
            failures.put(f"{type(error).__name__}: {error}")


def _rename_often(entry: Path, stop: Any) -> None:
    number = 0
    while not stop.is_set():
        number += 1
        try:
            entry.rename(entry.with_name(f"{entry.name}.{os.getpid()}.{number}.unfinished"))
        except OSError:
            time.sleep(0.0005)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_entry_that_others_rename_is_loaded(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load()
    fork = multiprocessing.get_context("fork")
    failures, stop = fork.Queue(), fork.Event()
    renamer = fork.Process(target=_rename_often, args=(entry_of(tmp_path), stop))
    loaders = [fork.Process(target=_load_often, args=(load, 100, failures)) for _ in range(3)]
    for process in (renamer, *loaders):
        process.start()
    for process in loaders:
        process.join(timeout=120)
    stop.set()
    renamer.join(timeout=30)
    assert [process.exitcode for process in loaders] == [0, 0, 0]
    found = []
    while not failures.empty():
        found.append(failures.get())
    assert found == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_damaged_entry_is_repaired_by_several(load: Any, tmp_path: Path) -> None:
    store, _ = load()
    entry = entry_of(tmp_path)
    good = {file.name: file.read_bytes() for file in entry.iterdir()}
    fork = multiprocessing.get_context("fork")
    failures = fork.Queue()
    loaders = [fork.Process(target=_load_often, args=(load, 60, failures)) for _ in range(3)]
    for process in loaders:
        process.start()
    flips = bit_flips(good["pairs.arrow"], 500)
    while any(process.is_alive() for process in loaders):
        (entry / "pairs.arrow.new").write_bytes(next(flips, good["pairs.arrow"]))
        (entry / "pairs.arrow.new").replace(entry / "pairs.arrow")
        time.sleep(0.005)
    for process in loaders:
        process.join(timeout=60)
    assert failures.empty()
    assert list(load()[0]) == list(store)


# Keys


def test_token_digest_is_that_of_the_tokens(load: Any, tmp_path: Path) -> None:
    store, _ = load()
    renamed = [
        PreferenceExample(f"other {each.id}", each.prompt, each.chosen, each.rejected, annotator="a")
        for each in EXAMPLES
    ]
    other, _ = load("other", renamed)
    assert other.folder != store.folder
    assert other.token_digest == store.token_digest
    assert other.fingerprint != store.fingerprint
    swapped = [PreferenceExample(each.id, each.prompt, each.rejected, each.chosen) for each in EXAMPLES]
    shifted = [*EXAMPLES[1:], EXAMPLES[0]]
    digests = {load(str(number), each)[0].token_digest for number, each in enumerate((EXAMPLES, swapped, shifted))}
    assert len(digests) == 3


def test_digest_does_not_depend_on_row_batches(template: Template, tmp_path: Path) -> None:
    many = [PreferenceExample(str(n), EXAMPLES[0].prompt, "yes " * (n % 5 + 1), "no") for n in range(1500)]
    source = ExamplesInMemory(many, "many")
    store, _ = load_or_tokenize(source, template, LengthPolicy(), cache_dir=tmp_path)
    digest = hashlib.sha256()
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        values = [getattr(pair, name) for pair in store]
        digest.update(np.array([len(ids) for ids in values], np.int64).tobytes())
        digest.update(np.array([token for ids in values for token in ids], np.int32).tobytes())
    assert store.token_digest == digest.hexdigest()


@pytest.mark.parametrize("change", ["code", "transformers", "tokenizers"])
def test_entry_depends_on_code_and_versions(change: str, load: Any, tmp_path: Path, monkeypatch: Any) -> None:
    load()
    if change == "code":
        monkeypatch.setattr(token_cache, "code_digest", lambda *folders: "other code")
    else:
        monkeypatch.setattr(getattr(token_cache, change), "__version__", "0.0")
    load()
    assert len(list((tmp_path / "tokens").iterdir())) == 2


def test_code_digest_changes_with_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "part").mkdir()
    monkeypatch.setattr(integrity, "__file__", str(tmp_path / "files" / "integrity.py"))
    digests = []
    for content in ("a = 1", "a = 2"):
        (tmp_path / "part" / "code.py").write_text(content)
        integrity.code_digest.cache_clear()
        digests.append(integrity.code_digest("part"))
    integrity.code_digest.cache_clear()
    assert len(set(digests)) == 2


# A template that writes the date

DATED = (
    "{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\nToday is {{ date_string }}.\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_dated_template_has_a_fixed_day(fresh: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = fresh("chatml")
    assert make_template(tokenizer).day == ""
    tokenizer.chat_template = DATED
    tokenizer.name_or_path = "dated"  # a name is reported once in a process, and other tests use this tokenizer
    template = make_template(tokenizer)
    rendered = template.render(EXAMPLES[0].prompt)
    assert "Today is 26 Jul 2024." in rendered
    assert time.strftime("%d %b %Y") not in rendered
    assert template.day == "2024-07-26"
    assert "sees 26 Jul 2024 as today" in caplog.text
    own = make_template(tokenizer, arguments={"date_string": "1 May 1900"})
    assert "Today is 1 May 1900." in own.render(EXAMPLES[0].prompt)
    assert own.fingerprint != template.fingerprint
