"""Paths of the machine that exports are not published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lpc_lightning.inference.local_paths import clean_configs, without_folders


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/ann/data/pairs.jsonl", "pairs.jsonl"),
        ("~/data/pairs.jsonl", "pairs.jsonl"),
        ("file:///home/ann/pairs.jsonl", "pairs.jsonl"),
        ("/data/a.jsonl,/data/b.jsonl", "a.jsonl,b.jsonl"),
        ("C:\\Users\\ann\\model", "model"),
        ("/tmp", "tmp"),
        ("somebody/Base-7B", "somebody/Base-7B"),
        ("runs/version_0/checkpoints/best.ckpt", "runs/version_0/checkpoints/best.ckpt"),
        ("https://huggingface.co/somebody/Base-7B", "https://huggingface.co/somebody/Base-7B"),
        ("Answer with and/or, 1/2, /no_think.", "Answer with and/or, 1/2, /no_think."),
        ("/home/ann/my pairs.jsonl", "my pairs.jsonl"),
        ("Read /usr/share/doc/guide.txt first.", "Read /usr/share/doc/guide.txt first."),
    ],
)
def test_without_folders_of_a_text(text: str, expected: str) -> None:
    assert without_folders({"a": [text, 1, None], text: {"b": text}}) == {
        "a": [expected, 1, None],
        expected: {"b": expected},
    }


def test_without_folders_keeps_template_arguments() -> None:
    arguments = {"guide": "/usr/share/doc/guide.txt", "tools": [{"description": "/etc/a/b, and then"}]}
    template = {"kind": "chat", "arguments": arguments}
    settings = {"template": "chat", "template_kwargs": arguments}
    origin = {"template": template, "data": {"init_args": {"path": "/home/ann/a.json", **settings}}}
    assert without_folders(origin) == {"template": template, "data": {"init_args": {"path": "a.json", **settings}}}


def test_clean_configs_changes_whole_paths_only(tmp_path: Path) -> None:
    template = "{{ '/a/b/c' }} is no path"
    content = {"name_or_path": "/home/ann/model", "chat_template": template, "nested": [{"_name_or_path": "/x/y/z"}]}
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_text(json.dumps(content))
    clean_configs(tmp_path)
    cleaned = {"name_or_path": "model", "chat_template": template, "nested": [{"_name_or_path": "z"}]}
    for name, expected in (("config.json", cleaned), ("tokenizer_config.json", cleaned), ("tokenizer.json", content)):
        assert json.loads((tmp_path / name).read_text()) == expected
