"""JSON whose faults are found by row: repeated keys, integers with too many digits, and text that is not UTF-8."""

from __future__ import annotations

import json
from typing import Any

from lpc_lightning.data.sources.rows import BadRow, undecoded


class JsonParser:
    """Parser that marks repeated keys and long integers. `fault` then finds the mark in a row, and undecoded bytes.

    The parser of the standard library keeps the last of repeated keys without notice, and stops at long integers.
    """

    def __init__(self) -> None:
        self._has_marks = False
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_int=self._integer)

    def parse(self, text: str) -> Any:
        """Parse a JSON text.

        Raises:
            ValueError: The text is not JSON.
            RecursionError: It is nested too deep.
        """
        return self._decoder.decode(text)

    def parse_bytes(self, content: bytes) -> Any:
        """Parse a JSON text of bytes, which may hold texts that are not UTF-8.

        Raises:
            UnicodeDecodeError: The bytes are not UTF-8, and not JSON with such texts.
            ValueError: The text is not JSON.
            RecursionError: It is nested too deep.
        """
        try:
            return self.parse(content.decode())
        except UnicodeDecodeError as error:
            self._has_marks = True
            try:
                return self.parse(content.decode(errors="surrogateescape"))
            except ValueError:
                raise error from None

    def fault(self, row: Any) -> BadRow | None:
        """Return the fault of a parsed value, or None."""
        open_values = [row] if self._has_marks else []
        while open_values:
            value = open_values.pop()
            if isinstance(value, Marked):
                return value.fault
            if isinstance(value, str) and (found := undecoded(value, f"the text {value[:40]!a}")):
                return found
            if isinstance(value, dict | list):
                open_values += [*value, *value.values()] if isinstance(value, dict) else value
        return None

    def _object(self, pairs: list[tuple[str, Any]]) -> Any:
        names = dict(pairs)
        if len(names) == len(pairs):
            return names
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        return self._mark(BadRow("repeated column", f"the key {repeated!r} occurs {keys.count(repeated)} times"))

    def _integer(self, digits: str) -> Any:
        try:
            return int(digits)
        except ValueError:
            return self._mark(BadRow("invalid JSON", f"found an integer with {len(digits)} digits"))

    def _mark(self, fault: BadRow) -> Marked:
        self._has_marks = True
        return Marked(fault)


class Marked:
    """Value that has a fault."""

    def __init__(self, fault: BadRow) -> None:
        self.fault = fault
