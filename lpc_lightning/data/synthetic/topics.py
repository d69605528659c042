"""What a domain of the generator is made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class Phrase(NamedTuple):
    """A piece of text and its length."""

    text: str
    words: int


def phrase(text: str) -> Phrase:
    """`text` with its number of words (runs of characters between spaces)."""
    return Phrase(text, len(text.split()))


class Tip(NamedTuple):
    """One piece of advice: what to do, and why. `act` is a verb phrase in the base form, `reason` a clause after it."""

    act: Phrase
    reason: Phrase


@dataclass(frozen=True, eq=False)
class Topic:
    """Something people ask about, and what there is to say on it.

    All texts start in lower case and carry no final stop, no contraction and no style cue, so that the style of an
    answer comes from its composition alone. Tips stand in any order. The lengths that make a short answer with every
    extra fit into its 25 words: at least two acts of at most 3 words, mistakes of at most 4, examples of at most 5.
    """

    goal: str
    """A verb phrase that completes "How do I ...?"."""
    gerund: str
    """The same as a noun, completing "any advice on ...?"."""
    tips: tuple[tuple[str, str], ...]
    """(act, reason) pairs."""
    mistakes: tuple[str, ...]
    """Verb phrases that complete "Take care not to ..."."""
    examples: tuple[str, ...]
    """Clauses that complete "For example, ..."."""

    @cached_property
    def tip_phrases(self) -> tuple[Tip, ...]:
        """The tips, counted."""
        return tuple(Tip(phrase(act), phrase(reason)) for act, reason in self.tips)

    @cached_property
    def mistake_phrases(self) -> tuple[Phrase, ...]:
        """The mistakes, counted."""
        return tuple(map(phrase, self.mistakes))

    @cached_property
    def example_phrases(self) -> tuple[Phrase, ...]:
        """The examples, counted."""
        return tuple(map(phrase, self.examples))


@dataclass(frozen=True, eq=False)
class Domain:
    """A field of life that prompts come from."""

    name: str
    contexts: tuple[str, ...]
    """Sentences an asker adds about their situation. They fit every topic and ask for no style of answer."""
    topics: tuple[Topic, ...]
