"""Generator of preference pairs with a known deciding factor, for tests of the latent variable."""

from __future__ import annotations

from functools import cache
from random import Random

from lpc_lightning.data.synthetic.answers import compose
from lpc_lightning.data.synthetic.attributes import ATTRIBUTES, Style, attribute_of, opposite
from lpc_lightning.data.synthetic.domains import DOMAINS
from lpc_lightning.data.synthetic.prompts import SPLITS, draw_prompt
from lpc_lightning.data.synthetic.seeding import pick, shuffled, stream
from lpc_lightning.data.synthetic.truth import Truth, bayes_accuracy
from lpc_lightning.types import Message, PreferenceExample


class PreferenceGenerator:
    """Generator of English preference pairs in which one style factor decides the label.

    Both answers of a pair are on the topic of the prompt. They differ in the deciding attribute, and the chosen answer
    has its preferred value. They also differ in at least one other attribute. The set of these other attributes is
    uniform among the non-empty sets, and their values are fair coins. So no other attribute predicts the label.

    Args:
        deciding: Origin of the deciding factor. `visible`: each domain has a fixed factor. Each deciding attribute has
            one preferred value in one domain and the opposite value in another domain, so no unconditional preference
            solves the task. `hidden`: each annotator has a fixed factor. The annotator is drawn independently of the
            prompt and appears only in the column `annotator`.
        annotators: Number of annotators, at least 2 if `deciding` is `hidden`. No effect if it is `visible`. The
            annotators share up to four factors: both values of one attribute, and one value of two others.
        seed: Seed of the factors and the pairs.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> generator = PreferenceGenerator(deciding="hidden", annotators=8, seed=0)
        >>> pair = generator.examples(1, split="test")[0]
        >>> pair.id, pair.factor == generator.truth.annotator_factors[pair.annotator]
        ('hidden-test-000000', True)
    """

    def __init__(self, deciding: str = "visible", annotators: int = 8, seed: int = 0) -> None:
        if deciding not in ("visible", "hidden"):
            raise ValueError(f"deciding: found {deciding!r}, expected 'visible' or 'hidden'")
        if deciding == "hidden" and annotators < 2:
            raise ValueError(f"annotators: found {annotators}, expected at least 2 if deciding is 'hidden'")
        self.deciding = deciding
        self.annotators = annotators
        self.seed = seed
        self.truth = _visible_truth(seed) if deciding == "visible" else _hidden_truth(annotators, seed)
        # The key holds `annotators` only if it has an effect, so that otherwise it does not change the pairs.
        self._key = (deciding, annotators if deciding == "hidden" else 0, seed)

    def examples(self, n: int, split: str = "train") -> list[PreferenceExample]:
        """Generate the first `n` pairs of a split. A pair depends on the settings, the split and its index, not on `n`.

        Raises:
            ValueError: `n` is negative or the split is unknown.
        """
        if n < 0:
            raise ValueError(f"n: found {n}, expected 0 or more")
        if split not in SPLITS:
            raise ValueError(f"split: found {split!r}, expected one of {', '.join(SPLITS)}")
        return [self._example(index, split) for index in range(n)]

    def _example(self, index: int, split: str) -> PreferenceExample:
        rng = stream("pair", *self._key, split, index)
        domain, topic, prompt = draw_prompt(split, rng)
        if self.deciding == "visible":
            annotator, factor = "", self.truth.domain_factors[domain.name]
        else:
            annotator, factor = pick(rng, list(self.truth.annotator_factors.items()))
        chosen, rejected = _styles(factor, rng)
        return PreferenceExample(
            id=f"{self.deciding}-{split}-{index:06d}",
            prompt=(Message(role="user", content=prompt),),
            chosen=compose(topic, chosen, rng),
            rejected=compose(topic, rejected, rng),
            source=domain.name,
            factor=factor,
            annotator=annotator,
            meta={
                "attribute": attribute_of(factor),
                "chosen_style": chosen,
                "rejected_style": rejected,
                "best_accuracy": self.truth.best_accuracy,
            },
        )


def _styles(factor: str, rng: Random) -> tuple[Style, Style]:
    """Draw the styles of the chosen and the rejected answer. See `bayes_accuracy` for the distribution."""
    others = len(ATTRIBUTES) - 1
    differs = 1 + int(rng.random() * (2**others - 1))
    coins = int(rng.random() * 2**others)
    chosen: Style = {}
    rejected: Style = {}
    for attribute, values in ATTRIBUTES.items():
        if factor in values:
            chosen[attribute], rejected[attribute] = factor, opposite(factor)
            continue
        chosen[attribute] = values[coins & 1]
        rejected[attribute] = values[(coins ^ differs) & 1]
        coins >>= 1
        differs >>= 1
    return chosen, rejected


@cache
def _visible_truth(seed: int) -> Truth:
    names = tuple(domain.name for domain in DOMAINS)
    rng = stream("visible factors", seed)
    # Both values of one attribute for every two domains, so that an unconditional preference stays at chance level.
    attributes = shuffled(rng, list(ATTRIBUTES))[: len(names) // 2]
    factors = shuffled(rng, [value for attribute in attributes for value in ATTRIBUTES[attribute]])
    return Truth(
        deciding="visible",
        attributes=dict(ATTRIBUTES),
        domains=names,
        factors=tuple(sorted(factors)),
        domain_factors=dict(zip(names, factors, strict=True)),
        annotator_factors={},
        best_accuracy=float(sum(bayes_accuracy([factor]) for factor in factors) / len(factors)),
        blind_accuracy=float(bayes_accuracy(factors)),
    )


@cache
def _hidden_truth(annotators: int, seed: int) -> Truth:
    rng = stream("hidden factors", seed)
    disputed, second, third = shuffled(rng, list(ATTRIBUTES))[:3]
    factors = [*ATTRIBUTES[disputed], pick(rng, ATTRIBUTES[second]), pick(rng, ATTRIBUTES[third])]
    assigned = shuffled(rng, [factors[index % len(factors)] for index in range(annotators)])
    best = float(bayes_accuracy(assigned))
    return Truth(
        deciding="hidden",
        attributes=dict(ATTRIBUTES),
        domains=tuple(domain.name for domain in DOMAINS),
        factors=tuple(sorted(set(assigned))),
        domain_factors={},
        annotator_factors={f"annotator-{index}": factor for index, factor in enumerate(assigned)},
        best_accuracy=best,
        blind_accuracy=best,
    )
