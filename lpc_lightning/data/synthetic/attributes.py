"""Style attributes of an answer. A preference factor is an attribute and its preferred value."""

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
"""Two values of each attribute. No two attributes share a value, so a value identifies a factor."""

Style = dict[str, str]
"""Value of every attribute."""

_ATTRIBUTE = {value: attribute for attribute, values in ATTRIBUTES.items() for value in values}


def attribute_of(factor: str) -> str:
    """Return the attribute that has the value `factor`.

    Raises:
        ValueError: No attribute has the value `factor`.
    """
    if factor not in _ATTRIBUTE:
        raise ValueError(f"factor: found {factor!r}, expected one of {', '.join(_ATTRIBUTE)}")
    return _ATTRIBUTE[factor]


def opposite(factor: str) -> str:
    """Return the other value of the same attribute.

    Raises:
        ValueError: No attribute has the value `factor`.
    """
    first, second = ATTRIBUTES[attribute_of(factor)]
    return second if factor == first else first
