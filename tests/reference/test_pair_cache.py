"""The parts of a cache entry: added by any number of processes, never changed, and whole or not read."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lpc_lightning.data import PaddedLayout, SyntheticPreferences
from lpc_lightning.data.tokenization.tokens import TokenStore
from lpc_lightning.policy import TinyPolicy
from lpc_lightning.reference.pair_cache import PairCache

PAIRS = 40
EVERY = np.arange(PAIRS)
KEY = {"weights": "a", "precision": "32-true"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    data = SyntheticPreferences(train_pairs=PAIRS, cache_dir=str(tmp_path_factory.mktemp("tokens")))
    found = data.load("train", TinyPolicy().load_tokenizer())
    assert found is not None
    return found


@pytest.fixture
def cache(store: TokenStore, tmp_path: Path) -> PairCache:
    return PairCache("reference", 2, KEY, store, tmp_path)


def values(*places: int, salt: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    return np.array(places), np.array([[-place - salt, -2.5 * place - salt] for place in places], dtype=np.float32)


def known(cache: PairCache) -> dict[int, tuple[float, float]]:
    return {place: tuple(pair) for place, pair in enumerate(cache.read(EVERY).tolist()) if not np.isnan(pair[0])}


def test_what_was_added_is_read_and_nothing_else_is_known(cache: PairCache) -> None:
    assert cache.read(EVERY).shape == (PAIRS, 2)
    assert np.isnan(cache.read(EVERY)).all()
    assert not cache.folder.exists(), "looking writes nothing"
    cache.add(*values(3, 1))
    cache.add(*values(0))
    assert known(cache) == {0: (0.0, 0.0), 1: (-1.0, -2.5), 3: (-3.0, -7.5)}


def test_parts_may_be_read_by_whom_the_umask_lets(cache: PairCache) -> None:
    before = os.umask(0o027)
    try:
        cache.add(np.array([0]), np.zeros((1, 2)))
    finally:
        os.umask(before)
    (part,) = cache.folder.glob("*.npz")
    assert part.stat().st_mode & 0o777 == 0o640


def test_some_are_read_in_the_order_asked_for(cache: PairCache) -> None:
    cache.add(*values(3, 1))
    cache.add(*values(1, 0, 7, salt=0.125))
    found = cache.read(np.array([7, 1, 2, 3]))
    assert np.array_equal(found, [[-7.125, -17.625], [-1, -2.5], [np.nan] * 2, [-3, -7.5]], equal_nan=True)
    assert cache.read(np.array([], dtype=int)).shape == (0, 2)


def test_as_many_numbers_of_the_type_asked_for(store: TokenStore, tmp_path: Path) -> None:
    wide = PairCache("rows", 5, KEY, store, tmp_path, np.float32)
    rows = np.random.default_rng(0).random((2, 5)).astype(np.float32)
    wide.add(np.array([4, 2]), rows)
    found = wide.read(np.array([2, 4]))
    assert found.dtype == np.float32
    assert np.array_equal(found, rows[::-1])
    assert wide.folder.parent == tmp_path / "rows"


def test_a_value_that_is_there_stays(cache: PairCache) -> None:
    cache.add(*values(1, 2))
    cache.add(*values(2, 3, salt=0.125))
    assert known(cache) == {1: (-1, -2.5), 2: (-2, -5), 3: (-3.125, -7.625)}


@pytest.mark.parametrize("exact", [np.float32, np.float64])
def test_values_come_back_to_the_last_bit(exact: type, cache: PairCache) -> None:
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
    "places beyond the data": lambda part: np.savez(part, places=np.array([PAIRS]), values=np.zeros((1, 2))),
    "fewer values than places": lambda part: np.savez(part, places=np.arange(3), values=np.zeros((2, 2))),
    "no values": lambda part: np.savez(part, places=np.arange(3)),
    "no numbers": lambda part: np.savez(part, places=np.arange(1), values=np.full((1, 2), np.nan)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_part_is_told_and_not_read(
    damage: Callable[[Path], object], cache: PairCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.add(*values(1, 3))
    cache.add(*values(4))
    damage(cache.folder / "000000.npz")
    assert known(cache) == {4: (-4, -10)}
    assert f"{cache.folder / '000000.npz'} are damaged" in caplog.text
    cache.add(*values(1, 3))
    assert set(known(cache)) == {1, 3, 4}


def test_a_killed_process_leaves_only_what_is_cleared_a_day_later(cache: PairCache) -> None:
    cache.add(*values(1))
    old, new = cache.folder / "tmpa.unfinished", cache.folder / "tmpb.unfinished"
    for scratch in (old, new):
        scratch.write_bytes((cache.folder / "000000.npz").read_bytes()[:50])
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    assert set(known(cache)) == {1}
    cache.add(*values(2))
    assert {path.name for path in cache.folder.iterdir()} == {"000000.npz", "000001.npz", new.name}


@pytest.mark.parametrize("change", ["weights", "precision", "tokens", "nothing"])
def test_each_part_of_the_key_has_an_entry_of_its_own(
    change: str, store: TokenStore, cache: PairCache, tmp_path: Path
) -> None:
    cache.add(*values(1))
    other = PairCache("reference", 2, KEY | ({} if change in ("tokens", "nothing") else {change: "b"}), store, tmp_path)
    if change == "tokens":
        data = SyntheticPreferences(train_pairs=PAIRS, data_seed=7, cache_dir=str(tmp_path))
        other = PairCache("reference", 2, KEY, data.load("train", TinyPolicy().load_tokenizer()), tmp_path)  # type: ignore[arg-type]
    assert (known(other) == {}) == (change != "nothing")


def test_it_lies_where_tokens_do(store: TokenStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LPC_LIGHTNING_CACHE", str(tmp_path / "all"))
    assert PairCache("reference", 2, KEY, store).folder.parent == tmp_path / "all" / "reference"


ADDER = """
import sys, time
import numpy as np
from pathlib import Path
from lpc_lightning.reference.pair_cache import PairCache
from lpc_lightning.data.tokenization.tokens import TokenStore

store, root, salt, ready, go = sys.argv[1:]
cache = PairCache("reference", 2, {"weights": "a", "precision": "32-true"}, TokenStore(Path(store)), Path(root))
Path(ready).touch()
while not Path(go).exists():
    time.sleep(0.001)
for place in range(40):
    cache.add(np.array([place]), np.full((1, 2), float(salt)))
"""


def test_two_processes_add_at_once(store: TokenStore, cache: PairCache, tmp_path: Path) -> None:
    ready, go = [tmp_path / "ready 1", tmp_path / "ready 2"], tmp_path / "go"
    adders = [
        subprocess.Popen([sys.executable, "-c", ADDER, str(store.folder), str(tmp_path), salt, str(mine), str(go)])
        for salt, mine in zip("12", ready, strict=True)
    ]
    while not all(file.exists() for file in ready):
        assert all(adder.poll() is None for adder in adders)
        time.sleep(0.01)
    go.touch()
    before: dict[int, tuple[float, float]] = {}
    while any(adder.poll() is None for adder in adders):
        now = known(cache)
        assert now | before == now, "what was read stays"
        before = now
    assert [adder.wait() for adder in adders] == [0, 0]
    parts = sorted(path.name for path in cache.folder.iterdir())
    assert parts == [f"{number:06d}.npz" for number in range(2 * PAIRS)]
    found = known(cache)
    assert set(found) == set(range(PAIRS))
    assert set(found.values()) <= {(1, 1), (2, 2)}


# In the pairs and in their batches


@pytest.fixture
def scored(store: TokenStore) -> TokenStore:
    logps = np.array([[-place - 0.1, -place - 0.2] for place in range(PAIRS)])
    logps[5] = np.nan
    return store.with_reference(logps)


def test_pairs_bring_their_values_along_and_a_swapped_one_its_own(store: TokenStore, scored: TokenStore) -> None:
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


def test_a_batch_has_the_chosen_ones_first_and_none_where_one_is_unknown(scored: TokenStore) -> None:
    layout = PaddedLayout(0)
    logps = layout([scored[1], scored[3].swapped()]).reference_logps
    assert logps is not None
    assert logps.tolist() == [-1.1, -3.2, -1.2, -3.1]
    assert layout([scored[1], scored[5]]).reference_logps is None


def test_workers_get_them_too(scored: TokenStore) -> None:
    again = pickle.loads(pickle.dumps(scored))
    assert again[3] == scored[3]
    assert again[5].reference_logps is None
