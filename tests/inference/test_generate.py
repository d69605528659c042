"""`lpc-lightning generate` as a user gives it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lpc_lightning.inference.generation import Condition, Decoding, answers
from lpc_lightning.inference.opening import open_policy
from tests.fixtures.commands import Outcome, checkpoint_of, run_command

PROMPT = "How do I grow tomatoes?"


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture(scope="module")
def checkpoint(tiny_fit: Callable[..., Path]) -> str:
    """Of a fit of three steps, with three codes that matter."""
    latent = ["--latent=MarginalSpace", "--latent.num_codes=3", "--latent.init_logit_std=2"]
    return str(checkpoint_of(tiny_fit("--trainer.max_steps=3", *latent)))


Run = Callable[..., Outcome]


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str]) -> Run:
    return partial(run_command, capsys, "generate")


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_stand_side_by_side(generate: Run, checkpoint: str, tmp_path: Path) -> None:
    output = tmp_path / "new" / "answers.jsonl"
    flags = ["--codes", "0", "2", "--max-new-tokens=8", f"--output={output}"]
    code, out, err = generate("--model", checkpoint, "--prompt", PROMPT, *flags)
    assert (code, err) == (0, "")
    (row,) = written(output)
    opened = open_policy(checkpoint)
    conditions = [Condition(), Condition("code 0", 0), Condition("code 2", 2)]
    (expected,) = answers(opened, [({"role": "user", "content": PROMPT},)], conditions, Decoding(8))
    assert row["model"] == opened.name
    assert row["prompt"] == [{"role": "user", "content": PROMPT}]
    assert row["prior"] == pytest.approx(expected.prior, rel=1e-6)
    assert [(each["under"], each["text"]) for each in row["answers"]] == [(a.under, a.text) for a in expected.answers]
    lines = out.splitlines()
    assert lines[0] == f"Prompt 1: {PROMPT}"
    ranked = sorted(range(3), key=lambda code: -row["prior"][code])
    assert lines[1] == "Likeliest codes under the prior: " + ", ".join(f"{k} ({row['prior'][k]:.3f})" for k in ranked)
    assert [part.strip() for part in lines[3].split("|")] == ["prior", "code 0", "code 2"]
    assert len({line.index("|") for line in lines[3:5]}) == 1
    assert lines[-1] == f"Wrote {output}."
    assert out.count("[...]") == sum(not answer.finished for answer in expected.answers)


def test_narrow_terminals_get_one_below_the_other(
    generate: Run, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    _, out, _ = generate("--model", checkpoint, "--prompt", PROMPT, "--codes=0,2", "--max-new-tokens=2")
    lines = out.splitlines()
    assert [lines.index(title) for title in ("prior", "code 0", "code 2")] == [3, 7, 11]


def test_a_file_of_prompts_is_answered_in_its_order(generate: Run, checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Why?\nWhere do all the long prompts go?\nWho?\n")
    weights = tmp_path / "weights.json"
    weights.write_text("[0.5, 0, 0.5]")
    outcome = []
    for size in ("1", "3"):
        output = tmp_path / f"{size}.jsonl"
        flags = ["--temperature=1", "--max-new-tokens=5", f"--batch-size={size}", f"--output={output}"]
        prompts = ["--prompts", str(tmp_path / "prompts.txt"), "--system", "Be brief."]
        code, out, _ = generate("--model", checkpoint, *prompts, "--code-weights", str(weights), *flags)
        assert code == 0
        outcome.append(out.replace(str(output), ""))
    assert outcome[0] == outcome[1]
    rows = written(output)
    assert [row["prompt"][-1]["content"] for row in rows] == ["Why?", "Where do all the long prompts go?", "Who?"]
    assert {row["prompt"][0]["content"] for row in rows} == {"Be brief."}
    assert {tuple(each["under"] for each in row["answers"]) for row in rows} == {("prior", "code weights")}


def test_command_line_weights_select_a_code(generate: Run, checkpoint: str, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    flags = ["--code-weights", "0", "1", "0", "--codes", "1", "--max-new-tokens=5", f"--output={output}"]
    assert generate("--model", checkpoint, "--prompt", PROMPT, *flags)[0] == 0
    _, mixed, code = written(output)[0]["answers"]
    assert (mixed["under"], code["under"]) == ("code weights", "code 1")
    assert mixed["text"] == code["text"]


def test_annotator_weights_come_from_a_file(generate: Run, checkpoint: str, tmp_path: Path) -> None:
    """As `adapt` writes it; a name with a comma is one name."""
    weights, output = tmp_path / "code_weights.json", tmp_path / "answers.jsonl"
    weights.write_text(json.dumps({"anna": [1, 0, 0], "ben, of Rome": [0, 1, 0]}))
    for name, code in (("anna", 0), ("ben, of Rome", 1)):
        flags = ["--code-weights", str(weights), name, "--codes", str(code), "--max-new-tokens=5", f"--output={output}"]
        assert generate("--model", checkpoint, "--prompt", PROMPT, *flags)[0] == 0
        _, mixed, alone = written(output)[0]["answers"]
        assert (mixed["under"], mixed["text"]) == ("code weights", alone["text"])


@pytest.mark.parametrize(
    ("held", "names", "message"),
    [
        ({"anna": [1, 0, 0], "ben": [0, 1, 0]}, ["cleo"], "found cleo for WEIGHTS, expected one of anna, ben."),
        ({"anna": [1, 0, 0], "ben": [0, 1, 0]}, [], "found no name for WEIGHTS, expected one of anna, ben."),
        ([1, 0, 0], ["anna"], "found the name anna for WEIGHTS, which holds no lists by name."),
        ({"anna": [1, 0]}, ["anna"], "found 2 numbers for version_0-"),
    ],
)
def test_generate_missing_code_weights(
    held: Any, names: list[str], message: str, generate: Run, checkpoint: str, tmp_path: Path
) -> None:
    weights = tmp_path / "code_weights.json"
    weights.write_text(json.dumps(held))
    code, _, err = generate("--model", checkpoint, "--prompt=a", "--code-weights", str(weights), *names)
    assert code == 1
    assert err.splitlines()[-1].startswith(f"error: code_weights: {message.replace('WEIGHTS', str(weights))}")


def test_a_plain_model_answers_without_codes(generate: Run, plain: str, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    code, out, _ = generate("--model", plain, "--prompt", PROMPT, "--max-new-tokens=3", f"--output={output}")
    assert code == 0
    (row,) = written(output)
    assert (row["model"], row["prior"]) == ("plain", None)
    assert [each["under"] for each in row["answers"]] == ["plain"]
    assert "Likeliest codes" not in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "prompt: expected either a prompt (--prompt) or a file of prompts (--prompts)."),
        (
            ["--prompt=a", "--prompts=b"],
            "prompt: expected either a prompt (--prompt) or a file of prompts (--prompts).",
        ),
        (["--prompts=nowhere.txt"], "There is no file nowhere.txt. Expected a text file with a prompt a line."),
        (["--prompt=a", "--codes=3"], "codes: found 3, but the latent of version_0-"),
        (["--prompt=a", "--codes=-1"], "codes: found -1, but the latent of version_0-"),
        (["--prompt=a", "--prior-mode=7"], "prior_mode: found 7, expected one of mean, sample, argmax, or"),
        (["--prompt=a", "--code-weights", "1", "2"], "code_weights: found 2 numbers for version_0-"),
        (
            ["--prompt=a", "--code-weights=x"],
            "code_weights: found x (could not convert string to float: 'x'), expected",
        ),
        (["--prompt=a", "--code-weights=no.json"], "code_weights: there is no file no.json."),
        (["--prompt=a", "--temperature=-1"], "temperature: found -1.0, expected a number of at least 0."),
        (["--prompt= "], "prompt: found ' ', expected text."),
        (["--prompt=caf\udce9"], r"prompt: invalid text: found half of a surrogate pair at character 3 of 'caf\udce9'"),
        (["--prompt=a", "--system=\ud83d"], "system: invalid text: found half of a surrogate pair at character 0 of "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generate_invalid_settings(generate: Run, checkpoint: str, flags: list[str], message: str) -> None:
    code, out, err = generate("--model", checkpoint, *flags)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("flags", [["--codes=0"], ["--code-weights=1"], ["--prior-mode=mean"]])
def test_a_plain_model_has_nothing_to_choose(generate: Run, plain: str, flags: list[str]) -> None:
    code, _, err = generate("--model", plain, "--prompt=a", *flags)
    name = flags[0][2:].partition("=")[0].replace("-", "_")
    assert code == 1
    assert err.endswith(f"\nerror: {name}: plain has no latent, so that there is nothing to choose.\n")


def test_invalid_prompts_keep_earlier_answers(generate: Run, plain: str, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    generate("--model", plain, "--prompt", PROMPT, "--max-new-tokens=1", f"--output={output}")
    earlier = output.read_text()
    code, _, err = generate("--model", plain, "--prompt", "a " * 10_000, f"--output={output}")
    assert code == 1
    assert "prompt 1: found" in err
    assert earlier
    assert output.read_text() == earlier


def test_a_model_that_is_not_there(generate: Run, tmp_path: Path) -> None:
    code, _, err = generate("--model", str(tmp_path / "none.ckpt"), "--prompt=a")
    assert code == 1
    assert err.startswith("error: found no file")
