"""The style attributes of an answer. A preference factor is one attribute together with the value that is preferred."""

from __future__ import annotations

from collections.abc import Mapping

ATTRIBUTES: Mapping[str, tuple[str, str]] = {
    "length": ("short", "long"),
    "register": ("formal", "casual"),
    "stance": ("hedged", "direct"),
    "layout": ("list", "prose"),
    "tone": ("warm", "neutral"),
    "caution": ("with_caution", "without_caution"),
    "example": ("with_example", "without_example"),
}
"""The two values of each attribute. No two attributes share a value, so that a value names a factor by itself."""

Style = dict[str, str]
"""The value of every attribute."""

_ATTRIBUTE = {value: attribute for attribute, values in ATTRIBUTES.items() for value in values}


def attribute_of(factor: str) -> str:
    """The attribute whose value `factor` is.

    Raises:
        ValueError: `factor` is no value of any attribute.
    """
    if factor not in _ATTRIBUTE:
        raise ValueError(f"factor: found {factor!r}, expected one of {', '.join(_ATTRIBUTE)}")
    return _ATTRIBUTE[factor]


def opposite(factor: str) -> str:
    """The other value of the same attribute. Raises `ValueError` as `attribute_of` does."""
    first, second = ATTRIBUTES[attribute_of(factor)]
    return second if factor == first else first
