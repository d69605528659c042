from __future__ import annotations

import re

import pytest

from lpc_lightning.data.synthetic.domains import DOMAINS
from lpc_lightning.data.synthetic.topics import Domain, Topic

TOPICS = [pytest.param(topic, id=topic.goal) for domain in DOMAINS for topic in domain.topics]
# Style cues. Content with one of these would show an attribute that the answer does not have.
CUES = re.compile(
    r"'|\b(one (should|must|might|could)|you|should|may|might|could|perhaps|maybe|probably|possibly|guess|careful"
    r"|caution|beware|watch out|heads up|take care|avoid|never|example|instance|thank|glad|pleasure|wish\w*|love that"
    r"|gotta|wanna|essential|following)\b",
    re.IGNORECASE,
)


def test_ten_domains_with_many_topics() -> None:
    assert len(DOMAINS) == len({domain.name for domain in DOMAINS}) == 10
    goals = [topic.goal for domain in DOMAINS for topic in domain.topics]
    assert len(goals) == len(set(goals)) >= 100


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda domain: domain.name)
def test_contexts_are_sentences(domain: Domain) -> None:
    assert len(set(domain.contexts)) == len(domain.contexts) == 10
    assert all(re.fullmatch(r"[A-Z][\w ,-]+\.", context) for context in domain.contexts)


@pytest.mark.parametrize("topic", TOPICS)
def test_content_fits_every_composition(topic: Topic) -> None:
    content = [*(text for tip in topic.tips for text in tip), *topic.mistakes, *topic.examples]
    assert len(set(content)) == len(content)
    for text in [topic.goal, topic.gerund, *content]:
        assert re.fullmatch(r"[\w ,-]+", text), text
        assert " ".join(text.split()) == text
        assert not CUES.search(text), text
    assert len(topic.tips) == 5
    acts = sorted(len(act.split()) for act, _ in topic.tips)
    # With these limits, a short list with all extras has at most 25 words, and a long answer at least 40.
    assert acts[1] <= 3
    assert acts[-1] <= 5
    assert all(3 <= len(reason.split()) <= 8 for _, reason in topic.tips)
    assert all(len(mistake.split()) <= 4 for mistake in topic.mistakes)
    assert all(len(example.split()) <= 5 for example in topic.examples)
    assert sum(len(text.split()) for tip in topic.tips for text in tip) >= 44
