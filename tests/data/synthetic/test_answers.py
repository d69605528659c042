"""Tests of generated answers. The oracle is a set of style detectors that use the text only."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import product
from random import Random

import pytest

from lpc_lightning.data.synthetic.answers import LONG_WORDS, SHORT_WORDS, compose
from lpc_lightning.data.synthetic.attributes import ATTRIBUTES, Style
from lpc_lightning.data.synthetic.domains import DOMAINS
from lpc_lightning.data.synthetic.topics import Topic

FORMAL = re.compile(
    r"\bone (should|must|might|could)\b|\bit (is|may be|might be) "
    r"(essential|important|necessary|wise|advisable)\b|\bthe following\b|\bthe essential measures\b",
    re.IGNORECASE,
)
HEDGE = re.compile(r"\b(may|might|maybe|perhaps|could|probably|I guess)\b", re.IGNORECASE)
WARM = re.compile(
    r"pleasure|delighted|glad|thank|thoughtful|wish|excellent path|great question|happy to help|love that"
    r"|you've got this|rooting for|you'll do great",
    re.IGNORECASE,
)
CAUTION = re.compile(r"\b(caution|careful|beware|heads up|watch out|take care)\b", re.IGNORECASE)
EXAMPLE = re.compile(r"\b(example|instance)\b", re.IGNORECASE)


def words(text: str) -> int:
    return sum(word != "-" for word in text.split())


DETECTORS: dict[str, Callable[[str], str]] = {
    "length": lambda text: "short" if words(text) <= 30 else "long",
    "register": lambda text: "casual" if "'" in text else "formal",
    "stance": lambda text: "hedged" if HEDGE.search(text) else "direct",
    "layout": lambda text: "list" if sum(line.startswith("- ") for line in text.split("\n")) >= 2 else "prose",
    "tone": lambda text: "warm" if WARM.search(text) else "neutral",
    "caution": lambda text: "with_caution" if CAUTION.search(text) else "without_caution",
    "example": lambda text: "with_example" if EXAMPLE.search(text) else "without_example",
}

# The article depends on the sound ("an hour", "a useful"). These are the exceptions that occur in the texts.
SILENT = ("hour", "honest", "heir")
CONSONANT = ("use", "uni", "one", "euro")


def glitches(text: str) -> list[str]:
    """Return the glitches of a text: spacing, punctuation, capitals, articles, repeated words."""
    found = []
    if re.search(r" {2}| \n|\n\n|^\s|\s$", text):
        found.append("spaces")
    if re.search(r"\s[.,:;!?]|[.,:;!?]{2}|,[.!]", text):
        found.append("punctuation")
    for line in text.split("\n"):
        if not re.search(r"[.!:]$", line):
            found.append(f"no stop: {line}")
        for sentence in re.split(r"(?<=[.!])\s+", line.removeprefix("- ")):
            if not sentence[0].isupper():
                found.append(f"lower-case start: {sentence}")
    for article, word in re.findall(r"\b(an?) (\w+)", text.lower()):
        vowel = word.startswith(SILENT) or (word[0] in "aeiou" and not word.startswith(CONSONANT))
        if (article == "an") != vowel:
            found.append(f"{article} {word}")
    if re.search(r"\b(\w+) \1\b", text.lower()):
        found.append("doubled word")
    if re.search(r"[{}<>]|annotator", text):
        found.append("template")
    return found


def styles() -> Iterator[Style]:
    for values in product(*ATTRIBUTES.values()):
        yield dict(zip(ATTRIBUTES, values, strict=True))


def topics() -> list[Topic]:
    return [topic for domain in DOMAINS for topic in domain.topics]


@pytest.fixture(scope="module")
def answers() -> list[tuple[Style, Topic, str]]:
    """Return 48 answers for every style, over all topics in turn."""
    rng = Random(5)
    everything = topics()
    return [
        (style, topic, compose(topic, style, rng))
        for round_ in range(48)
        for number, style in enumerate(styles())
        for topic in [everything[(7 * number + round_) % len(everything)]]
    ]


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_attributes_are_detectable_in_every_style(answers: list[tuple[Style, Topic, str]], attribute: str) -> None:
    wrong = [(style, text) for style, _, text in answers if DETECTORS[attribute](text) != style[attribute]]
    assert wrong == []


def test_formal_answers_have_formal_cues(answers: list[tuple[Style, Topic, str]]) -> None:
    for style, _, text in answers:
        assert bool(FORMAL.search(text)) == (style["register"] == "formal"), text


def test_layout_is_a_list_or_one_paragraph(answers: list[tuple[Style, Topic, str]]) -> None:
    for style, _, text in answers:
        lines = text.split("\n")
        if style["layout"] == "prose":
            assert len(lines) == 1, text
        else:
            bullets = [line.startswith("- ") for line in lines]
            assert bullets.count(False) <= 2, text
            # The items are in one block.
            first, last = bullets.index(True), len(bullets) - bullets[::-1].index(True)
            assert all(bullets[first:last]), text


def test_lengths(answers: list[tuple[Style, Topic, str]]) -> None:
    for style, _, text in answers:
        low, high = SHORT_WORDS if style["length"] == "short" else LONG_WORDS
        assert low <= words(text) <= high, text
    assert SHORT_WORDS == (12, 25)
    assert LONG_WORDS == (40, 80)


@pytest.mark.parametrize("length", ATTRIBUTES["length"])
@pytest.mark.parametrize("attribute", [name for name in ATTRIBUTES if name != "length"])
def test_length_is_independent_of_other_attributes(
    answers: list[tuple[Style, Topic, str]], attribute: str, length: str
) -> None:
    means = []
    for value in ATTRIBUTES[attribute]:
        counts = [words(text) for style, _, text in answers if (style["length"], style[attribute]) == (length, value)]
        means.append(sum(counts) / len(counts))
    assert abs(means[0] - means[1]) < 2.5


def test_answers_have_no_glitches(answers: list[tuple[Style, Topic, str]]) -> None:
    assert [(text, found) for _, _, text in answers if (found := glitches(text))] == []


def test_answers_contain_tips_of_the_topic(answers: list[tuple[Style, Topic, str]]) -> None:
    for style, topic, text in answers:
        output = [act for act, _ in topic.tips if act.lower() in text.lower()]
        assert len(output) >= (2 if "long" in style.values() or "list" in style.values() else 1), text
        assert any(mistake in text for mistake in topic.mistakes) == (style["caution"] == "with_caution"), text
        assert any(example in text for example in topic.examples) == (style["example"] == "with_example"), text


def test_answers_repeat_no_sentence(answers: list[tuple[Style, Topic, str]]) -> None:
    for _, _, text in answers:
        sentences = re.split(r"[.!:\n]\s*", text.lower())
        kept = [sentence for sentence in sentences if sentence]
        assert len(kept) == len(set(kept)), text


def test_answers_are_diverse(answers: list[tuple[Style, Topic, str]]) -> None:
    assert len({text for _, _, text in answers}) > 0.99 * len(answers)
    # One topic in one style has many wordings.
    topic, style = topics()[0], next(styles())
    rng = Random(0)
    assert len({compose(topic, style, rng) for _ in range(300)}) > 80


def test_glitch_detectors_detect() -> None:
    assert glitches("One should rest. It is fine.") == []
    for bad in ("Two  spaces.", "No stop", "lower start.", "Eat a apple.", "Wait a hour.", "An user.", "The the end."):
        assert glitches(bad), bad
