"""Tests of checkpoints with flipped bits, zeroed blocks, wrong entries and hostile class paths."""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.distributed.sharded_checkpoint import INDEX, REST, shards_of
from lpc_lightning.errors import CheckpointError
from lpc_lightning.files import integrity
from lpc_lightning.files.integrity import DIGESTS, check_archive, digests_of, write_digests
from lpc_lightning.inference.checkpoint_entries import check_classes, check_resumable
from lpc_lightning.inference.checkpoints import read_checkpoint
from lpc_lightning.inference.opening import open_policy
from lpc_lightning.latent import LatentSpace
from lpc_lightning.policy import PolicySpec
from lpc_lightning.robust import RobustLoss
from tests.fixtures.damage import bit_flips, zeroed_blocks

COUNTS = {"ready": 1, "started": 1, "processed": 1, "completed": 1}
PROGRESS = {"total": COUNTS, "current": COUNTS}


def content() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weights = {f"policy.layer{number}": torch.randn(7, 9, generator=generator) for number in range(2)}
    state = {"step": torch.tensor(3.0), "exp_avg": torch.randn(7, 9, generator=generator)}
    return {
        "state_dict": weights | {"zeros": torch.zeros(300)},
        "hyper_parameters": {"beta": 0.1, "_class_path": "lpc_lightning.algorithms.DPO", "latent": None},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "loops": {"fit_loop": {"epoch_progress": PROGRESS, "epoch_loop.batch_progress": PROGRESS}},
        "optimizer_states": [{"state": {0: state}, "param_groups": [{"lr": 0.01, "params": [0]}]}],
        "lr_schedulers": [{"last_epoch": 3}],
        "epoch": 1,
        "global_step": 3,
    }


def test_classes_of_all_settings_of_a_module_are_known() -> None:
    """Every class that a setting takes, by the module's own type hints, may be named in a checkpoint."""
    hints = get_type_hints(PreferenceModule.__init__)
    kinds = {each for hint in hints.values() for each in (hint, *get_args(hint)) if isinstance(each, type)}
    bases = {each for each in kinds if each.__module__.startswith("lpc_lightning.")}
    assert bases >= {PolicySpec, LatentSpace, RobustLoss}
    classes = {each for base in bases for each in base.__subclasses__() if each.__module__.startswith("lpc_lightning.")}
    for each in classes:
        settings = {
            "_class_path": "lpc_lightning.algorithms.DPO",
            "any": {"class_path": f"{each.__module__}.{each.__name__}"},
        }
        check_classes(settings, Path("some.ckpt"))


def equal(one: Any, other: Any) -> bool:
    """Compare nested values by type and bits."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def outcome(path: Path, expected: dict[str, Any]) -> str:
    """Return the message that refuses a checkpoint, "" if it is read with the expected values."""
    try:
        found = read_checkpoint(path)
    except CheckpointError as error:
        message = str(error)
    else:
        message = ""
        assert equal(found, expected)
    assert "\n" not in message
    assert not message or str(path) in message
    return message


@pytest.mark.slow
def test_archive_is_read_by_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "READER_BYTES", 1)
    path = tmp_path / "many.ckpt"
    torch.save({str(number): torch.full((16,), number) for number in range(200)}, path)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads that shared a position in the file would read each other's entries
    try:
        check_archive(path)
    finally:
        sys.setswitchinterval(interval)


def test_flipped_bits_are_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(content(), path)
    good = path.read_bytes()
    assert outcome(path, content()) == ""
    outcomes = []
    for bad in bit_flips(good, 300, tail=800):  # the tail is the zip's list of entries, which has no checksum
        path.write_bytes(bad)
        outcomes.append(outcome(path, content()))
    assert sum(map(bool, outcomes)) > 400


def test_zeroed_blocks_are_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(content(), path)
    good = path.read_bytes()
    outcomes = []
    for bad in (each for size in (16, 64, 512) for each in zeroed_blocks(good, size)):
        path.write_bytes(bad)
        outcomes.append(outcome(path, content()))
    assert sum(map(bool, outcomes)) > 100


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of shards as `FSDP2Strategy` writes it on one device."""
    path = tmp_path / "sharded.ckpt"
    whole = content()
    shards = {"state_dict": whole.pop("state_dict"), "optimizer_0": whole.pop("optimizer_states")[0]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(shards, checkpoint_id=path, no_dist=True)
    torch.save(whole, path / REST)
    write_digests(path, digests_of([*shards_of(path, 0), path / REST, path / INDEX]))
    return path


def test_damaged_shards_are_refused(sharded: Path) -> None:
    expected = content()
    del expected["optimizer_states"]
    assert equal(dict(sorted(read_checkpoint(sharded).items())), dict(sorted(expected.items())))
    for file in sharded.iterdir():
        good = file.read_bytes()
        for bad in [*bit_flips(good, 60), *zeroed_blocks(good, max(64, len(good) // 20))]:
            file.write_bytes(bad)
            assert outcome(sharded, expected)
        file.write_bytes(good)
    (sharded / DIGESTS).unlink()
    assert outcome(sharded, expected)


class Effect:
    """A pickle of it creates a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.file,)


def test_index_of_shards_runs_no_code(sharded: Path, tmp_path: Path) -> None:
    (sharded / INDEX).write_bytes(pickle.dumps(Effect(tmp_path / "ran")))
    write_digests(sharded, digests_of([*shards_of(sharded, 0), sharded / REST, sharded / INDEX]))
    with pytest.raises(CheckpointError, match=r"found pathlib.*, expected classes of an index of shards"):
        read_checkpoint(sharded)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("entry", ["state_dict", "hyper_parameters", "callbacks", "loops", "optimizer_states", "epoch"])
@pytest.mark.parametrize("value", ["text", None, [3], {"a": 1}])
def test_entry_of_wrong_type_is_refused(entry: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    right = isinstance(value, type(content()[entry])) and entry != "state_dict"
    torch.save(content() | {entry: value}, path)
    if right:
        read_checkpoint(path)
        return
    with pytest.raises(CheckpointError, match=r"a\.ckpt: found \w+ as .*Take another one of the run"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "entry", ["code_range", "position", "robust_loss", "validation_before", "validation_after", "warm_start"]
)
def test_optional_entry_of_wrong_type_is_refused(entry: str, tmp_path: Path) -> None:
    torch.save(content() | {entry: "text"}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=rf"a\.ckpt: found str as its entry {entry}, expected"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_value_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"a\.ckpt: found list, expected dict"):
        read_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("entry", ["callbacks", "loops", "optimizer_states", "lr_schedulers", "epoch"])
def test_resume_needs_every_entry(entry: str) -> None:
    whole = content()
    check_resumable(whole, Path("a.ckpt"))
    del whole[entry]
    with pytest.raises(CheckpointError, match=rf"a\.ckpt: found no entry {entry}, expected the full state of a run"):
        check_resumable(whole, Path("a.ckpt"))


# Classes that a checkpoint names


@pytest.fixture
def hostile_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that leaves a file when it is imported."""
    (tmp_path / "hostile.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass Evil: pass"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "ran"
    sys.modules.pop("hostile", None)


NAMES = ("hostile.Evil", "os.system", "subprocess.Popen", "lpc_lightning.cli.preference_cli.PreferenceCLI", 7)


@pytest.mark.parametrize("place", ["_class_path", "policy", "latent", "optimizer", "optimizer as text", "deep"])
def test_hostile_classes_are_refused(place: str, checkpoint: Path, tmp_path: Path, hostile_module: Path) -> None:
    for name in NAMES:
        kept = torch.load(checkpoint, weights_only=True)
        settings = kept["hyper_parameters"]
        if place == "_class_path":
            settings[place] = name
        elif place == "optimizer as text":
            settings["optimizer"] = name
        elif place == "deep":
            settings["latent"]["init_args"]["hidden"] = {"class_path": name}
        else:
            settings[place] = settings[place] | {"class_path": name}
        torch.save(kept, tmp_path / "other.ckpt")
        with pytest.raises(CheckpointError, match=rf"other\.ckpt names {name!r} as its .*cannot import code"):
            open_policy(str(tmp_path / "other.ckpt"))
        assert not hostile_module.exists()


SPACE = "lpc_lightning.latent.MarginalSpace"


@pytest.mark.parametrize(
    "change",
    [
        {"policy": None},
        {"policy": []},
        {"beta": "text"},
        {"unknown": 1},
        {"latent": {"class_path": SPACE, "init_args": {"num_codes": "many"}}},
    ],
)
def test_settings_of_wrong_type_are_refused(change: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    kept = torch.load(checkpoint, weights_only=True)
    kept["hyper_parameters"] |= change
    torch.save(kept, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"other\.ckpt.*(Take another checkpoint|cannot import code)") as caught:
        open_policy(str(tmp_path / "other.ckpt"))
    assert "\n" not in str(caught.value)
