"""Removal of this machine's paths from what is published."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

FOLDERS = re.compile(r"(?:file://|(?<![\w./:~]))(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\,;'\"]+[/\\])+")
"""The folders of an absolute path within a text. The path of a web address is none."""
TEMPLATES = ("template", "template_kwargs")
"""Keys of the arguments of a template. The model reads their texts, and needs them as they were in training."""
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")


def without_folders(value: Any) -> Any:
    """Return JSON values in which each absolute path is replaced by its last part.

    Paths within a sentence stay, and so do the arguments of a template.
    """
    if isinstance(value, dict):
        return {without_folders(name): _without_folders(name, entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(entry) for entry in value]
    if not isinstance(value, str):
        return value
    is_path = os.path.isabs(value) and os.path.exists(value)  # `/model` as well, which has no folders
    if is_path:
        return os.path.basename(value)
    # A path and a list of paths have no white space, unless a folder has.
    return FOLDERS.sub("", value) if FOLDERS.match(value) or not re.search(r"\s", value) else value


def _without_folders(name: str, entry: Any) -> Any:
    return entry if name in TEMPLATES and isinstance(entry, dict) else without_folders(entry)


def clean_configs(folder: Path) -> None:
    """Replace absolute paths in the config files of an exported folder, such as the `name_or_path` of a tokenizer.

    Only texts that are a path as a whole are changed: a chat template may contain anything.
    """
    for name in CONFIGS:
        if (file := folder / name).is_file():
            text = file.read_text(encoding="utf-8")
            content = json.loads(text)
            if (cleaned := _clean(content)) != content:
                file.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _clean(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_clean(entry) for entry in value]
    is_path = isinstance(value, str) and (match := FOLDERS.match(value)) and not re.search(r"\s", value[match.end() :])
    return without_folders(value) if is_path else value
