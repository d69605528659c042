"""Deciding factors of a generated data set, and the best accuracies that they allow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

from lpc_lightning.data.synthetic.attributes import ATTRIBUTES, attribute_of


@dataclass(frozen=True)
class Truth:
    """Deciding factors and best accuracies of a generated data set. `dataclasses.asdict` converts it for JSON."""

    deciding: str
    """`visible`: the domain of the prompt decides. `hidden`: the annotator decides."""
    attributes: Mapping[str, tuple[str, str]]
    """Two values of each style attribute."""
    domains: tuple[str, ...]
    """Domains of the prompts, all equally likely."""
    factors: tuple[str, ...]
    """Deciding factors, each named by the preferred value of its attribute."""
    domain_factors: Mapping[str, str]
    """Factor of each domain. Empty if annotators decide."""
    annotator_factors: Mapping[str, str]
    """Factor of each annotator, all equally likely. Empty if domains decide."""
    best_accuracy: float
    """Exact accuracy of the best predictor given the prompt and both answers, without the annotator."""
    blind_accuracy: float
    """Exact accuracy of the best predictor given the styles of both answers only. If domains decide, this is the best
    accuracy of an unconditional preference."""


def bayes_accuracy(factors: Iterable[str]) -> Fraction:
    """Compute the best accuracy given the styles of both answers, if one of `factors` decides and it is unknown.

    Let factor f prefer the value v of attribute A. Its pairs are drawn as follows. The set D of attributes in which the
    answers differ is uniform among the sets that contain A and at least one other attribute. The chosen answer has the
    value v in A. Its other values are fair coins. Let w(f) be the share of f in `factors`, and u the values of the
    first answer on D. Then, with m attributes,

        P(D, u, first one chosen) = 1/2 sum over f of w(f) [A in D] [u_A = v] 2^(1 - |D|) / (2^(m-1) - 1)

    If the second answer is chosen, u_A = v becomes u_A != v. The best predictor chooses the more probable answer, so
    its accuracy is the sum of this maximum over all D and u. Attributes outside D carry no information.

    Args:
        factors: Deciding factors. The number of occurrences of a factor is proportional to its frequency.

    Raises:
        ValueError: There is no factor, or a factor is unknown.
    """
    preferred = [(attribute_of(factor), factor) for factor in factors]
    if not preferred:
        raise ValueError("factors: found none, expected at least one")
    names = list(ATTRIBUTES)
    accuracy = Fraction(0)
    for differs in product((False, True), repeat=len(names)):
        where = {name for name, is_in in zip(names, differs, strict=True) if is_in}
        if len(where) < 2:
            continue
        # Each factor with an attribute in D votes for the answer that has its value. Attributes of D without a factor
        # are free. They multiply the number of u and divide the probability of each u by the same number.
        votes = [(attribute, factor) for attribute, factor in preferred if attribute in where]
        voting = sorted({attribute for attribute, _ in votes})
        total = 0
        for values in product(*(ATTRIBUTES[attribute] for attribute in voting)):
            first = sum(factor in values for _, factor in votes)
            total += max(first, len(votes) - first)
        # 2^(1 - |D|) times 2^(|D| - voting) values of the free attributes, times the 1/2 for the order of the answers.
        accuracy += Fraction(total, 2 ** len(voting))
    return accuracy / (len(preferred) * (2 ** (len(names) - 1) - 1))
