"""Style phrases of an answer, for register, stance, tone, caution and example.

Each attribute has its own cue words. For example, casual phrases that show the register have a contraction, and formal
phrases have none. Only hedged phrases have may, might, maybe, perhaps, could, probably or guess. So each attribute can
be detected in a text independently of the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from lpc_lightning.data.synthetic.topics import Phrase, phrase

Phrases = tuple[Phrase, ...]


def _phrases(*texts: str) -> Phrases:
    return tuple(map(phrase, texts))


@dataclass(frozen=True)
class Voice:
    """Phrases of one register and stance. All except the intros precede a verb phrase in the base form."""

    leads: Phrases
    """Start of an answer. Each phrase shows register and stance."""
    follows: Phrases
    """Start of a later sentence. The empty phrase gives a plain imperative."""
    intros: Phrases
    """Line before a list. Each phrase shows register and stance."""
    items: Phrases
    """Start of a later item of a list."""


VOICES: dict[tuple[str, str], Voice] = {
    ("formal", "direct"): Voice(
        leads=_phrases("one should", "one must", "it is essential to", "it is important to", "it is necessary to"),
        follows=_phrases("furthermore,", "in addition,", "one must also", "it is equally vital to", ""),
        intros=_phrases(
            "The following is required:",
            "One should proceed as follows:",
            "The essential measures are these:",
            "It is necessary to do this:",
        ),
        items=_phrases(""),
    ),
    ("formal", "hedged"): Voice(
        leads=_phrases("one might", "one could", "perhaps one should", "it may be advisable to", "it might be wise to"),
        follows=_phrases("it may also help to", "one could also", "perhaps also", "it could also pay to", ""),
        intros=_phrases(
            "The following may help:",
            "One might consider the following:",
            "Perhaps the following will serve:",
            "It may be wise to do this:",
        ),
        items=_phrases("perhaps", "", ""),
    ),
    ("casual", "direct"): Voice(
        leads=_phrases("you've gotta", "you'll wanna", "you've got to", "it's easy, just", "here's the trick:"),
        follows=_phrases("also,", "oh, and", "plus,", "and definitely", "then there's this:"),
        intros=_phrases("Here's the deal:", "You've gotta do this:", "Here's what works:", "It's easy, just do this:"),
        items=_phrases("", "", "", "just"),
    ),
    ("casual", "hedged"): Voice(
        leads=_phrases("I'd maybe", "I'd probably", "maybe you'd wanna", "I guess you'd wanna", "I'd say maybe"),
        follows=_phrases("maybe", "oh, and maybe", "you could also", "I'd probably also", "also,"),
        intros=_phrases(
            "Here's what might work:", "I'd maybe try this:", "This'll probably help:", "I guess I'd try this:"
        ),
        items=_phrases("maybe", "", ""),
    ),
}

WARM_OPENERS: dict[str, Phrases] = {
    "formal": _phrases(
        "It is a pleasure to help.",
        "With great pleasure.",
        "Delighted to help.",
        "Always a pleasure.",
        "I am very glad to help.",
        "Thank you for asking.",
        "What a thoughtful question.",
    ),
    "casual": _phrases(
        "Great question!", "Happy to help!", "Thanks for asking!", "So glad you asked!", "Love that you asked this!"
    ),
}
WARM_CLOSERS: dict[str, Phrases] = {
    "formal": _phrases(
        "I wish you every success.",
        "You are on an excellent path.",
        "With warmest wishes.",
        "Every good wish.",
    ),
    "casual": _phrases("You've got this!", "Rooting for you!", "You'll do great, promise!"),
}
CAUTIONS: dict[str, Phrases] = {
    "formal": _phrases(
        "Caution: do not", "Take care not to", "Please be careful not to", "A word of caution: do not", "Beware: do not"
    ),
    "casual": _phrases("Careful, don't", "Watch out, don't", "Just be careful you don't", "Heads up: don't"),
}
EXAMPLES: dict[str, Phrases] = {
    "formal": _phrases("For example,", "For instance,", "As an example,", "To give an example,"),
    "casual": _phrases("Quick example:", "Like, for example,", "For instance,", "Here's an example:"),
}
