from __future__ import annotations

import re
from random import Random

import pytest

from lpc_lightning.data.synthetic.domains import DOMAINS
from lpc_lightning.data.synthetic.prompts import PERSONAS, QUESTIONS, SPLITS, draw_prompt, split_of


def prompts(split: str, n: int, seed: int = 0) -> list[str]:
    rng = Random(seed)
    return [draw_prompt(split, rng)[2] for _ in range(n)]


def test_splits_share_no_prompt_across_seeds() -> None:
    drawn = {split: set(prompts(split, 3000, seed)) for seed, split in enumerate(SPLITS)}
    assert not drawn["train"] & drawn["validation"]
    assert not drawn["train"] & drawn["test"]
    assert not drawn["validation"] & drawn["test"]
    assert all(split_of(text) == split for split, texts in drawn.items() for text in texts)


def test_split_shares() -> None:
    # The 20,000 texts are not drawn for a split, so a share has a standard deviation below 0.3 %.
    found = [split_of(f"How do I do task {number}?") for number in range(20_000)]
    assert found.count("train") / len(found) == pytest.approx(0.8, abs=0.012)
    assert found.count("validation") / len(found) == pytest.approx(0.1, abs=0.009)
    assert found.count("test") / len(found) == pytest.approx(0.1, abs=0.009)


@pytest.mark.parametrize(("split", "n", "at_least"), [("train", 5000, 0.985), ("validation", 2000, 0.97)])
def test_prompts_are_diverse(split: str, n: int, at_least: float) -> None:
    assert len(set(prompts(split, n))) >= at_least * n


def test_topics_and_domains_are_uniform() -> None:
    rng = Random(3)
    drawn = [draw_prompt("test", rng) for _ in range(5000)]
    assert len({topic.goal for _, topic, _ in drawn}) == sum(len(domain.topics) for domain in DOMAINS)
    for domain in DOMAINS:
        share = sum(found is domain for found, _, _ in drawn)
        assert abs(share - 500) < 5 * (5000 * 0.1 * 0.9) ** 0.5


def test_prompts_are_well_formed() -> None:
    for text in prompts("train", 3000):
        assert re.fullmatch(r"([A-Z][\w ,-]+[.?] ?)+", text), text
        assert "  " not in text
        assert not text.endswith(" ")


def test_prompts_request_no_style() -> None:
    style = re.compile(
        r"\b(short|brief|long|detail|concise|formal|casual|polite|list|bullet|step by step|steps|example|warn|kind"
        r"|quick)",
        re.IGNORECASE,
    )
    output = [*QUESTIONS, *PERSONAS, *(context for domain in DOMAINS for context in domain.contexts)]
    assert [text for text in output if style.search(text)] == ["I have a long commute."]
