"""Tests of held-out pairs, and of validation prompts that are also in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lpc_lightning.data import Columns
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.rows import DataError
from tests.data.datamodule.conftest import Fit, ids, prompts, row, tiny
from tests.fixtures.real_data import DATA_DIR


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_held_out_prompts_are_not_in_training(share: float, data: Any, write_rows: Any) -> None:
    """Each prompt occurs three times, once as a conversation. Random hold-out of pairs would share prompts."""
    rows: list[Any] = []
    for number in range(200):
        messages = [{"role": "user", "content": f"Question {number}?"}]
        rows += [row(number), row(number, chosen="Other."), row(number) | {"prompt": messages, "rejected": "None."}]
    module = data(write_rows(rows), validation_share=share)
    train, validation = prompts(module, "train"), prompts(module, "validation")
    assert set(train).isdisjoint(validation)
    assert len(set(train) | set(validation)) == 200
    assert len(train) + len(validation) == 600
    assert len(set(validation)) / 200 == pytest.approx(share, abs=0.1)
    assert module.reports["train"].held_apart == len(validation)


@pytest.mark.parametrize("by", ["prompt", "pair"])
def test_held_out_texts_with_white_space(by: str, data: Any, write_rows: Any) -> None:
    """The template trims each turn, so that rows which differ by white space have the same tokens."""
    tokenizer = tiny().load_tokenizer()
    tokenizer.chat_template = (
        "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = [row(n) for n in range(60)]
    rows += [{name: f" {text}\n" for name, text in each.items()} for each in rows]
    module = data(write_rows(rows), validation_share=0.3, validation_by=by)
    train, held_out = (
        {(*pair.prompt_ids, *pair.chosen_ids) for pair in module.load(stage, tokenizer)}
        for stage in ("train", "validation")
    )
    assert len(train) + len(held_out) == 60
    assert train.isdisjoint(held_out)


def test_held_out_pairs_of_one_prompt(data: Any, write_rows: Any) -> None:
    """A pair that is labelled twice, with opposite labels, is on one side."""
    votes = [(f"Answer {number}.", "One.") for number in range(100)]
    path = write_rows([row(0, chosen=each[side], rejected=each[1 - side]) for side in (0, 1) for each in votes])
    module = data(path, validation_share=0.3, validation_by="pair")
    train, validation = (
        [frozenset([pair.chosen, pair.rejected]) for pair in module.source(stage).read(DataReport())]
        for stage in ("train", "validation")
    )
    assert set(train).isdisjoint(validation)
    assert len(train) + len(validation) == 200
    assert len(set(validation)) == pytest.approx(30, abs=15)
    with pytest.raises(DataError, match=r"single prompt are held out by pair \(`validation_by: pair`\)"):
        _ = [ids(data(path, validation_share=0.3), stage) for stage in ("train", "validation")]
    with pytest.raises(ValueError, match=r"data\.validation_by: found 'row', expected prompt or pair"):
        data(path, validation_by="row")


@pytest.mark.parametrize("votes", [["chosen"], ["chosen", "rejected"]])
def test_held_out_pairs_of_a_single_pair(votes: list[str], data: Any, write_rows: Any) -> None:
    """The advice of the error helps. The pair may be labelled twice."""
    path, columns = write_rows([row(0, vote=vote) for vote in votes]), Columns(vote="vote")
    with pytest.raises(DataError, match=r"a single pair is not \(`validation_share: 0`\)"):
        _ = [ids(data(path, validation_by="pair", columns=columns), stage) for stage in ("train", "validation")]
    assert len(ids(data(path, validation_share=0.0, columns=columns), "train")) == len(votes)


@pytest.mark.real
@pytest.mark.skipif(not DATA_DIR.exists(), reason="needs the files of $LPC_DATA_DIR")
@pytest.mark.parametrize(("name", "count"), [("ukp_votes", 610), ("humour_votes", 579)])
def test_vote_configs_hold_out_512_pairs(name: str, count: int, data: Any) -> None:
    """The counts are those of docs/noise.md."""
    root = Path(__file__).parents[3]
    settings = yaml.safe_load((root / f"configs/data/{name}.yaml").read_text())["init_args"]
    rows = data(settings.pop("path"), **settings | {"columns": Columns(**settings["columns"])})
    held_out = list(rows.source("validation").read(DataReport()))
    assert len(held_out) == count >= 512
    questions = len({pair.prompt[-1]["content"] for pair in held_out})
    words = {1: "the one prompt", 5: "five prompts"}
    assert f" | {count}, of {words[questions]}" in (root / "docs/noise.md").read_text()


def test_validation_share_0_holds_out_nothing(data: Any, write_rows: Any) -> None:
    module = data(write_rows([row(n) for n in range(20)]), validation_share=0.0)
    assert len(ids(module, "train")) == 20
    assert module.source("validation") is None


def test_path_without_validation_file_holds_out(data: Any, write_rows: Any) -> None:
    train = write_rows([row(n) for n in range(100)], "train.jsonl")
    module = data({"train": train}, validation_share=0.3)
    held = ids(module, "validation")
    assert 15 < len(held) < 45
    assert sorted(held + ids(module, "train")) == sorted(f"train.jsonl line {n}" for n in range(1, 101))
    assert module.source("test") is None


@pytest.mark.parametrize("number", [2, 3, 10])
def test_small_file_has_one_validation_prompt(number: int, data: Any, write_rows: Any) -> None:
    """The default share of 0.05 selects none of a few prompts."""
    rows = [row(n) for n in range(number)] + [row(n, chosen="Other.") for n in range(number)]
    module = data(write_rows(rows))
    train, validation = ids(module, "train"), ids(module, "validation")
    assert len(validation) == 2
    assert sorted(train + validation) == sorted(f"pairs.jsonl line {n}" for n in range(1, 2 * number + 1))
    assert prompts(module, "validation")[0] == prompts(module, "validation")[1]


def test_validation_file_within_training_pattern(data: Any, write_rows: Any, tmp_path: Path) -> None:
    """The pattern of the training files covers the validation file."""
    write_rows([row(n) for n in range(5)], "a.jsonl")
    own = write_rows([row(n) for n in range(5, 8)], "dev.jsonl")
    with pytest.warns(UserWarning, match="found 3 of 3 pairs with the prompt of a training pair"):
        run = Fit(tmp_path, data({"train": tmp_path / "*.jsonl", "validation": own}))
    assert run.metrics["data/validation/prompts_in_training"] == 3


@pytest.mark.parametrize(
    ("settings", "validation", "count"),
    [
        ({"system_turns": "drop"}, "validation", 2),  # the two prompts differ by their system texts
        ({"system_turns": "keep"}, "validation", None),
        ({"system_turns": "drop", "validation_by": "pair", "validation_share": 0.5}, "train", None),
    ],
)
def test_prompts_in_training_as_tokens(
    settings: dict[str, Any], validation: str, count: int | None, data: Any, write_rows: Any
) -> None:
    """Prompts are shared on purpose if pairs are held out."""
    rows = [row(0, system="Be kind.", chosen=f"Good {n}.") for n in range(8)]
    rows += [row(0, system="Be brief.", split=validation), row(0, system="Be glad.", split=validation), row(9)]
    module = data(write_rows(rows), **settings)
    train, held_out = prompts(module, "train"), prompts(module, "validation")
    assert bool(set(train) & set(held_out)) == (settings["system_turns"] == "drop")
    assert module._counts("validation").get("data/prompts_in_training") == count
