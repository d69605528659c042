"""Tests of kept states: shared between stores by a folder, with damage, a full disk and a limit."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lpc_lightning.policy import state_store
from lpc_lightning.policy.state_store import StateStore
from tests.fixtures.damage import bit_flips


def store_in(folder: Path, gib: float = 1.0) -> StateStore:
    store = StateStore(gib)
    store.share(folder)
    return store


def states_of(keys: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {key: torch.full((3, 4), float(ord(key)), dtype=dtype) for key in keys}


def fill(store: StateStore, states: dict[str, Tensor]) -> None:
    for key, value in states.items():
        assert store.get(key) is None
        store.add(key, value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_stores_share_states(dtype: torch.dtype, tmp_path: Path) -> None:
    """Both are open at the same time, and each writes a part."""
    one, two = store_in(tmp_path), store_in(tmp_path)
    fill(one, states_of("ab", dtype))
    fill(two, states_of("c", dtype))
    one.write()
    two.write()
    for store in (one, two, store_in(tmp_path)):
        for key, expected in states_of("abc", dtype).items():
            found = store.get(key)
            assert found is not None
            assert found.dtype == dtype
            assert torch.equal(found, expected)
        assert store.get("d") is None
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_new_states_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_store, "PART_BYTES", 2 * 3 * 4 * 4)
    store = store_in(tmp_path)
    fill(store, states_of("abcde"))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert store_in(tmp_path).get("e") is None
    store.write()
    store.write()
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert store_in(tmp_path).get("e") is not None


def test_damaged_part_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(store := store_in(tmp_path), states_of("ab"))
    store.write()
    (part,) = tmp_path.glob("*.safetensors")
    content = part.read_bytes()
    for damaged in [*bit_flips(content, 25), b"", content[:7], content[:-40], b"\xff" * 64]:
        part.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = store_in(tmp_path).get("a")
        # A flip in the key of the header hides the states. Nothing else passes in silence.
        assert found is None
        assert caplog.messages or b'"a"' not in damaged
        assert all(f"The stored states in {part} are damaged" in message for message in caplog.messages)


def test_full_disk_is_reported_and_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fill(store := store_in(tmp_path / "file" / "folder"), states_of("ab"))
    with pytest.warns(UserWarning, match="found that states cannot be stored in .*folder .* Set data.cache_dir to a"):
        store.write()
    assert store.get("a") is not None


def test_stored_states_keep_the_limit(tmp_path: Path) -> None:
    fill(store := store_in(tmp_path), states_of("abc"))
    store.write()
    small = store_in(tmp_path, gib=2 * 48 / 2**30)
    with pytest.warns(UserWarning, match=r"found more states than .* GiB hold, after 2 prompts and answers"):
        assert small.get("b") is not None
    assert [small.get(key) is None for key in "abc"].count(True) == 1


def test_cleared_store_has_no_folder(tmp_path: Path) -> None:
    fill(store := store_in(tmp_path), states_of("a"))
    store.write()
    store.clear()
    assert store.get("a") is None
    fill(store, states_of("b"))
    store.write()
    assert store_in(tmp_path).get("b") is None
