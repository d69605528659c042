"""Tests of the pair cache: several processes, unchanged values, damaged parts, and values in batches."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lpc_lightning.data import PaddedLayout, SyntheticPreferences
from lpc_lightning.data.tokenization.tokens import TokenStore
from lpc_lightning.policy import TinyPolicy
from lpc_lightning.reference.pair_cache import PairCache
from tests.fixtures.damage import bit_flips, zeroed_blocks
from tests.fixtures.processes import ForkedProcess

PAIRS = 40
EVERY = np.arange(PAIRS)
KEY = {"weights": "a", "precision": "32-true"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    data = SyntheticPreferences(train_pairs=PAIRS, cache_dir=str(tmp_path_factory.mktemp("tokens")))
    store = data.load("train", TinyPolicy().load_tokenizer())
    assert store is not None
    return store


@pytest.fixture
def cache(store: TokenStore, tmp_path: Path) -> PairCache:
    return PairCache("reference", 2, KEY, store, tmp_path)


def values(*indices: int, salt: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    return np.array(indices), np.array([[-index - salt, -2.5 * index - salt] for index in indices], dtype=np.float32)


def stored_values(cache: PairCache) -> dict[int, tuple[float, float]]:
    return {index: tuple(pair) for index, pair in enumerate(cache.read(EVERY).tolist()) if not np.isnan(pair[0])}


def test_read_returns_added_values_only(cache: PairCache) -> None:
    assert cache.read(EVERY).shape == (PAIRS, 2)
    assert np.isnan(cache.read(EVERY)).all()
    assert not cache.folder.exists(), "reading writes nothing"
    cache.add(*values(3, 1))
    cache.add(*values(0))
    assert stored_values(cache) == {0: (0.0, 0.0), 1: (-1.0, -2.5), 3: (-3.0, -7.5)}


def test_add_follows_the_umask(cache: PairCache) -> None:
    before = os.umask(0o027)
    try:
        cache.add(np.array([0]), np.zeros((1, 2)))
    finally:
        os.umask(before)
    (part,) = cache.folder.glob("*.npz")
    assert part.stat().st_mode & 0o777 == 0o640


def test_read_follows_requested_order(cache: PairCache) -> None:
    cache.add(*values(3, 1))
    cache.add(*values(1, 0, 7, salt=0.125))
    actual = cache.read(np.array([7, 1, 2, 3]))
    assert np.array_equal(actual, [[-7.125, -17.625], [-1, -2.5], [np.nan] * 2, [-3, -7.5]], equal_nan=True)
    assert cache.read(np.array([], dtype=int)).shape == (0, 2)


def test_read_has_requested_width_and_type(store: TokenStore, tmp_path: Path) -> None:
    wide = PairCache("rows", 5, KEY, store, tmp_path, np.float32)
    rows = np.random.default_rng(0).random((2, 5)).astype(np.float32)
    wide.add(np.array([4, 2]), rows)
    actual = wide.read(np.array([2, 4]))
    assert actual.dtype == np.float32
    assert np.array_equal(actual, rows[::-1])
    assert wide.folder.parent == tmp_path / "rows"


def test_add_keeps_existing_values(cache: PairCache) -> None:
    cache.add(*values(1, 2))
    cache.add(*values(2, 3, salt=0.125))
    assert stored_values(cache) == {1: (-1, -2.5), 2: (-2, -5), 3: (-3.125, -7.625)}


@pytest.mark.parametrize("exact", [np.float32, np.float64])
def test_read_is_bitwise_exact(exact: type, cache: PairCache) -> None:
    logps = (-np.random.default_rng(0).random((PAIRS, 2)) * 1000).astype(exact)
    cache.add(np.arange(PAIRS), logps)
    assert np.array_equal(cache.read(EVERY).astype(exact), logps)


def flip_a_bit(part: Path) -> None:
    content = bytearray(part.read_bytes())
    at = content.find(np.float32(-7.5).tobytes())
    assert at > 0
    content[at] ^= 1
    part.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of a value": flip_a_bit,
    "cut short": lambda part: part.write_bytes(part.read_bytes()[:-30]),
    "empty": lambda part: part.write_bytes(b""),
    "something else": lambda part: part.write_bytes(b"no zip at all" * 50),
    "indices beyond the data": lambda part: np.savez(part, indices=np.array([PAIRS]), values=np.zeros((1, 2))),
    "fewer values than indices": lambda part: np.savez(part, indices=np.arange(3), values=np.zeros((2, 2))),
    "no values": lambda part: np.savez(part, indices=np.arange(3)),
    "no numbers": lambda part: np.savez(part, indices=np.arange(1), values=np.full((1, 2), np.nan)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_read_skips_damaged_part_with_warning(
    damage: Callable[[Path], object], cache: PairCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.add(*values(1, 3))
    cache.add(*values(4))
    damage(cache.folder / "000000.npz")
    assert stored_values(cache) == {4: (-4, -10)}
    assert f"{cache.folder / '000000.npz'} are damaged" in caplog.text
    cache.add(*values(1, 3))
    assert set(stored_values(cache)) == {1, 3, 4}


def test_flipped_bits_of_a_part_are_noticed(cache: PairCache, caplog: pytest.LogCaptureFixture) -> None:
    cache.add(*values(*range(12)))
    (part,) = cache.folder.iterdir()
    good = part.read_bytes()
    for bad in [*bit_flips(good, 300, tail=300), *zeroed_blocks(good, 64)]:
        part.write_bytes(bad)
        caplog.clear()
        assert stored_values(cache) == {}
        assert "are damaged" in caplog.text


def test_add_removes_old_unfinished_files(cache: PairCache) -> None:
    cache.add(*values(1))
    old, new = cache.folder / "tmpa.unfinished", cache.folder / "tmpb.unfinished"
    for scratch in (old, new):
        scratch.write_bytes((cache.folder / "000000.npz").read_bytes()[:50])
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    assert set(stored_values(cache)) == {1}
    cache.add(*values(2))
    assert {path.name for path in cache.folder.iterdir()} == {"000000.npz", "000001.npz", new.name}


@pytest.mark.parametrize("change", ["weights", "precision", "tokens", "nothing"])
def test_entry_depends_on_key_and_tokens(change: str, store: TokenStore, cache: PairCache, tmp_path: Path) -> None:
    cache.add(*values(1))
    other = PairCache("reference", 2, KEY | ({} if change in ("tokens", "nothing") else {change: "b"}), store, tmp_path)
    if change == "tokens":
        data = SyntheticPreferences(train_pairs=PAIRS, data_seed=7, cache_dir=str(tmp_path))
        other = PairCache("reference", 2, KEY, data.load("train", TinyPolicy().load_tokenizer()), tmp_path)  # type: ignore[arg-type]
    assert (stored_values(other) == {}) == (change != "nothing")


def test_default_folder_is_the_cache_folder(store: TokenStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LPC_LIGHTNING_CACHE", str(tmp_path / "all"))
    assert PairCache("reference", 2, KEY, store).folder.parent == tmp_path / "all" / "reference"


def add_all(store: Path, root: Path, salt: float, ready: Path, go: Path) -> None:
    """Add values one by one, as soon as the file `go` exists."""
    cache = PairCache("reference", 2, KEY, TokenStore(store), root)
    ready.touch()
    while not go.exists():
        time.sleep(0.001)
    for index in range(PAIRS):
        cache.add(np.array([index]), np.full((1, 2), salt))


@pytest.mark.slow
def test_add_by_two_processes(store: TokenStore, cache: PairCache, tmp_path: Path) -> None:
    ready, go = [tmp_path / "ready 1", tmp_path / "ready 2"], tmp_path / "go"
    adders = [
        ForkedProcess(add_all, store.folder, tmp_path, salt, ready_file, go, log=tmp_path / f"{salt}.log")
        for salt, ready_file in zip((1.0, 2.0), ready, strict=True)
    ]
    while not all(file.exists() for file in ready):
        assert all(adder.is_running for adder in adders)
        time.sleep(0.01)
    go.touch()
    before: dict[int, tuple[float, float]] = {}
    while any(adder.is_running for adder in adders):
        now = stored_values(cache)
        assert now | before == now, "values that were read do not change"
        before = now
    assert [adder.wait() for adder in adders] == [0, 0]
    parts = sorted(path.name for path in cache.folder.iterdir())
    assert parts == [f"{number:06d}.npz" for number in range(2 * PAIRS)]
    final = stored_values(cache)
    assert set(final) == set(range(PAIRS))
    assert set(final.values()) <= {(1, 1), (2, 2)}


# Values in pairs and batches


@pytest.fixture
def scored(store: TokenStore) -> TokenStore:
    logps = np.array([[-index - 0.1, -index - 0.2] for index in range(PAIRS)])
    logps[5] = np.nan
    return store.with_reference(logps)


def test_store_attaches_values_to_pairs(store: TokenStore, scored: TokenStore) -> None:
    assert store[3].reference_logps is None
    assert (scored[3].reference_logps, scored[-1].reference_logps) == ((-3.1, -3.2), (-39.1, -39.2))
    assert scored[5].reference_logps is None
    assert scored.fingerprint == store.fingerprint
    swapped = scored[3].swapped()
    assert swapped.reference_logps == (-3.2, -3.1)
    assert (swapped.chosen_ids, swapped.rejected_ids) == (store[3].rejected_ids, store[3].chosen_ids)
    assert (swapped.flipped, store[3].flipped) == (True, False)
    assert swapped.swapped() == scored[3]
    assert store[3].swapped().reference_logps is None


def test_batch_has_values_only_if_complete(scored: TokenStore) -> None:
    layout = PaddedLayout(0)
    logps = layout([scored[1], scored[3].swapped()]).cached_reference_logps()
    assert logps.tolist() == [-1.1, -3.2, -1.2, -3.1]
    assert layout([scored[1], scored[5]]).reference_bits is None


def test_values_survive_pickling(scored: TokenStore) -> None:
    again = pickle.loads(pickle.dumps(scored))
    assert again[3] == scored[3]
    assert again[5].reference_logps is None
