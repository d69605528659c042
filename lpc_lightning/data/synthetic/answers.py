"""Answers with the content of a topic, composed in a given style.

The number of words is drawn from the length class only. The phrases of the style use a part of it, and the content
fills the rest. So the other attributes change the mean length by little more than one word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Form:
    """Style of an answer, with the phrases that have room in it."""

    register: str
    stance: str
    short: bool
    listed: bool
    warm: bool
    cautioned: bool
    illustrated: bool

    @classmethod
    def of(cls, style: Mapping[str, str]) -> _Form:
        """Return the form of a style."""
        return cls(
            register=style["register"],
            stance=style["stance"],
            short=style["length"] == "short",
            listed=style["layout"] == "list",
            warm=style["tone"] == "warm",
            cautioned=style["caution"] == "with_caution",
            illustrated=style["example"] == "with_example",
        )

    @property
    def voice(self) -> Voice:
        """Phrases of the register and the stance."""
        return VOICES[self.register, self.stance]

    @property
    def crowded(self) -> bool:
        """True for a short answer with three extras, or with two and a list. It has room for the briefest phrases."""
        return self.short and self.warm + self.cautioned + self.illustrated + self.listed >= 3

    def choose_style(self, options: Sequence[Phrase], rng: Random) -> Phrase:
        """Draw a phrase of the style. A short answer has room for brief ones."""
        if self.crowded:
            options = _briefest(options)
        elif self.short:
            options = [option for option in options if option.words <= _BRIEF] or _briefest(options)
        return pick(rng, options)

    def choose_content(self, options: Sequence[Phrase], rng: Random) -> Phrase:
        """Draw a phrase of the topic."""
        return pick(rng, _briefest(options) if self.crowded else options)


def compose(topic: Topic, style: Mapping[str, str], rng: Random) -> str:
    """Compose an answer on a topic, with a random wording.

    Args:
        topic: Topic of the answer.
        style: Value of every attribute in `ATTRIBUTES`.
        rng: Random generator for the wording.

    Returns:
        Full sentences in one paragraph, or lines that start with "- ", with optional lines before and after them.
    """
    form = _Form.of(style)
    # The texts of a seed stay the same only if these draws keep their order.
    openers, closers = _warm_phrases(form, rng) if form.warm else ([], [])
    cautions = [_cued(form, CAUTIONS, topic.mistake_phrases, rng)] if form.cautioned else []
    examples = [_cued(form, EXAMPLES, topic.example_phrases, rng)] if form.illustrated else []
    intros, leads = _leads(form, len(topic.tips), rng)
    before, after = [*openers, *intros], [*examples, *cautions, *closers]
    sentences = _content(topic, form, leads, sum(extra.words for extra in (*before, *after)), rng)
    return _lay_out(form.listed, [extra.text for extra in before], sentences, [extra.text for extra in after])


def _warm_phrases(form: _Form, rng: Random) -> tuple[list[Phrase], list[Phrase]]:
    """Draw warm phrases for start and end. A short answer has room for one of them. A long answer may have two."""
    where = rng.random()
    opens, closes = where < 0.7, where >= 0.7 or (where < 0.3 and not form.short)
    openers = [form.choose_style(WARM_OPENERS[form.register], rng)] if opens else []
    return openers, [form.choose_style(WARM_CLOSERS[form.register], rng)] if closes else []


def _cued(form: _Form, cues: Mapping[str, Sequence[Phrase]], options: Sequence[Phrase], rng: Random) -> Phrase:
    """Draw a sentence: a cue of the register, and a phrase of the topic."""
    cue, content = form.choose_style(cues[form.register], rng), form.choose_content(options, rng)
    return Phrase(f"{cue.text} {content.text}.", cue.words + content.words)


def _leads(form: _Form, count: int, rng: Random) -> tuple[list[Phrase], list[Phrase]]:
    """Draw an optional introduction, and a lead for each of `count` tips."""
    voice = form.voice
    # An introduction uses much of the room of a short list. The first item can show register and stance instead.
    if form.listed and (not form.short or (not form.crowded and rng.random() < 0.6)):
        return [form.choose_style(voice.intros, rng)], [pick(rng, voice.items) for _ in range(count)]
    first = form.choose_style(voice.leads, rng)
    if form.listed:
        return [], [first, *(pick(rng, voice.items) for _ in range(count - 1))]
    return [], [first, *shuffled(rng, voice.follows)[: count - 1]]


def _content(topic: Topic, form: _Form, leads: Sequence[Phrase], extra_words: int, rng: Random) -> list[str]:
    """Return sentences of tips that fill the answer.

    Args:
        topic: Topic of the answer.
        form: Form of the answer.
        leads: Start of each tip.
        extra_words: Number of words of the other parts of the answer.
        rng: Random generator for number and order of the tips.
    """
    low, high = _SHORT_TARGET if form.short else _LONG_TARGET
    target = low + int(rng.random() * (high - low + 1))
    tips = shuffled(rng, topic.tip_phrases)
    if form.crowded:
        tips.sort(key=_act_words)
        target = high
    reason_share = _REASON["short" if form.short else "long"]
    return _fill(tips, leads, target - extra_words, 2 if form.listed else 1, reason_share, rng)


def _fill(
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


def _lay_out(listed: bool, before: list[str], sentences: list[str], after: list[str]) -> str:
    """Join the parts of an answer to a paragraph, or to lines with a list of the sentences."""
    if not listed:
        return " ".join([*before, *sentences, *after])
    lines = [" ".join(before), *(f"- {sentence}" for sentence in sentences), " ".join(after)]
    return "\n".join(line for line in lines if line)


def _briefest(options: Sequence[Phrase]) -> list[Phrase]:
    fewest = min(option.words for option in options)
    return [option for option in options if option.words == fewest]


def _act_words(tip: Tip) -> int:
    return tip.act.words


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
