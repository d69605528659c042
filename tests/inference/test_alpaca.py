"""`lpc-lightning alpaca`: the file that alpaca_eval reads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest

from lpc_lightning.cli import main
from lpc_lightning.inference import alpaca as module
from lpc_lightning.inference.generation import Condition, Decoding, answers
from lpc_lightning.inference.opening import open_policy
from tests.fixtures.commands import Outcome, run_command

INSTRUCTIONS = [
    {
        "dataset": "helpful_base" if number % 2 else "koala",
        "instruction": f"Tell me {'all ' * (number % 4)}about {topic}.",
        "output": "The reference's own answer.",
        "generator": "text_davinci_003",
    }
    for number, topic in enumerate(
        ["bees", "rivers", "the cost of a flight to Paris, in €", "7", "x\ny", "bread", "tea"]
    )
]


@pytest.fixture
def instructions(tmp_path: Path) -> Path:
    path = tmp_path / "alpaca_eval.json"
    path.write_text(json.dumps(INSTRUCTIONS))
    return path


Run = Callable[..., Outcome]


@pytest.fixture
def alpaca(capsys: pytest.CaptureFixture[str], plain: str, instructions: Path, tmp_path: Path) -> Run:
    fixed = [f"--model={plain}", f"--instructions={instructions}", f"--output={tmp_path / 'model_outputs.json'}"]

    def run(*flags: str) -> Outcome:
        return run_command(capsys, "alpaca", *fixed, "--max-new-tokens=6", "--batch-size=2", *flags)

    return run


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "model_outputs.json"


def test_the_file_is_what_alpaca_eval_reads(alpaca: Run, output: Path, plain: str) -> None:
    """alpaca_eval 0.6.6: `pandas.read_json(path)`; columns dataset, instruction, output, generator; one generator; and
    the pairs with the reference's outputs are joined by the instruction."""
    code, out, _ = alpaca("--temperature=1", "--seed=3")
    assert code == 0
    rows = json.loads(output.read_text())
    assert all(list(row) == ["dataset", "instruction", "output", "generator"] for row in rows)
    prompts = [({"role": "user", "content": row["instruction"]},) for row in INSTRUCTIONS]
    expected = answers(open_policy(plain), prompts, [Condition()], Decoding(6, temperature=1.0, seed=3))
    for row, requested, answered in zip(rows, INSTRUCTIONS, expected, strict=True):
        assert (row["dataset"], row["instruction"]) == (requested["dataset"], requested["instruction"])
        assert (row["output"], row["generator"]) == (answered.answers[0].text, "plain")
    table = pandas.read_json(output)
    joined = table.merge(pandas.DataFrame(INSTRUCTIONS), on=["instruction"], suffixes=("_2", "_1"))
    assert len(table) == len(joined) == len(INSTRUCTIONS)
    assert list(table["generator"].unique()) == ["plain"]
    assert f"alpaca_eval --model_outputs {output}" in out
    assert "7 answers were cut at 6 tokens" in out


@pytest.mark.slow
@pytest.mark.parametrize("done", [1, 2, 5])
def test_interrupted_command_resumes_its_file(
    done: int, alpaca: Run, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alpaca()
    whole = output.read_text()
    output.unlink()

    def cut(*arguments: Any) -> Iterator[Any]:
        for number, answered in enumerate(answers(*arguments)):
            if number == done:
                raise KeyboardInterrupt
            yield answered

    with monkeypatch.context() as patch:
        patch.setattr(module, "answers", cut)
        assert alpaca()[0] == 130
    kept = len(json.loads(output.read_text())) if output.exists() else 0
    assert kept == done - done % 2
    requested = []

    def watched(opened: Any, prompts: Any, *others: Any) -> Any:
        requested.extend(prompts)
        return answers(opened, prompts, *others)

    monkeypatch.setattr(module, "answers", watched)
    code, out, _ = alpaca()
    assert code == 0
    assert len(requested) == len(INSTRUCTIONS) - kept
    assert (f"holds {kept} of 7 answers already" in out) == (kept > 0)
    assert output.read_text() == whole
    requested.clear()
    assert alpaca()[0] == 0
    assert requested == []
    assert output.read_text() == whole


def test_limit_takes_the_first_instructions(alpaca: Run, output: Path) -> None:
    alpaca()
    whole = output.read_text()
    output.unlink()
    alpaca("--limit=3", "--generator=mine")
    assert [row["generator"] for row in json.loads(output.read_text())] == ["mine"] * 3
    output.unlink()
    alpaca("--limit=3")
    assert len(json.loads(output.read_text())) == 3
    alpaca()
    assert output.read_text() == whole


def failing(alpaca: Run, *flags: str) -> str:
    code, _, err = alpaca(*flags)
    assert code == 1
    assert "Traceback" not in err
    return err[err.index("error: ") + 7 :]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--temperature=0.5", "was written with temperature 0.0, now it is 0.5. Give another --output, or remove"),
        ("--seed=2", "was written with seed 0, now it is 2."),
        ("--limit=3", "holds 7 answers to 3 instructions."),
        ("--generator=other", "was written with generator 'plain', now it is 'other'."),
    ],
)
def test_answers_of_other_settings_are_not_mixed(alpaca: Run, output: Path, flag: str, message: str) -> None:
    alpaca()
    before = output.read_text()
    assert message in failing(alpaca, flag)
    assert output.read_text() == before


def test_answers_of_a_model_by_another_path(alpaca: Run, plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alpaca()
    monkeypatch.chdir(Path(plain).parent)
    for path in (Path(plain).name, f"./{Path(plain).name}/"):
        code, out, _ = alpaca(f"--model={path}")
        assert (code, "holds 7 of 7 answers already" in out) == (0, True)


def test_answers_of_other_weights_are_not_mixed(alpaca: Run, plain: str) -> None:
    alpaca()
    os.utime(Path(plain) / "model.safetensors", (1, 1))
    assert "was written with weights '" in failing(alpaca)


def test_answers_to_other_instructions_are_not_mixed(alpaca: Run, output: Path, instructions: Path) -> None:
    alpaca()
    instructions.write_text(json.dumps([INSTRUCTIONS[0], {"instruction": "Another one."}, *INSTRUCTIONS[2:]]))
    assert f"output: row 2 of {output} answers another instruction." in failing(alpaca)


@pytest.mark.parametrize("content", ["[{", '{"a": 1}', "[1]", None])
def test_a_file_of_something_else_is_left_alone(alpaca: Run, output: Path, content: str | None) -> None:
    alpaca()
    if content is None:
        output.with_suffix(".settings.json").unlink()
        content = output.read_text()
    output.write_text(content)
    assert f"output: {output} is there and cannot be gone on with" in failing(alpaca)
    assert output.read_text() == content


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"dataset": "x"}, "alpaca_eval.json row 2: found no text for `instruction`; the row has dataset."),
        ({"instruction": "hi \ud83d"}, "alpaca_eval.json row 2: invalid text: found half of a surrogate pair at char"),
        ({"instruction": 3}, "alpaca_eval.json row 2: found 3 for `instruction`, expected text."),
        ({"instruction": "a", "dataset": None}, "alpaca_eval.json row 2: found None for `dataset`, expected text."),
        (
            {"instruction": "a", "input": "b"},
            "alpaca_eval.json row 2: found `input`, which AlpacaEval 2 does not have.",
        ),
        (
            {"instruction": "a", "system": "b"},
            "alpaca_eval.json row 2: found `system`, which AlpacaEval 2 does not have.",
        ),
        (3, "alpaca_eval.json row 2: not an object"),
    ],
)
def test_a_bad_row_is_named(alpaca: Run, instructions: Path, output: Path, row: Any, message: str) -> None:
    instructions.write_text(json.dumps([INSTRUCTIONS[0], row]))
    assert failing(alpaca).startswith(message)
    assert not output.exists()


def test_a_bad_limit(alpaca: Run) -> None:
    assert failing(alpaca, "--limit=0") == "limit: found 0, expected at least 1.\n"


def test_alpaca_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["alpaca", "--help"])
    outcome = " ".join(capsys.readouterr().out.split())
    assert "Judging the answers is a step of your own, which needs a paid API" in outcome
    assert "alpaca_eval --model_outputs model_outputs.json" in outcome
