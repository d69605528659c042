"""Prompts from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lpc_lightning.data import DataError
from lpc_lightning.inference.prompts import read_prompts, text_prompt


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [user("Hi"), {"role": "assistant", "content": "Hello."}, user("Why?")]


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffFirst?\n\n  Second \u2028one?  \r\n", encoding="utf-8")
    assert read_prompts(str(tmp_path / "prompts.txt")) == [(user("First?"),), (user("Second \u2028one?"),)]


def test_rows_have_texts_messages_or_conversations(tmp_path: Path) -> None:
    rows = [{"prompt": "First?", "chosen": "left alone"}, {"prompt": TALK}, {"prompt": [SYSTEM, user("Why?")]}]
    rows.append({"prompt": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"})
    assert read_prompts(written(tmp_path / "prompts.jsonl", rows)) == [
        (user("First?"),),
        tuple(TALK),
        (SYSTEM, user("Why?")),
        tuple(TALK),
    ]


def test_a_system_turn_is_put_where_there_is_none(tmp_path: Path) -> None:
    other = {"role": "system", "content": "Be kind."}
    path = written(tmp_path / "prompts.jsonl", [{"prompt": TALK}, {"prompt": [other, user("Why?")]}])
    assert read_prompts(path, "Be brief.") == [(SYSTEM, *TALK), (other, user("Why?"))]
    assert text_prompt("Why?", "Be brief.") == (SYSTEM, user("Why?"))


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("option", [None, "Answer in German."])
def test_a_system_column_is_a_turn(name: str, option: str | None, tmp_path: Path) -> None:
    """As in training. The option does not replace it."""
    rows = [{"prompt": prompt, name: "Be brief."} for prompt in ("Why?", [SYSTEM, user("Why?")])]
    path = written(tmp_path / "prompts.jsonl", [*rows, {"prompt": "Why?", name: ""}])
    others = () if option is None else ({"role": "system", "content": option},)
    assert read_prompts(path, option) == [(SYSTEM, user("Why?"))] * 2 + [(*others, user("Why?"))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Sum", "input": "1 2"}, r"line 2: ambiguous columns: found text in 'prompt' and in 'input'"),
        ({"prompt": "Sum", "input": [1, 2]}, r"line 2: wrong type: found a list of 2 int in 'input', expected text"),
        ({"prompt": "Hi", "system": "a", "system_prompt": "b"}, r"line 2: ambiguous columns: found different system"),
        ({"question": "Why?"}, r"prompts\.jsonl line 2: found the columns question, expected `prompt`"),
        ({"prompt": 7}, r"prompts\.jsonl line 2: unknown form: prompt: int"),
        ({"prompt": TALK[:2]}, r"prompts\.jsonl line 2: prompt does not end in a user turn"),
        ({"prompt": " "}, r"prompts\.jsonl line 2: empty prompt"),
        ([1], r"prompts\.jsonl line 2: not an object"),
    ],
)
def test_a_row_without_a_prompt_is_named(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_prompts(written(tmp_path / "prompts.jsonl", [{"prompt": "First?", "input": "", "weight": "?"}, row]))


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_no_file_and_no_prompts(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"There is no file .*{name}"):
        read_prompts(str(tmp_path / name))
    (tmp_path / name).write_text("\n\n")
    with pytest.raises(DataError, match=f"{name} holds no"):
        read_prompts(str(tmp_path / name))


def test_text_prompt_not_unicode(tmp_path: Path) -> None:
    message = r"invalid text: found half of a surrogate pair at character 3 of 'caf\\udce9'"
    for name, texts in (("prompt", ("caf\udce9",)), ("system", ("a", "caf\udce9"))):
        with pytest.raises(DataError, match=f"^{name}: {message}"):
            text_prompt(*texts)
    path = written(tmp_path / "prompts.jsonl", [{"prompt": "First?"}])
    with pytest.raises(DataError, match=f"^system: {message}"):
        read_prompts(path, "caf\udce9")
    with pytest.raises(DataError, match=rf"prompts\.jsonl line 1: {message}"):
        read_prompts(written(tmp_path / "prompts.jsonl", [{"prompt": "caf\udce9"}]))


def test_read_prompts_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"is not UTF-8: .* at byte 3"):
        read_prompts(str(tmp_path / "prompts.txt"))
