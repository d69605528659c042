"""What is known about a generated data set, and the accuracy that this knowledge implies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

from lpc_lightning.data.synthetic.attributes import ATTRIBUTES, attribute_of


@dataclass(frozen=True)
class Truth:
    """The truth behind a generated data set. `dataclasses.asdict` makes it ready for JSON."""

    deciding: str
    """`visible`: the domain of the prompt decides. `hidden`: the annotator does."""
    attributes: Mapping[str, tuple[str, str]]
    """The two values of each style attribute."""
    domains: tuple[str, ...]
    """The domains of the prompts, all equally frequent."""
    factors: tuple[str, ...]
    """The factors that decide some pair, each named by the preferred value of its attribute."""
    domain_factors: Mapping[str, str]
    """The factor of each domain; empty where annotators decide."""
    annotator_factors: Mapping[str, str]
    """The factor of each annotator, all equally frequent; empty where domains decide."""
    best_accuracy: float
    """The accuracy of the best predictor that sees the prompt and both answers, but no annotator. Exact."""
    blind_accuracy: float
    """The accuracy of the best predictor that sees the styles of both answers, and neither prompt nor annotator. Exact.
    Where domains decide, this is what an unconditional preference can reach."""


def bayes_accuracy(factors: Iterable[str]) -> Fraction:
    """The best accuracy from the styles of both answers, when one of `factors` decides and nobody knows which.

    The pairs of factor f, which prefers value v of attribute A, are drawn so: the set D of attributes in which the
    answers differ is uniform among the sets that hold A and at least one more; A is v in the chosen answer; the
    chosen answer's other values are fair coins. Let w(f) be the share of f in `factors` and u the first answer's
    values on D. Then, with m attributes,

        P(D, u, first one chosen) = 1/2 sum over f of w(f) [A in D] [u_A = v] 2^(1 - |D|) / (2^(m-1) - 1)

    and the same with u_A != v when the second one is chosen. The best predictor takes the larger of the two, so its
    accuracy is the sum of that maximum over all D and u. Attributes outside D say nothing.

    Args:
        factors: the deciding factors, each as often as it is frequent.

    Raises:
        ValueError: no factor, or an unknown one.
    """
    wanted = [(attribute_of(factor), factor) for factor in factors]
    if not wanted:
        raise ValueError("factors: found none, expected at least one")
    names = list(ATTRIBUTES)
    accuracy = Fraction(0)
    for differs in product((False, True), repeat=len(names)):
        where = {name for name, is_in in zip(names, differs, strict=True) if is_in}
        if len(where) < 2:
            continue
        # Votes for the answer with the first value of each attribute, per factor attribute in D. Attributes of D that
        # no factor wants are free: they multiply the number of u and divide its probability alike.
        votes = [(attribute, factor) for attribute, factor in wanted if attribute in where]
        voters = sorted({attribute for attribute, _ in votes})
        total = 0
        for values in product(*(ATTRIBUTES[attribute] for attribute in voters)):
            first = sum(factor in values for _, factor in votes)
            total += max(first, len(votes) - first)
        # 2^(1 - |D|) times 2^(|D| - voters) values of the free attributes, times the 1/2 for the order of the answers.
        accuracy += Fraction(total, 2 ** len(voters))
    return accuracy / (len(wanted) * (2 ** (len(names) - 1) - 1))
