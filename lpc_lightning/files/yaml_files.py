"""Check of YAML text before a parser reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lpc_lightning.errors import ConfigError, one_line

LARGEST = 100_000
"""Largest number of values of a file, counted as often as its aliases repeat them."""
DIGITS = 18
"""Most digits of an integer. More do not fit into 64 bits."""
INTEGER = "tag:yaml.org,2002:int"
SUFFIXES = (".yaml", ".yml")
# libyaml is ten times as fast, but not always installed.
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Loader of plain YAML. Another one may read tags of its own."""


def read_yaml(path: Path, loader: Any = LOADER) -> Any:
    """Read a YAML file.

    Args:
        path: The file.
        loader: Class of the loader.

    Raises:
        ConfigError: The file cannot be read, or it is no plain YAML (see `parse_yaml`).
    """
    return _construct(_compose_file(path), str(path), loader)


def parse_yaml(content: bytes | str, source: str) -> Any:
    """Parse YAML text.

    Args:
        content: The text, or its bytes in UTF-8.
        source: File or setting that it comes from, for errors.

    Raises:
        ConfigError: The text is not UTF-8 or no YAML, it refers to itself, or a value is too large.
    """
    return _construct(_compose(content, source), source, LOADER)


def check_yaml(path: Path, seen: set[Path] | None = None) -> None:
    """Check a config file and the YAML files that it names.

    Raises:
        ConfigError: See `read_yaml`.
    """
    seen = set() if seen is None else seen
    if path.resolve() in seen:
        return
    seen.add(path.resolve())
    for text in _texts(_compose_file(path)):
        named = path.parent / text
        if text.endswith(SUFFIXES) and len(text) < 4096 and "\0" not in text and named.is_file():
            check_yaml(named, seen)


def check_value(text: str, option: str) -> None:
    """Check a value of the command line. Text that is no YAML is a text, which the parser reads as it is.

    Raises:
        ConfigError: The value is a comment, refers to itself or is too large.
    """
    try:
        node = yaml.compose(text, LOADER)
    except (yaml.YAMLError, RecursionError, ValueError):
        return
    if node is None and text.strip():
        raise ConfigError(
            f"{option}: found {text}, which YAML reads as a comment, expected a value. State a text that begins with # "
            f"in a config file, in quotes: `{option.rpartition('.')[2]}: {json.dumps(text, ensure_ascii=False)}`."
        )
    _check_size(node, option)


def _compose_file(path: Path) -> yaml.Node | None:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}, expected a YAML file that can be read.") from error
    return _compose(content, str(path))


def _compose(content: bytes | str, source: str) -> yaml.Node | None:
    """Parse text to nodes, in which an alias is not expanded, and check their number and integers."""
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        node: yaml.Node | None = yaml.compose(text, LOADER)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source}: found the byte 0x{error.object[error.start]:02x} at position {error.start}, expected text in "
            "UTF-8. Save the file as UTF-8."
        ) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = one_line(error)
        raise ConfigError(f"{source}: found text that is no YAML ({reason}), expected YAML.") from error
    _check_size(node, source)
    return node


def _check_size(node: yaml.Node | None, source: str) -> None:
    size = 0 if node is None else _size(node, source)
    if size > LARGEST:
        raise ConfigError(
            f"{source}: found {size} values after its aliases are expanded, expected at most {LARGEST}. Write the "
            "values without aliases."
        )


def _construct(node: yaml.Node | None, source: str, loader_class: Any) -> Any:
    if node is None:
        return None
    loader = loader_class("")
    try:
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        reason = one_line(error)
        raise ConfigError(f"{source}: found a value that cannot be read ({reason}), expected YAML.") from error
    finally:
        loader.dispose()


def _size(root: yaml.Node, source: str) -> int:
    """Return the number of values below a node, counted as often as aliases repeat them.

    The walk keeps a list of its own, so that deep nesting cannot end it.

    Raises:
        ConfigError: A node contains itself, or an integer has too many digits.
    """
    sizes: dict[int, int | None] = {}  # None while the parts of a node are counted
    stack = [root]
    while stack:
        node = stack[-1]
        parts = list(_parts(node))
        if id(node) not in sizes:
            sizes[id(node)] = None
            _check_integer(node, source)
            for part in parts:
                if id(part) not in sizes:
                    stack.append(part)
                elif sizes[id(part)] is None:
                    line = part.start_mark.line + 1
                    raise ConfigError(
                        f"{source} line {line}: found a value that contains itself (an alias of its own anchor), "
                        "expected values that end. Remove the alias."
                    )
            continue
        stack.pop()
        if sizes[id(node)] is None:
            sizes[id(node)] = 1 + sum(sizes[id(part)] or 0 for part in parts)
    return sizes[id(root)] or 0


def _check_integer(node: yaml.Node, source: str) -> None:
    if not isinstance(node, yaml.ScalarNode):
        return
    digits = len(re.sub(r"[^0-9a-fA-F]", "", node.value))
    if node.tag == INTEGER and digits > DIGITS:
        raise ConfigError(
            f"{source} line {node.start_mark.line + 1}: found an integer of {digits} digits, "
            f"expected at most {DIGITS} digits."
        )


def _parts(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _texts(root: yaml.Node | None) -> Iterator[str]:
    """Yield every text of a checked document once."""
    seen: set[int] = set()
    stack = [] if root is None else [root]
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            yield node.value
        stack.extend(_parts(node))
