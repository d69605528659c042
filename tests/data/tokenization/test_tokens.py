import json
import logging
import multiprocessing
import os
import pickle
import shutil
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from torch.utils.data import DataLoader

from lpc_lightning.data.sources.example_source import ExamplesInMemory, RowSource
from lpc_lightning.data.sources.formats import Columns
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.data.tokenization.lengths import LengthPolicy
from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.data.tokenization.token_cache import default_cache_dir, load_or_tokenize
from lpc_lightning.data.tokenization.token_mixture import TokenMixture
from lpc_lightning.data.tokenization.tokens import TokenStore, tokenize_examples
from lpc_lightning.types import PreferenceExample
from tests.fixtures.real_data import DATA_DIR

PREFERENCES = DATA_DIR / "preferences"
ANY_LENGTH = LengthPolicy()


def rows(n: int = 6) -> list[dict]:
    return [
        {"id": f"r{i}", "prompt": f"Egg {i}?", "chosen": "yes " * (i + 1), "rejected": "no", "factor": "é🥚"}
        for i in range(n)
    ]


@pytest.fixture
def template(tokenizers):
    return make_template(tokenizers["chatml"])


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "tokens").iterdir())


def test_store_returns_the_pairs(write_rows, template, cache):
    source = RowSource(str(write_rows(rows())))
    store, report = load_or_tokenize(source, template, ANY_LENGTH, cache_dir=cache)
    expected = list(tokenize_examples(source.read(DataReport()), template, ANY_LENGTH, DataReport()))
    assert list(store) == expected
    assert (store[-1], store[1:3], len(store)) == (expected[-1], expected[1:3], 6)
    assert (report.read, report.kept) == (6, 6)
    for index in (6, -7):
        with pytest.raises(IndexError):
            store[index]
    pieces = [[len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)] for p in expected]
    assert store.piece_lengths.tolist() == pieces


def test_cache_second_load_reads_no_source(write_rows, template, cache, monkeypatch):
    source = RowSource(str(write_rows([*rows(), {"prompt": "p"}])))
    first, report = load_or_tokenize(source, template, ANY_LENGTH, bad_rows="skip", cache_dir=cache)
    monkeypatch.setattr(type(template), "tokenize", lambda *_: pytest.fail("tokenized again"))
    second, again = load_or_tokenize(source, template, ANY_LENGTH, bad_rows="skip", cache_dir=cache)
    assert list(second) == list(first)
    assert again == report
    assert report.bad == {"missing answer": 1}


def test_cache_other_settings_have_another_entry(write_rows, template, tokenizers, cache):
    path = str(write_rows([{**row, "split": "train", "other": "test"} for row in rows()]))
    ways = [
        (RowSource(path), template, ANY_LENGTH, "error"),
        (RowSource(path), template, ANY_LENGTH, "skip"),
        (RowSource(path), template, LengthPolicy(max_length=500), "error"),
        (RowSource(path), make_template(tokenizers["chatml"], "plain"), ANY_LENGTH, "error"),
        (RowSource(path, columns=Columns(factor="id", id="factor")), template, ANY_LENGTH, "error"),
        (RowSource(path, split="train"), template, ANY_LENGTH, "error"),
        (RowSource(path, split="test", split_column="other"), template, ANY_LENGTH, "error"),
        (RowSource(path, held_out=False, held_out_share=0.01), template, ANY_LENGTH, "error"),
        (RowSource(path, held_out=False, held_out_share=0.02), template, ANY_LENGTH, "error"),
    ]
    for number, (source, how, lengths, bad_rows) in enumerate(ways, 1):
        load_or_tokenize(source, how, lengths, bad_rows=bad_rows, cache_dir=cache)
        assert len(entries(cache)) == number
    write_rows(rows(5))
    store, _ = load_or_tokenize(RowSource(path), template, ANY_LENGTH, cache_dir=cache)
    assert len(store) == 5


def test_cache_hub_data_set_by_fingerprint(monkeypatch, template, cache):
    dataset = datasets.Dataset.from_list(rows())
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: dataset)
    source = RowSource("org/name", columns=Columns(id="none"))
    store, _ = load_or_tokenize(source, template, ANY_LENGTH, cache_dir=cache)
    assert store[0].id == "org/name[train] row 1"
    dataset = datasets.Dataset.from_list(rows(2))
    assert len(load_or_tokenize(source, template, ANY_LENGTH, cache_dir=cache)[0]) == 2


def test_examples_in_memory(template, cache):
    examples = [PreferenceExample(str(i), ({"role": "user", "content": "Hi"},), "a" * i, "no") for i in range(4)]
    store, report = load_or_tokenize(
        ExamplesInMemory(examples, "seed 1"), template, ANY_LENGTH, bad_rows="skip", cache_dir=cache
    )
    assert [pair.id for pair in store] == ["1", "2", "3"]
    assert (report.read, report.kept, report.bad) == (4, 3, {"empty answer": 1})
    assert report.bad_places["empty answer"] == ["id '0' (the answer is '')"]
    assert ExamplesInMemory(examples, "seed 1").key() != ExamplesInMemory(examples, "seed 2").key()


def test_bad_rows_are_listed_in_one_error(write_rows, template, cache):
    lines = [*rows(2), "{broken", {"prompt": "p", "chosen": "", "rejected": "b"}, *rows(1), {"chosen": "a"}]
    source = RowSource(str(write_rows(lines)))
    with pytest.raises(DataError) as caught:
        load_or_tokenize(source, template, ANY_LENGTH, cache_dir=cache)
    text = str(caught.value)
    assert text.startswith("3 rows cannot be used.")
    for part in ("pairs.jsonl line 3", "pairs.jsonl line 4", "pairs.jsonl line 6", "invalid JSON", "bad_rows skip"):
        assert part in text
    assert entries(cache) == []
    store, report = load_or_tokenize(source, template, ANY_LENGTH, bad_rows="skip", cache_dir=cache)
    assert len(store) == 3
    assert report.metrics()["data/bad/invalid_json"] == 1
    assert report.read == report.kept + sum(report.bad.values()) == 6


def test_report_counts_every_row(write_rows, template, cache):
    many = [{**row, "split": "test" if i % 3 == 0 else "train"} for i, row in enumerate(rows(30))]
    source = RowSource(str(write_rows([*many, "7"])), split="train", held_out=False, held_out_share=0.3)
    store, report = load_or_tokenize(source, template, LengthPolicy(max_length=60), bad_rows="skip", cache_dir=cache)
    assert report.held_apart > 0
    assert report.dropped["pair longer than max_length"] > 0
    assert report.other_splits == {"test": 10}
    left_out = (report.bad, report.dropped, report.other_splits)
    assert report.read == 31 == len(store) + report.held_apart + sum(sum(counts.values()) for counts in left_out)
    other, _ = load_or_tokenize(
        RowSource(source.path, split="train", held_out=True, held_out_share=0.3),
        template, ANY_LENGTH, bad_rows="skip", cache_dir=cache,
    )  # fmt: skip
    assert not {pair.id for pair in store} & {pair.id for pair in other}


def test_no_pair_left_is_an_error(write_rows, template, cache):
    source = RowSource(str(write_rows(rows())))
    with pytest.raises(DataError, match=r"No pair is left(.|\n)*6 dropped: pair longer than max_length"):
        load_or_tokenize(source, template, LengthPolicy(max_length=3), cache_dir=cache)
    other = r"No row belongs to the split(.|\n)*6 left to split 'train'(.|\n)*The rows belong to train\. Set the split"
    with pytest.raises(DataError, match=other):
        load_or_tokenize(RowSource(source.path, split="validation"), template, ANY_LENGTH, cache_dir=cache)
    assert entries(cache) == []


def test_cut_pairs_are_counted(write_rows, template, cache):
    source = RowSource(str(write_rows(rows())))
    store, report = load_or_tokenize(source, template, LengthPolicy(30, too_long="truncate_answer"), cache_dir=cache)
    cut = [pair for pair in store if pair.chosen_ids[-1] != template.end_id]
    assert report.cut == {"answers": len(cut)}
    assert cut


def test_long_pair_under_error(write_rows, template, cache):
    source = RowSource(str(write_rows(rows())))
    with pytest.raises(DataError, match="Pair 'r0': pair longer than max_length"):
        load_or_tokenize(source, template, LengthPolicy(5, too_long="error"), cache_dir=cache)
    assert entries(cache) == []


def test_settings_are_checked(write_rows, template, cache):
    with pytest.raises(DataError, match=r"data\.bad_rows: found 'ignore', expected 'error' or 'skip'"):
        load_or_tokenize(RowSource(str(write_rows(rows()))), template, ANY_LENGTH, bad_rows="ignore", cache_dir=cache)
    cache.touch()
    with pytest.raises(DataError, match=r"cannot be written.*LPC_LIGHTNING_CACHE"):
        load_or_tokenize(RowSource(str(write_rows(rows()))), template, ANY_LENGTH, cache_dir=cache)


def cut_short(entry: Path) -> None:
    path = entry / "pairs.arrow"
    path.write_bytes(path.read_bytes()[:-40])


def turn_a_bit(entry: Path) -> None:
    path = entry / "pairs.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def without_pairs(entry: Path) -> None:
    (entry / "pairs.arrow").unlink()


def without_report(entry: Path) -> None:
    (entry / "report.json").unlink()


def other_report(entry: Path) -> None:
    (entry / "report.json").write_text('{"report": {}}')


def empty(entry: Path) -> None:
    without_pairs(entry)
    without_report(entry)


def a_file(entry: Path) -> None:
    empty(entry)
    entry.rmdir()
    entry.touch()


@pytest.mark.parametrize("damage", [cut_short, turn_a_bit, without_pairs, without_report, other_report, empty, a_file])
def test_cache_damaged_entry_is_rebuilt(write_rows, template, cache, caplog, damage):
    source = RowSource(str(write_rows(rows())))
    pairs = list(load_or_tokenize(source, template, ANY_LENGTH, cache_dir=cache)[0])
    damage(entries(cache)[0])
    with caplog.at_level(logging.WARNING):
        store, report = load_or_tokenize(source, template, ANY_LENGTH, cache_dir=cache)
    assert "damaged" in caplog.text
    assert list(store) == pairs
    assert report.kept == 6
    assert len(entries(cache)) == 1
    caplog.clear()
    load_or_tokenize(source, template, ANY_LENGTH, cache_dir=cache)
    assert not caplog.text


def test_cache_ignores_unfinished_entries(write_rows, template, cache):
    source = RowSource(str(write_rows(rows())))
    load_or_tokenize(source, template, ANY_LENGTH, cache_dir=cache)
    entry = entries(cache)[0]
    young, old = (entry.with_name(f"{entry.name}.{age}.unfinished") for age in ("young", "old"))
    old.mkdir()
    (old / "pairs.arrow").write_bytes(b"half")
    entry.rename(young)
    (young / "report.json").unlink()
    os.utime(old, times=(time.time() - 2 * 24 * 3600,) * 2)
    store, _ = load_or_tokenize(source, template, ANY_LENGTH, cache_dir=cache)
    assert len(store) == 6
    assert entries(cache) == [entry, young]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_cache_two_processes_make_one_entry(write_rows, template, cache, monkeypatch):
    source = RowSource(str(write_rows(rows())))
    fork = multiprocessing.get_context("fork")
    both_at_work, answers = fork.Barrier(2), fork.Queue()
    tokenize = type(template).tokenize

    def together(self, example, note):
        both_at_work.wait(timeout=30)
        return tokenize(self, example, note)

    def work() -> None:
        store, report = load_or_tokenize(source, template, ANY_LENGTH, cache_dir=cache)
        answers.put((list(store), report.kept))

    # Without locks, both processes tokenize.
    monkeypatch.setattr("lpc_lightning.data.tokenization.token_cache.one_at_a_time", lambda entry: nullcontext())
    monkeypatch.setattr(type(template), "tokenize", together)
    workers = [fork.Process(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    one, other = answers.get(timeout=30), answers.get(timeout=30)
    for worker in workers:
        worker.join(timeout=30)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert one == other
    assert len(entries(cache)) == 1
    monkeypatch.undo()
    assert list(load_or_tokenize(source, template, ANY_LENGTH, cache_dir=cache)[0]) == one[0]


def test_cache_slower_process_replaces_damaged_entry(write_rows, template, cache, monkeypatch):
    source = RowSource(str(write_rows(rows())))
    load_or_tokenize(source, template, ANY_LENGTH, cache_dir=cache)
    entry = entries(cache)[0]
    aside = entry.with_name("aside")
    entry.rename(aside)
    tokenize = type(template).tokenize

    def meanwhile(self, example, note):
        if aside.exists():
            aside.rename(entry)
            turn_a_bit(entry)
        return tokenize(self, example, note)

    monkeypatch.setattr(type(template), "tokenize", meanwhile)
    store, _ = load_or_tokenize(source, template, ANY_LENGTH, cache_dir=cache)
    assert len(store) == 6
    assert entries(cache) == [entry]
    monkeypatch.setattr(type(template), "tokenize", lambda *_: pytest.fail("tokenized again"))
    load_or_tokenize(source, template, ANY_LENGTH, cache_dir=cache)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_store_pickle_reopens_the_file(write_rows, template, cache):
    store, _ = load_or_tokenize(RowSource(str(write_rows(rows(50)))), template, ANY_LENGTH, cache_dir=cache)
    pickled = pickle.dumps(store)
    assert len(pickled) < 500
    assert list(pickle.loads(pickled)) == list(store)
    loader = DataLoader(store, batch_size=8, num_workers=1, collate_fn=list)
    assert [pair for batch in loader for pair in batch] == list(store)


def test_store_without_its_folder(write_rows, template, cache):
    """Pairs that have been opened stay usable, also with other labels and reference values."""
    path = write_rows([row | {"weight": n} for n, row in enumerate(rows(4))])
    store, _ = load_or_tokenize(RowSource(path), template, ANY_LENGTH, cache_dir=cache)
    mixture = TokenMixture({"one": store}, [np.array([0, 3, 3])])
    before, repeated = list(store), list(mixture)
    shutil.rmtree(cache)
    logps, swaps = np.arange(8.0).reshape(4, 2), np.array([True, False, False, True])
    for pairs, places, expected in ((store, [0, 1, 2, 3], before), (mixture, [0, 3, 3], repeated)):
        other = pairs.with_reference(logps[places]).relabelled(swaps[places], "noise").relabelled(swaps[places], "more")
        assert type(other) is type(pairs)
        assert list(pairs) == expected
        known = [replace(pair, reference_logps=tuple(logps[n])) for pair, n in zip(expected, places, strict=True)]
        assert list(other) == [each.swapped() if swaps[n] else each for each, n in zip(known, places, strict=True)]
        assert (other.noise, pairs.noise) == ("more", "")
        assert other.fingerprint == pairs.fingerprint
        assert other.flips_digest != pairs.flips_digest
        np.testing.assert_array_equal(other.flipped, swaps[places])


def test_cache_file_is_readable_by_datasets(write_rows, template, cache):
    store, _ = load_or_tokenize(RowSource(str(write_rows(rows()))), template, ANY_LENGTH, cache_dir=cache)
    dataset = datasets.Dataset.from_file(str(store.folder / "pairs.arrow"))
    assert dataset["chosen_ids"][:] == [pair.chosen_ids for pair in store]


def test_store_many_record_batches(template, cache):
    examples = [PreferenceExample(str(i), ({"role": "user", "content": "Hi"},), f"yes {i}", "no") for i in range(2500)]
    store, _ = load_or_tokenize(ExamplesInMemory(examples, "x"), template, ANY_LENGTH, cache_dir=cache)
    assert [store[i].id for i in (0, 1023, 1024, 2499)] == ["0", "1023", "1024", "2499"]
    assert len(store.piece_lengths) == 2500


def test_default_cache_dir(monkeypatch, tmp_path, write_rows, template):
    monkeypatch.delenv("LPC_LIGHTNING_CACHE", raising=False)
    assert default_cache_dir() == Path.home() / ".cache" / "lpc_lightning"
    monkeypatch.setenv("LPC_LIGHTNING_CACHE", str(tmp_path / "there"))
    store, _ = load_or_tokenize(RowSource(str(write_rows(rows()))), template, ANY_LENGTH)
    assert isinstance(store, TokenStore)
    assert len(entries(tmp_path / "there")) == 1


@pytest.mark.real
@pytest.mark.skipif(not PREFERENCES.is_dir(), reason="no $LPC_DATA_DIR/preferences")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("hh_helpful_harmless", 4632),
        ("hh_relabeled_objective", 4020),
        ("dsp_domain_pairs", 2607),
        ("ultrafeedback_binarized_1200", 1193),
        ("polite_vs_impolite_1100", 1093),
    ],
)
def test_real_preferences(name, count, tokenizers, cache):
    """Every row is read, and a sample is tokenized and decoded to its text. Train and test contain all rows."""
    path = PREFERENCES / f"{name}.jsonl"
    reports = {split: DataReport() for split in ("train", "test")}
    examples = {split: list(RowSource(str(path), split=split).read(reports[split])) for split in reports}
    assert len(examples["train"]) + len(examples["test"]) == count
    assert not any(report.bad for report in reports.values())
    prompts = {split: {json.dumps(example.prompt) for example in examples[split]} for split in examples}
    assert not prompts["train"] & prompts["test"]
    for kind in ("llama3", "mistral_first", "base_with_bos"):
        template = make_template(tokenizers[kind])
        sample = ExamplesInMemory(examples["test"][:40], name)
        store, report = load_or_tokenize(sample, template, LengthPolicy(), cache_dir=cache)
        assert report.kept == len(store) == 40
        for pair, example in zip(store, sample.examples, strict=True):
            sequence = tokenizers[kind].decode(pair.prompt_ids + pair.chosen_ids)
            end = tokenizers[kind].decode([template.end_id])
            assert sequence.endswith(example.chosen + end)
            assert example.prompt[-1]["content"].strip() in sequence
