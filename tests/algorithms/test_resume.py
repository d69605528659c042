"""Tests that a resumed run equals an uninterrupted run to the last bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from lpc_lightning.algorithms import DPO, PreferenceModule
from lpc_lightning.callbacks import LabelFlipNoise
from lpc_lightning.data import PreferenceData
from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.errors import ConfigError
from lpc_lightning.latent import Exponential, GumbelSpace
from lpc_lightning.policy import LoRA, TinyPolicy
from lpc_lightning.robust import REPO

pytestmark = pytest.mark.slow


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def gumbel() -> GumbelSpace:
    """Return a latent with noise and with a tau and a g that change in every step."""
    return GumbelSpace(num_codes=4, hidden=8, init_logit_std=1.0, tau=Exponential(1.0, 0.2), g=None)


MODULES: dict[str, Callable[[Callable[..., TinyPolicy]], PreferenceModule]] = {
    "dpo": lambda policy: DPO(policy=policy(), optimizer=adam),
    "gumbel": lambda policy: DPO(policy=policy(), optimizer=adam, latent=gumbel(), latent_lr=1e-2),
    "gumbel, lora with dropout": lambda policy: DPO(
        policy=policy(lora=LoRA(rank=4, alpha=8, dropout=0.3)), optimizer=adam, latent=gumbel(), latent_lr=1e-2
    ),
    "frozen states": lambda policy: DPO(
        policy=policy(layers=2, lora=LoRA(rank=4, target_modules=r".*\.1\..*_proj"), frozen_states_gib=1.0),
        optimizer=adam,
    ),
}


class Within(Callback):
    """Saves within a step, after the fifth batch of the run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.batches_seen = folder, 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.batches_seen += 1
        if self.batches_seen == 5:
            trainer.save_checkpoint(self.folder / "within.ckpt")


def savers(folder: Path) -> list[Callback]:
    """Return callbacks that save after a step, within a step, at the end of an epoch and after a validation."""
    every: dict[str, Any] = {"dirpath": folder, "save_top_k": -1}
    return [
        Within(folder),
        ModelCheckpoint(**every, filename="batch-{step}", every_n_train_steps=1),
        ModelCheckpoint(**every, filename="epoch-{step}", every_n_epochs=1, save_on_train_epoch_end=True),
        ModelCheckpoint(**every, filename="validation-{step}", monitor="val/loss", save_on_train_epoch_end=False),
    ]


class Case(NamedTuple):
    """Settings of a run, and the checkpoints from which it is resumed."""

    trainer: dict[str, Any]
    checkpoints: list[str]
    num_workers: int = 0
    accumulated: dict[int, int] | None = None
    """Number of accumulated batches by epoch."""


# An epoch has 11 micro-batches. The last one has one pair. With accumulation over 4, the last step has only 3.
CASES = {
    "one batch a step": Case(
        {"max_epochs": 2}, ["batch-step=4", "epoch-step=11", "validation-step=11", "batch-step=11", "batch-step=14"]
    ),
    "accumulated": Case(
        {"max_epochs": 2, "accumulate_grad_batches": 4},
        ["batch-step=2", "within", "batch-step=3", "epoch-step=3", "batch-step=4"],
    ),
    "validated in mid-epoch": Case(
        {"max_epochs": 2, "accumulate_grad_batches": 2, "val_check_interval": 4},
        ["validation-step=2", "batch-step=2", "batch-step=3", "validation-step=4", "epoch-step=6", "validation-step=8"],
    ),
    "validated within a step": Case(
        {"max_epochs": 2, "accumulate_grad_batches": 4, "val_check_interval": 6}, ["validation-step=1", "batch-step=2"]
    ),
    "ended by steps": Case(
        {"max_steps": 9, "accumulate_grad_batches": 2}, ["batch-step=2", "batch-step=6", "epoch-step=6", "batch-step=8"]
    ),
    "part of an epoch, in float64": Case(
        {"max_epochs": 2, "limit_train_batches": 7, "accumulate_grad_batches": 2, "precision": "64-true"},
        ["batch-step=2", "epoch-step=4"],
    ),
    "accumulated by epoch": Case(
        {"max_epochs": 2}, ["batch-step=1", "epoch-step=3", "batch-step=4"], accumulated={0: 4, 1: 2}
    ),
    "num_workers": Case(
        {"max_epochs": 2, "accumulate_grad_batches": 2}, ["batch-step=2", "epoch-step=6"], num_workers=2
    ),
}
# The cases differ in the data and the noise, not in the loss. So each of them needs only the module with all noise.
RUNS = [(case, "gumbel, lora with dropout") for case in CASES]
RUNS += [("accumulated", "dpo"), ("validated in mid-epoch", "gumbel"), ("accumulated", "frozen states")]


class Whole(NamedTuple):
    """An uninterrupted run and the function that made it."""

    folder: Path
    case: Case
    run: Any
    fit: Callable[..., Any]


@pytest.fixture(scope="module", params=RUNS, ids=" - ".join)
def whole(
    request: Any, tmp_path_factory: pytest.TempPathFactory, small_policy: Any, small_data: Any, fit_run: Any
) -> Whole:
    """An uninterrupted run with all its checkpoints."""
    name, module = request.param
    case, folder = CASES[name], tmp_path_factory.mktemp("whole")

    def fit(folder: Path, ckpt_path: Path | None = None, seed: int = 1, **data: Any) -> Any:
        settings = {"num_workers": case.num_workers} | data
        schedule = [] if case.accumulated is None else [GradientAccumulationScheduler(dict(case.accumulated))]
        options = case.trainer | {"callbacks": [*savers(folder), *schedule], "ckpt_path": ckpt_path}
        return fit_run(MODULES[module](small_policy), small_data(**settings), seed, **options)

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PL_GLOBAL_SEED", "0")
        return Whole(folder, case, fit(folder), fit)


# Lightning warns that the best score of the old folder does not count in the new one.
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_resumed_equals_uninterrupted(whole: Whole, tmp_path: Path) -> None:
    expected = whole.run
    for name in whole.case.checkpoints:
        checkpoint = whole.folder / f"{name}.ckpt"
        start = torch.load(checkpoint, weights_only=True)["global_step"]
        torch.manual_seed(99)  # a new process has another random state
        resumed = whole.fit(tmp_path / name, checkpoint)

        assert 0 < start < expected.trainer.global_step, name
        assert list(resumed.training.values()) == list(expected.training.values())[start:], name
        assert resumed.optimizer == expected.optimizer[start:], name
        assert resumed.batches == expected.batches[-len(resumed.batches) :], name
        state = resumed.module.state_dict()
        differing = [key for key, value in expected.module.state_dict().items() if not torch.equal(state[key], value)]
        assert not differing, name
        assert same(resumed.weights, expected.weights), name
        assert same(resumed.trainer.optimizers[0].state_dict(), expected.trainer.optimizers[0].state_dict()), name
        validations = list(expected.log.with_prefix("val/").values())
        later = list(resumed.log.with_prefix("val/").values())
        assert later == validations[len(validations) - len(later) :], name
        assert list(resumed.training) == list(expected.training)[start:], name


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
@pytest.mark.parametrize("longer", [{"max_steps": 9}, {"max_steps": -1, "max_epochs": 2}], ids=["steps", "epochs"])
def test_ended_run_goes_on_with_more_steps(
    longer: dict[str, Any], small_policy: Any, small_data: Any, fit_run: Any, tmp_path: Path
) -> None:
    """A run of 3 steps ends within an epoch of 6. With constant rates it goes on like a run of the full length."""

    class AtEnd(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "end.ckpt")

    def fit(**options: Any) -> Any:
        settings: dict[str, Any] = {"lr_schedule": "constant_with_warmup", "warmup_ratio": 0.0, "optimizer": adam}
        return fit_run(DPO(policy=small_policy(), **settings), small_data(), accumulate_grad_batches=2, **options)

    fit(max_steps=3, callbacks=[AtEnd()])
    with pytest.warns(UserWarning, match=r"resume: found trainer\.max_"):
        resumed = fit(ckpt_path=tmp_path / "end.ckpt", **longer)
    whole = fit(**longer)
    assert resumed.trainer.global_step == whole.trainer.global_step == {9: 9, -1: 12}[longer["max_steps"]]
    assert same(resumed.weights, whole.weights)
    assert list(resumed.training.values()) == list(whole.training.values())[3:]
    assert resumed.batches == whole.batches[6:]


class InterruptionError(Exception):
    """Ends a run."""


class Interrupted(Callback):
    """Interrupts a run in the middle of a step, or of the validation in mid-epoch."""

    def __init__(self, at: str) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.at == "step" and args[2] == 4:
            raise InterruptionError

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.at == "validation" and args[2] == 1:
            raise InterruptionError


def test_interrupted_module_resumes(small_policy: Any, small_data: Any, fit_run: Any, tmp_path: Path) -> None:
    """Go on in the same process with the same module, as in a notebook after Ctrl-C."""
    steps: dict[str, Any] = {"max_epochs": 1, "accumulate_grad_batches": 3, "val_check_interval": 6}
    steps |= {"limit_train_batches": 7, "limit_val_batches": 2}

    def module() -> PreferenceModule:
        return DPO(policy=small_policy(), optimizer=adam, latent=gumbel(), latent_lr=1e-2, robust_loss=REPO())

    whole = fit_run(module(), small_data(), **steps)
    state = whole.module.state_dict()
    for at in ("step", "validation"):
        interrupted = module()
        with pytest.raises(InterruptionError):
            fit_run(interrupted, small_data(), callbacks=[Within(tmp_path), Interrupted(at)], **steps)
        resumed = fit_run(interrupted, small_data(), ckpt_path=tmp_path / "within.ckpt", **steps)
        assert list(resumed.training.values()) == list(whole.training.values())[1:], at
        assert resumed.log.with_prefix("val/") == whole.log.with_prefix("val/"), at
        found = resumed.module.state_dict()
        assert not [name for name in state if not torch.equal(found[name], state[name])], at


def test_validation_after_an_interrupted_one(small_policy: Any, small_data: Any) -> None:
    module = DPO(policy=small_policy(), latent=gumbel())
    found = []
    for callbacks in ([], [Interrupted("validation")], []):
        quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        trainer = Trainer(accelerator="cpu", callbacks=callbacks, enable_checkpointing=False, **quiet)
        with pytest.raises(InterruptionError) if callbacks else nullcontext():
            found += trainer.validate(module, datamodule=small_data(), verbose=False)
    assert found[0] == found[1]


@pytest.fixture
def renamed(small_policy: Any, fit_run: Any, tmp_path: Path) -> Callable[..., tuple[Any, Any]]:
    """Function that resumes a run from a copy of its file under another name; returns the whole and the resumed run."""
    rows = [{"prompt": f"Name {number}!", "chosen": f"It is {number}.", "rejected": "No."} for number in range(16)]
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def fit(name: str, ckpt_path: Path | None = None, **options: Any) -> Any:
        sizes: dict[str, Any] = {"validation_share": 0.2, "test_split": None, "batch_size": 2}
        data = PreferenceData(str(tmp_path / f"{name}.jsonl"), cache_dir=str(tmp_path / "cache"), **sizes)
        module = DPO(policy=small_policy(), optimizer=adam)
        return fit_run(module, data, ckpt_path=ckpt_path, max_epochs=2, default_root_dir=tmp_path, **options)

    def runs(callbacks: Callable[[], list[Callback]]) -> tuple[Any, Any]:
        whole = fit("a", callbacks=[Within(tmp_path), *callbacks()])
        return whole, fit("b", tmp_path / "within.ckpt", callbacks=callbacks())

    return runs


def test_renamed_file_resumes(renamed: Callable[..., tuple[Any, Any]]) -> None:
    whole, resumed = renamed(list)
    assert same(resumed.weights, whole.weights)
    assert list(resumed.training.values()) == list(whole.training.values())[5:]


def test_renamed_file_with_other_flips_is_refused(renamed: Callable[..., tuple[Any, Any]]) -> None:
    """Rows without an id have one of the file's name, on which the flips depend."""
    with pytest.raises(DataError, match=r"label noise .* flipped other pairs than in the checkpoint, .* former name"):
        renamed(lambda: [LabelFlipNoise(0.5)])


def test_resume_at_the_end_warns(small_policy: Any, small_data: Any, fit_run: Any, tmp_path: Path) -> None:
    class AtEnd(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "end.ckpt")

    fit_run(DPO(policy=small_policy(), optimizer=adam), max_steps=2, callbacks=[AtEnd()])
    with pytest.warns(UserWarning, match=r"found a checkpoint of step 2 .* Nothing was trained"):
        fit_run(DPO(policy=small_policy(), optimizer=adam), max_steps=2, ckpt_path=tmp_path / "end.ckpt")


def test_compared_runs_have_noise_and_schedules(whole: Whole) -> None:
    rows = list(whole.run.training.values())
    rates = [step["backbone"] for step in whole.run.optimizer]
    assert len(set(rates[2:])) == len(rates) - 2
    assert len({row["train/loss"] for row in rows}) > len(rows) / 2
    if whole.run.module.latent is not None:
        taus, shares = ([row[f"train/latent/{name}"] for row in rows] for name in ("tau", "g"))
        steps = [step / (len(rows) - 1) for step in range(len(rows))]
        assert taus == pytest.approx([0.2**progress for progress in steps], rel=1e-6)
        assert shares == pytest.approx(steps, abs=1e-6)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, small_policy: Any, small_data: Any, fit_run: Any) -> Path:
    """Checkpoints of a short run."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PL_GLOBAL_SEED", "0")
        fit_run(MODULES["dpo"](small_policy), max_epochs=1, callbacks=savers(folder))
    return folder


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
@pytest.mark.parametrize("checkpoint", ["batch-step=4", "epoch-step=11"])
@pytest.mark.parametrize(
    ("seed", "data", "problem"),
    [
        (2, {}, "'seed': 2, .*'seed': 1, "),
        (1, {"batch_size": 3}, "'batch_size': 3, .*'batch_size': 2, "),
        (1, {"train_pairs": 20}, "'pairs': 20, .*'pairs': 21, "),
        (1, {"data_seed": 5}, "'data': '[0-9a-f]{64}', .*'data': '[0-9a-f]{64}', "),
        (1, {"max_length": 150}, "'data': '[0-9a-f]{64}', "),
    ],
    ids=["seed", "batch size", "number of pairs", "other pairs", "length limit"],
)
def test_resume_refuses_other_data_order(
    checkpoint: str,
    seed: int,
    data: dict[str, Any],
    problem: str,
    stopped: Path,
    tmp_path: Path,
    small_policy: Any,
    small_data: Any,
    fit_run: Any,
) -> None:
    module, path = MODULES["dpo"](small_policy), stopped / f"{checkpoint}.ckpt"
    with pytest.raises(
        DataError, match=rf"resume: found data order .*{problem}.* as in the checkpoint\. Resume with the same"
    ):
        fit_run(module, small_data(**data), seed, path, callbacks=savers(tmp_path), max_epochs=2)
    assert all(torch.equal(weight, before) for weight, before in weights_of(path, module))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("checkpoint", ["batch-step=4", "epoch-step=11"])
@pytest.mark.parametrize(
    ("trainer", "setting"),
    [
        ({"accumulate_grad_batches": 2}, "2"),
        ({"callbacks": [GradientAccumulationScheduler({0: 1, 1: 3})]}, "{0: 1, 1: 3}"),
    ],
    ids=["a number", "by epoch"],
)
def test_resume_refuses_other_step_size(
    checkpoint: str, trainer: dict[str, Any], setting: str, stopped: Path, small_policy: Any, fit_run: Any
) -> None:
    problem = (
        rf"trainer\.accumulate_grad_batches: found {re.escape(setting)}, expected 1 as in the checkpoint\. Resume with"
    )
    with pytest.raises(ConfigError, match=problem):
        fit_run(MODULES["dpo"](small_policy), ckpt_path=stopped / f"{checkpoint}.ckpt", max_epochs=2, **trainer)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("trainer", "problem", "left"),
    [
        ({"max_epochs": 2}, r"trainer\.max_epochs 2 \(before: 1\)\. .* of a run of 22 steps\.", 18),
        (
            {"max_steps": 6},
            r"trainer\.max_epochs -1 \(before: 1\), trainer\.max_steps 6 \(before: -1\)\. .* of a run of 6 steps\.",
            2,
        ),
        (
            {"max_epochs": 1, "limit_train_batches": 8},
            r"trainer\.limit_train_batches 8 \(before: 1\.0\)\. .* of a run of 8 steps\.",
            4,
        ),
    ],
    ids=["epochs", "steps", "part of an epoch"],
)
def test_resume_warns_of_other_run_length(
    trainer: dict[str, Any], problem: str, left: int, stopped: Path, small_policy: Any, fit_run: Any
) -> None:
    with pytest.warns(UserWarning, match=f"resume: found {problem}"):
        resumed = fit_run(MODULES["dpo"](small_policy), ckpt_path=stopped / "batch-step=4.ckpt", **trainer)
    assert len(resumed.optimizer) == left


def test_run_from_weights_starts_at_step_zero(stopped: Path, small_policy: Any, small_data: Any, fit_run: Any) -> None:
    """Data, step size and length may differ from the run that wrote the weights."""
    module = DPO.load_from_checkpoint(stopped / "batch-step=4.ckpt", policy=small_policy(), optimizer=adam)
    before = weights_of(stopped / "batch-step=4.ckpt", module)
    assert before
    assert all(torch.equal(weight, stored) for weight, stored in before)
    run = fit_run(module, small_data(batch_size=3), seed=5, max_epochs=2, accumulate_grad_batches=2)
    assert len(run.batches) == 2 * 7


def weights_of(path: Path, module: PreferenceModule) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return pairs of a module's weight and the checkpoint's weight."""
    stored = torch.load(path, weights_only=True)["state_dict"]
    return [(weight, stored[name]) for name, weight in module.state_dict().items() if name in stored]


def same(one: Any, other: Any) -> bool:
    """Return whether two nested values are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
