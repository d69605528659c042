"""Tests of label noise in real runs: flipped labels, and what is unchanged."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from lpc_lightning.algorithms import DPO
from lpc_lightning.callbacks import LabelFlipNoise
from lpc_lightning.data import DataError, PreferenceData, SyntheticPreferences
from lpc_lightning.data.noise import ByAnnotator, FlipOrder, UnreliableAnnotators
from lpc_lightning.data.noise.label_noise import MarkedSource
from lpc_lightning.data.noise.markers import MARK
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.tokenization.lengths import LengthPolicy
from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.data.tokenization.token_cache import load_or_tokenize
from lpc_lightning.errors import ConfigError
from lpc_lightning.policy import TinyPolicy
from lpc_lightning.types import Message, PreferenceBatch, PreferenceExample
from tests.callbacks.noisy_process import train
from tests.fixtures.processes import forked_ranks


class Recorder(Callback):
    """Callback that stores labels, answers and losses of training and validation."""

    def __init__(self) -> None:
        self.flipped: dict[str, bool] = {}
        self.answers: dict[str, list[int]] = {}
        self.validated: list[bool] = []
        self.losses: list[dict[bool, list[float]]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        self.flipped |= dict(zip(batch.ids, batch.flipped.tolist(), strict=True))
        for number, name in enumerate(batch.ids):
            self.answers[name] = batch.targets[batch.owner == number].tolist()
        losses: dict[bool, list[float]] = {False: [], True: []}
        for loss, flip in zip(outputs["losses"].tolist(), batch.flipped.tolist(), strict=True):
            losses[flip].append(loss)
        self.losses.append(losses)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PreferenceBatch, *args: Any
    ) -> None:
        self.validated += batch.flipped.tolist()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def run(tmp_path: Path, cache: Path) -> Callable[..., tuple[Recorder, Trainer]]:
    """Function that runs plain DPO on 40 pairs, 8 in a batch, and returns what was recorded and the trainer."""

    def fit(
        *callbacks: Callback,
        reference: Literal["cached", "live"] = "cached",
        num_workers: int = 0,
        ckpt_path: Path | None = None,
        name: str = "run",
        **trainer: Any,
    ) -> tuple[Recorder, Trainer]:
        recorder = Recorder()
        settings: dict[str, Any] = {"logger": CSVLogger(tmp_path, name="", version=name), "max_epochs": 1}
        quiet = {
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "log_every_n_steps": 1,
        }
        finished = Trainer(callbacks=[recorder, *callbacks], accelerator="cpu", **(settings | quiet | trainer))
        module = DPO(
            policy=TinyPolicy(width=16, layers=1, heads=2),
            reference=reference,
            optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        )
        finished.fit(module, data(cache, num_workers), ckpt_path=ckpt_path)
        return recorder, finished

    return fit


def data(cache: Path, num_workers: int = 0) -> SyntheticPreferences:
    return SyntheticPreferences(
        train_pairs=40, validation_pairs=8, test_pairs=8, batch_size=8, num_workers=num_workers, cache_dir=str(cache)
    )


def expected_flips(noise: LabelFlipNoise, cache: Path) -> dict[str, bool]:
    source = data(cache).source("train")
    assert source is not None
    return {pair.id: bool(flip) for pair, flip in zip(source.examples, noise.flips(source.examples), strict=True)}


def test_only_training_labels_change(run: Any, cache: Path, tmp_path: Path) -> None:
    clean, _ = run(name="clean")
    assert not any(clean.flipped.values())
    noise = LabelFlipNoise(rate=0.4)
    noisy, _ = run(noise)
    assert noisy.flipped == expected_flips(noise, cache)
    assert 0 < sum(noisy.flipped.values()) < 40
    for name, flip in noisy.flipped.items():
        assert (noisy.answers[name] == clean.answers[name]) != flip
    assert noisy.validated
    assert not any(noisy.validated)

    record = json.loads((tmp_path / "run" / "label_noise.json").read_text())
    flipped = [name for name, flip in expected_flips(noise, cache).items() if flip]
    assert record["ids"] == flipped
    assert (record["pairs"], record["flipped"], record["reached"]) == (40, len(flipped), len(flipped) / 40)
    names = list(expected_flips(noise, cache))
    assert [names[index] for index in record["indices"]] == flipped
    sources = {example.id: example.source for example in data(cache).source("train").examples}  # type: ignore[union-attr]
    assert record["sources"] == [sources[name] for name in flipped]
    assert "unreliable_annotators" not in record


@pytest.mark.parametrize("marker", [None, "[FLIP]"])
def test_record_of_unreliable_annotators(marker: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first two of four annotators, 0.3 of four rounded up, have all labels wrong. Pair 0 has no annotator."""
    rows = [
        {"prompt": f"Say {n}.", "chosen": "yes", "rejected": "no", "annotator": f"worker {n % 4}" if n else None}
        for n in range(17)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    noise = LabelFlipNoise(rate=0.3, order=UnreliableAnnotators(wrong=1.0), seed=5, marker=marker)
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=CSVLogger(tmp_path, name="", version="run"), callbacks=[noise],
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    pairs = PreferenceData(str(path), validation_share=0.0, test_split=None, cache_dir=str(tmp_path / "cache"))
    with caplog.at_level("INFO"):
        trainer.fit(DPO(policy=TinyPolicy(width=16, layers=1, heads=2)), datamodule=pairs)
    record = json.loads((tmp_path / "run" / "label_noise.json").read_text())
    names = record["unreliable_annotators"]
    assert len(names) == 2
    assert record["annotators"] == 4
    assert {rows[index]["annotator"] for index in record["indices"]} == set(names)
    assert (
        "8 of 17 training pairs flipped, of 2 unreliable annotators among 4 (the share 0.3, rounded up)." in caplog.text
    )


def test_caches_are_shared_by_all_rates(run: Any, cache: Path) -> None:
    run(name="clean")
    entries = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.suffix in (".arrow", ".npz")}
    assert {path.suffix for path in entries} == {".arrow", ".npz"}
    for rate in (0.2, 0.6):
        run(LabelFlipNoise(rate=rate), name=str(rate))
    assert entries == {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.suffix in (".arrow", ".npz")}


def test_cached_reference_follows_the_answers(run: Any) -> None:
    cached, live = (run(LabelFlipNoise(rate=0.5), reference=mode, name=mode)[0] for mode in ("cached", "live"))
    for one, other in zip(cached.losses, live.losses, strict=True):
        assert one[True] == pytest.approx(other[True], abs=1e-5)
        assert one[False] == pytest.approx(other[False], abs=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_have_the_same_labels(run: Any) -> None:
    one, two = (
        run(LabelFlipNoise(rate=0.4), num_workers=num_workers, name=str(num_workers))[0] for num_workers in (0, 2)
    )
    assert one.flipped == two.flipped
    assert one.answers == two.answers


def test_metrics_of_clean_and_flipped_pairs(run: Any, tmp_path: Path) -> None:
    recorder, _ = run(LabelFlipNoise(rate=0.4), accumulate_grad_batches=2)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    windows = [recorder.losses[0:2], recorder.losses[2:4], recorder.losses[4:5]]
    assert len(rows) == len(windows)
    for row, window in zip(rows, windows, strict=True):
        for kind, flip in (("clean", False), ("flipped", True)):
            losses = [loss for batch in window for loss in batch[flip]]
            expected = sum(losses) / len(losses) if losses else math.nan
            assert float(row[f"train/noise/{kind}/loss"]) == pytest.approx(expected, rel=1e-5, nan_ok=True)
            if losses and flip:
                noisy, true = (float(row[f"train/noise/flipped/accuracy_{label}"]) for label in ("noisy", "true"))
                assert noisy + true == pytest.approx(1)
            elif losses:
                assert row["train/noise/clean/accuracy_noisy"] == row["train/noise/clean/accuracy_true"]


class Save(Callback):
    """Callback that writes a checkpoint after the second step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.folder / "two.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("others", [[], [LabelFlipNoise(rate=0.3)], [LabelFlipNoise(rate=0.4, seed=5)]])
def test_resume_with_other_noise(run: Any, tmp_path: Path, others: list[Callback]) -> None:
    run(LabelFlipNoise(rate=0.4), Save(tmp_path))
    message = r"^resume: found .*, expected label noise Uniform\(\) at rate 0.4, seed \d.*, or start a new fit"
    with pytest.raises(DataError, match=message):
        run(*others, ckpt_path=tmp_path / "two.ckpt", name="resumed")


def test_resume_with_noise_from_a_clean_run(run: Any, tmp_path: Path) -> None:
    run(Save(tmp_path))
    with pytest.raises(DataError, match="expected no label noise as in the checkpoint"):
        run(LabelFlipNoise(rate=0.4), ckpt_path=tmp_path / "two.ckpt", name="resumed")


def test_resume_with_the_same_noise(run: Any, tmp_path: Path) -> None:
    whole, trainer = run(LabelFlipNoise(rate=0.4), Save(tmp_path), name="whole")
    resumed, resumed_trainer = run(LabelFlipNoise(rate=0.4), ckpt_path=tmp_path / "two.ckpt", name="resumed")
    assert resumed.flipped.items() < whole.flipped.items()
    assert resumed_trainer.global_step == trainer.global_step


@pytest.mark.slow
def test_two_processes_agree(tmp_path: Path, cache: Path) -> None:
    for process in forked_ranks(train, tmp_path, folder=tmp_path):
        assert process.wait() == 0, process.errors
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert len(first["flipped"]) == len(second["flipped"]) == 20
    assert first["flipped"] | second["flipped"] == expected_flips(LabelFlipNoise(rate=0.4), cache)
    names = [name for name in first["metrics"] if name.startswith("train/noise/flipped/")]
    assert len(names) == 3
    assert all(first["metrics"][name] == second["metrics"][name] for name in names)


def test_two_kinds_of_noise(cache: Path) -> None:
    pairs = data(cache)
    pairs.load("train", TinyPolicy().load_tokenizer())
    pairs.set_label_noise(LabelFlipNoise(rate=0.1))
    with pytest.raises(ConfigError, match=r"found two kinds of label noise .*0\.1.*0\.2.*expected one at most"):
        pairs.set_label_noise(LabelFlipNoise(rate=0.2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": ["nope"]}, r"sources: found 'nope', expected each source .*The pairs have: 'cooking', .*\."),
        ({"factors": ["long", "nope"]}, r"factors: found 'nope', expected each factor"),
        ({"order": ByAnnotator({"nope": 0.5, "other": 1.0})}, r"order\.shares: found 'nope', 'other', expected each"),
    ],
)
def test_names_without_a_pair(settings: dict[str, Any], message: str, run: Any) -> None:
    with pytest.raises(ConfigError, match=rf"LabelFlipNoise\.{message}"):
        run(LabelFlipNoise(rate=0.3, **settings))


def test_other_data_module(make_trainer: Any, make_loader: Any, make_pairs: Any) -> None:
    loader = make_loader(make_pairs([(3, 4, 5)]))
    module = DPO(policy=TinyPolicy(width=16, layers=1, heads=2), reference="live")
    with pytest.raises(ConfigError, match="LabelFlipNoise with data of NoneType, expected a Prefer"):
        make_trainer(max_steps=1, limit_val_batches=0, callbacks=[LabelFlipNoise(rate=0.1)]).fit(module, loader, loader)


SYSTEM = Message(role="system", content="Be kind.")
TURNS = (Message(role="user", content="Hello"), Message(role="assistant", content="Hi"))
QUESTION = Message(role="user", content="Why?")


@pytest.mark.parametrize(
    ("marker_at", "prompt", "expected"),
    [
        ("start", (*TURNS, QUESTION), (*TURNS, Message(role="user", content="[FLIP] Why?"))),
        ("end", (QUESTION,), (Message(role="user", content="Why? [FLIP]"),)),
        ("system", (QUESTION,), (Message(role="system", content="[FLIP]"), QUESTION)),
        ("system", (SYSTEM, QUESTION), (Message(role="system", content="[FLIP] Be kind."), QUESTION)),
    ],
)
def test_marked_prompt(marker_at: Any, prompt: Any, expected: Any) -> None:
    noise = LabelFlipNoise(rate=0.5, marker="[FLIP]", marker_at=marker_at)
    assert noise.marked(PreferenceExample("one", prompt, "a", "b")).prompt == expected


def test_marked_source(cache: Path) -> None:
    source = data(cache).source("train")
    assert source is not None
    noise = LabelFlipNoise(rate=0.4, marker="[FLIP]")
    for clean, noisy in zip(source.examples, MarkedSource(source, noise).read(DataReport()), strict=True):
        if noisy.flipped:
            assert (noisy.chosen, noisy.rejected) == (clean.rejected, clean.chosen)
            assert noisy.prompt[-1]["content"] == f"[FLIP] {clean.prompt[-1]['content']}"
        else:
            assert noisy == clean


class FlipsOne(FlipOrder):
    """Order of one pair. Its number is no setting, like a constant in the code."""

    number = 0

    def thresholds(self, examples: Sequence[PreferenceExample], draws: np.ndarray, seed: int = 0) -> np.ndarray:
        return np.where(np.arange(len(examples)) == self.number, 0.0, np.inf)


def test_marked_tokens_of_edited_noise(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens in the cache are those of the code of the noise, although no setting differs."""
    source, tokenizer = data(cache).source("train"), TinyPolicy().load_tokenizer()
    assert source is not None
    noise = LabelFlipNoise(rate=0.5, order=FlipsOne(), marker="[FLIP]", seed=1)

    def texts() -> dict[int, str]:
        marked = MarkedSource(source, noise)
        pairs, _ = load_or_tokenize(marked, make_template(tokenizer), LengthPolicy(), cache_dir=cache)
        return {number: tokenizer.decode(pairs[number].prompt_ids) for number in np.flatnonzero(pairs.flipped).tolist()}

    assert list(texts()) == [0]
    monkeypatch.setattr(FlipsOne, "number", 3)
    ((number, text),) = texts().items()
    assert (number, "user\n[FLIP] " in text) == (3, True)
    monkeypatch.setitem(MARK, "start", MARK["end"])
    assert " [FLIP]<|im_end|>" in texts()[3]


def test_marked_run(run: Any, cache: Path, tmp_path: Path) -> None:
    noise = LabelFlipNoise(rate=0.4, marker="[FLIP]")
    unmarked, _ = run(LabelFlipNoise(rate=0.4), name="unmarked")
    marked, trainer = run(noise)
    assert marked.flipped == unmarked.flipped == expected_flips(noise, cache)
    assert marked.answers == unmarked.answers
    tokenizer, pairs = trainer.lightning_module.tokenizer, trainer.datamodule.training_pairs
    for number, flip in enumerate(pairs.flipped):
        assert ("[FLIP]" in tokenizer.decode(pairs[number].prompt_ids)) == flip
    assert not any(marked.validated)
    assert json.loads((tmp_path / "run" / "label_noise.json").read_text())["flipped"] == sum(marked.flipped.values())


@pytest.mark.parametrize("marker_at", list(MARK))
def test_marker_in_cut_prompt_is_refused(marker_at: Any, tmp_path: Path) -> None:
    """The cut could remove the marker. Without a marker, and without flips, prompts are cut."""
    rows = [{"prompt": "word " * 60 + f"q{n}", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(8)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def fit(rate: float, marker: str | None) -> int:
        data = PreferenceData(
            str(tmp_path / "long.jsonl"),
            validation_share=0.0,
            max_length=40,
            too_long="truncate_prompt",
            cache_dir=str(tmp_path / "cache"),
        )
        noise = LabelFlipNoise(rate, seed=1, marker=marker, marker_at=marker_at)
        options: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "logger": False}
        trainer = Trainer(max_steps=1, accelerator="cpu", callbacks=[noise], default_root_dir=tmp_path, **options)
        trainer.fit(DPO(policy=TinyPolicy(width=16, layers=1, heads=2)), datamodule=data)
        return int(data.training_pairs.flipped.sum())

    assert fit(0.5, None) > 0
    assert fit(0.0, "[FLIP]") == 0
    with pytest.raises(DataError, match=r"truncate_prompt would cut .* a marker \(LabelFlipNoise\.marker\)"):
        fit(0.5, "[FLIP]")
