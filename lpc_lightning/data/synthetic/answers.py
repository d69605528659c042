"""Answers with the content of a topic, composed in a given style.

The number of words is drawn from the length class only. The phrases of the style use a part of it, and the content
fills the rest. So the other attributes change the mean length by little more than one word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from lpc_lightning.data.synthetic.seeding import pick, shuffled
from lpc_lightning.data.synthetic.topics import Phrase, Tip, Topic
from lpc_lightning.data.synthetic.voices import CAUTIONS, EXAMPLES, VOICES, WARM_CLOSERS, WARM_OPENERS, Voice

SHORT_WORDS = (12, 25)
"""Minimum and maximum number of words of a short answer. The dashes of a list are not counted."""
LONG_WORDS = (40, 80)
"""Minimum and maximum number of words of a long answer."""

# The content is filled up to a number of words drawn from these ranges. It ends a few words below this number, so the
# lower ends are above the minimum lengths. The upper ends are never exceeded.
_SHORT_TARGET = (19, 25)
_LONG_TARGET = (48, 72)
_BRIEF = 3  # maximum number of words of a style phrase in a short answer
_REASON = {"short": 0.5, "long": 0.75}  # probability that a reason directly follows its tip


def compose(topic: Topic, style: Mapping[str, str], rng: Random) -> str:
    """Compose an answer on a topic, with a random wording.

    Args:
        topic: Topic of the answer.
        style: Value of every attribute in `ATTRIBUTES`.
        rng: Random generator for the wording.

    Returns:
        Full sentences in one paragraph, or lines that start with "- ", with optional lines before and after them.
    """
    short = style["length"] == "short"
    listed = style["layout"] == "list"
    register = style["register"]
    voice = VOICES[register, style["stance"]]
    warm = style["tone"] == "warm"
    cautioned = style["caution"] == "with_caution"
    illustrated = style["example"] == "with_example"
    # A short answer with three extras, or with two extras and a list, has room for the briefest phrases only.
    crowded = short and warm + cautioned + illustrated + listed >= 3

    def choose(options: Sequence[Phrase]) -> Phrase:
        if crowded:
            options = _briefest(options)
        elif short:
            options = [option for option in options if option.words <= _BRIEF] or _briefest(options)
        return pick(rng, options)

    before: list[str] = []
    after: list[str] = []
    words = 0
    if warm:
        # A short answer has room for one warm phrase. A long answer may have two.
        where = rng.random()
        if where < 0.7:
            opener = choose(WARM_OPENERS[register])
            before.append(opener.text)
            words += opener.words
        if where >= 0.7 or (where < 0.3 and not short):
            closer = choose(WARM_CLOSERS[register])
            after.append(closer.text)
            words += closer.words
    if cautioned:
        cue, mistake = choose(CAUTIONS[register]), _any(rng, topic.mistake_phrases, crowded)
        after.insert(0, f"{cue.text} {mistake.text}.")
        words += cue.words + mistake.words
    if illustrated:
        cue, example = choose(EXAMPLES[register]), _any(rng, topic.example_phrases, crowded)
        after.insert(0, f"{cue.text} {example.text}.")
        words += cue.words + example.words

    # An introduction uses much of the room of a short list. The first item can show register and stance instead.
    intro = choose(voice.intros) if listed and (not short or (not crowded and rng.random() < 0.6)) else None
    if intro:
        before.append(intro.text)
        words += intro.words
        leads = [pick(rng, voice.items) for _ in topic.tips]
    else:
        leads = [choose(voice.leads), *_follows(voice, listed, len(topic.tips) - 1, rng)]

    low, high = _SHORT_TARGET if short else _LONG_TARGET
    room = low + int(rng.random() * (high - low + 1)) - words
    tips = shuffled(rng, topic.tip_phrases)
    if crowded:
        tips.sort(key=_act_words)
        room = high - words
    sentences = _content(tips, leads, room, 2 if listed else 1, _REASON[style["length"]], rng)

    if not listed:
        return " ".join([*before, *sentences, *after])
    lines = [f"- {sentence}" for sentence in sentences]
    if before:
        lines.insert(0, " ".join(before))
    if after:
        lines.append(" ".join(after))
    return "\n".join(lines)


def _content(
    tips: Sequence[Tip], leads: Sequence[Phrase], room: int, at_least: int, reason_share: float, rng: Random
) -> list[str]:
    """Return sentences with at most `room` words in total, and with at least `at_least` tips even if they exceed it."""
    parts: list[list[str]] = []
    bare: list[tuple[int, Tip]] = []
    for lead, tip in zip(leads, tips, strict=True):
        cost = lead.words + tip.act.words
        if len(parts) >= at_least and cost > room:
            continue
        room -= cost
        parts.append([lead.text, tip.act.text] if lead.text else [tip.act.text])
        # The required number of tips is reached before the first reason is added.
        if tip.reason.words <= room and len(parts) >= at_least and rng.random() < reason_share:
            room -= tip.reason.words
            parts[-1].append(tip.reason.text)
        else:
            bare.append((len(parts) - 1, tip))
    for index, tip in bare:
        if tip.reason.words <= room:
            room -= tip.reason.words
            parts[index].append(tip.reason.text)
    return [_sentence(" ".join(part)) for part in parts]


def _follows(voice: Voice, listed: bool, count: int, rng: Random) -> list[Phrase]:
    if listed:
        return [pick(rng, voice.items) for _ in range(count)]
    return shuffled(rng, voice.follows)[:count]


def _any(rng: Random, options: Sequence[Phrase], crowded: bool) -> Phrase:
    return pick(rng, _briefest(options) if crowded else options)


def _briefest(options: Sequence[Phrase]) -> list[Phrase]:
    fewest = min(option.words for option in options)
    return [option for option in options if option.words == fewest]


def _act_words(tip: Tip) -> int:
    return tip.act.words


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
