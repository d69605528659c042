"""Annotators named in the prompt: the same pairs as without names, in every stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpc_lightning.data import ByAnnotator, Columns, DataError, PreferenceData
from lpc_lightning.data.datamodule import STAGES, Stage
from lpc_lightning.data.noise.flip_order import draw
from lpc_lightning.data.sources.example_source import RowSource
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.policy import TinyPolicy
from lpc_lightning.types import PreferenceExample

ALL: tuple[Stage, ...] = (*STAGES["fit"], *STAGES["test"])
NAMES = ["anna", "ben", ""]


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Forty prompts with pairs of two annotators and of one without a name. A new annotator is in the test alone."""
    rows = [
        {
            "id": f"{number} {name}",
            "prompt": [{"role": "user", "content": f"Question {number}?"}],
            "chosen": f"Yes {number}",
            "rejected": "No",
            "annotator": "cleo" if number % 5 == 0 and name == "ben" else name,
            "split": "test" if number % 5 == 0 else "train",
        }
        for number in range(40)
        for name in NAMES
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def both(file: str, tmp_path: Path) -> list[PreferenceData]:
    """The data without and with names, from one token cache."""
    columns = (Columns(), Columns(named_in_prompt="annotator"))
    return [
        PreferenceData(file, columns=each, validation_share=0.3, cache_dir=str(tmp_path / "cache")) for each in columns
    ]


@pytest.mark.parametrize("stage", ALL)
def test_names_in_the_prompts_of_every_stage(stage: Stage, both: list[PreferenceData]) -> None:
    plain, named = (list(data.source(stage).read(DataReport())) for data in both)  # type: ignore[union-attr]
    assert len(plain) == len(named) > 0
    for before, after in zip(plain, named, strict=True):
        line = f"Annotator: {before.annotator}\n" if before.annotator else ""
        assert after.prompt == ({"role": "user", "content": line + before.prompt[0]["content"]},)
        others = [(each.id, each.chosen, each.rejected, each.annotator, each.flipped) for each in (before, after)]
        assert others[0] == others[1]
    assert {"cleo" in each.prompt[0]["content"] for each in named} == ({False, True} if stage == "test" else {False})


@pytest.mark.parametrize("stage", ALL)
def test_tokens_of_named_prompts(stage: Stage, both: list[PreferenceData]) -> None:
    """The cache keeps both apart. Pairs of one question share a hash, the same as without names."""
    tokenizer = TinyPolicy(width=16, layers=1, heads=2).load_tokenizer()
    plain, named = (data.load(stage, tokenizer) for data in both)
    assert plain is not None
    assert named is not None
    np.testing.assert_array_equal(plain.prompts, named.prompts)
    for before, after in zip(plain, named, strict=True):
        assert before.prompt == after.prompt
        assert (before.chosen_ids, before.rejected_ids) == (after.chosen_ids, after.rejected_ids)
        name = f"Annotator: {before.annotator}\n" if before.annotator else ""
        texts = [str(tokenizer.decode(pair.prompt_ids)) for pair in (before, after)]
        assert texts[1] == texts[0].replace("Question", f"{name}Question")


@pytest.mark.parametrize("shared_prompts", [False, True])
def test_names_do_not_change_batches(shared_prompts: bool, both: list[PreferenceData]) -> None:
    """An arm that reads names is trained on the batches of the arm that does not."""
    tokenizer = TinyPolicy(width=16, layers=1, heads=2).load_tokenizer()
    epochs: list[list[list[int]]] = []
    for data in both:
        data.batch_size, data.batch_order = 8, ByAnnotator(4, shared_prompts)
        pairs = data.load("train", tokenizer)
        assert pairs is not None
        epochs.append(list(data.training_batches(pairs, seed=3)))
    assert epochs[0] == epochs[1]


def test_name_is_in_the_last_user_turn(tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant", "user"], "abc", strict=True)]
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": turns, "chosen": "x", "rejected": "y", "factor": "kind"}))
    (pair,) = RowSource(str(path), columns=Columns(named_in_prompt="factor")).read(DataReport())
    assert [turn["content"] for turn in pair.prompt] == ["a", "b", "Factor: kind\nc"]


def test_names_in_cut_prompts_are_refused(file: str, tmp_path: Path) -> None:
    """The cut could remove the name. Prompts without names are cut."""
    tokenizer = TinyPolicy(width=16, layers=1, heads=2).load_tokenizer()
    for name, too_long in ((None, "truncate_prompt"), ("annotator", "drop"), ("annotator", "truncate_prompt")):
        data = PreferenceData(
            file,
            columns=Columns(named_in_prompt=name),  # type: ignore[arg-type]
            max_prompt_length=3,
            too_long=too_long,  # type: ignore[arg-type]
            cache_dir=str(tmp_path / "cache"),
        )
        if (name, too_long) == (None, "truncate_prompt"):
            pairs = data.load("test", tokenizer)
            assert pairs is not None
            assert {len(pair.prompt_ids) for pair in pairs} == {3}
            continue
        message = "No pair is left" if too_long == "drop" else "a name \\(data.columns.named_in_prompt\\) or a marker"
        with pytest.raises(DataError, match=message):
            data.load("test", tokenizer)


def test_label_noise_ignores_names(both: list[PreferenceData]) -> None:
    def draws(data: PreferenceData) -> list[float]:
        source: Any = data.source("train")
        pairs: list[PreferenceExample] = list(source.read(DataReport()))
        return [draw(3, pair) for pair in pairs]

    assert draws(both[0]) == draws(both[1])
