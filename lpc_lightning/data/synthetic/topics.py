"""Data types of a domain: phrases, tips and topics."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class Phrase(NamedTuple):
    """A text and its number of words."""

    text: str
    words: int


def phrase(text: str) -> Phrase:
    """Count the words of a text. Words are separated by spaces."""
    return Phrase(text, len(text.split()))


class Tip(NamedTuple):
    """An advice. `act` is a verb phrase in the base form, and `reason` is a clause that follows it."""

    act: Phrase
    reason: Phrase


@dataclass(frozen=True, eq=False)
class Topic:
    """Topic of a prompt, with the content of its answers.

    All texts start in lower case and have no final period, no contraction and no style phrase. So the style of an
    answer comes only from its composition. Tips may be in any order. A short answer with all extras must fit into 25
    words. So at least two acts have at most 3 words, mistakes have at most 4, and examples at most 5.
    """

    goal: str
    """Verb phrase that completes "How do I ...?"."""
    gerund: str
    """Gerund of the goal that completes "any advice on ...?"."""
    tips: tuple[tuple[str, str], ...]
    """(act, reason) pairs."""
    mistakes: tuple[str, ...]
    """Verb phrases that complete "Take care not to ..."."""
    examples: tuple[str, ...]
    """Clauses that complete "For example, ..."."""

    @cached_property
    def tip_phrases(self) -> tuple[Tip, ...]:
        """Tips with their numbers of words."""
        return tuple(Tip(phrase(act), phrase(reason)) for act, reason in self.tips)

    @cached_property
    def mistake_phrases(self) -> tuple[Phrase, ...]:
        """Mistakes with their numbers of words."""
        return tuple(map(phrase, self.mistakes))

    @cached_property
    def example_phrases(self) -> tuple[Phrase, ...]:
        """Examples with their numbers of words."""
        return tuple(map(phrase, self.examples))


@dataclass(frozen=True, eq=False)
class Domain:
    """Field of knowledge with its topics, such as cooking."""

    name: str
    contexts: tuple[str, ...]
    """Sentences about the situation of the user. They fit every topic and request no style of answer."""
    topics: tuple[Topic, ...]
