"""Readers are not known: groups of annotators are found, a code is fitted to each, and Bayes' rule weighs the codes.

What finds the groups differs between arms. The codes are ridge logit biases in every arm: they are fitted to gradients
at the head, and the linearized policy scores the labels. Neither annotators nor prompts of the scored pairs have been
read before, except in the few labels that an annotator is adapted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from sklearn.metrics import normalized_mutual_info_score

from benchmarks.code_finding.known import RowFunction
from benchmarks.code_finding.mixture import COMPONENTS, choose_penalty, fit_mixture
from benchmarks.code_finding.pairs import Floats, Pairs
from benchmarks.code_finding.ridge import Codes, Components, fit_codes
from benchmarks.code_finding.scores import Key, Scores, is_correct
from lpc_lightning.algorithms.warm_start.clusters import cluster_pairs

SHARES = 5
"""One in so many annotators is held out by each seed."""
KNOWN = "known readers"
"""Arm whose groups are the known readers."""


@dataclass(frozen=True, slots=True)
class Split:
    """Pairs of one seed."""

    fitted: Pairs
    """Training pairs that groups and codes are fitted to."""
    scored: Pairs
    """Test pairs that are scored."""
    labels: Pairs
    """Pairs from which an annotator's known labels are drawn."""


@dataclass
class Result:
    """Scores of all seeds, and how the groups agree with the readers."""

    scores: Scores = field(default_factory=Scores)
    information: dict[str, list[float]] = field(default_factory=dict)
    """Normalized mutual information of group and reader, over annotators, by arm and seed."""


def split_annotators(pairs: Pairs, seed: int) -> Split:
    """Hold out a part of the annotators.

    Their labels of training prompts are known, and their test pairs are scored.
    """
    names = np.random.default_rng(0).permutation(np.unique(pairs.annotator))
    held = np.isin(pairs.annotator, names[seed % SHARES :: SHARES])
    train = pairs.part == "train"
    return Split(pairs.at(train & ~held), pairs.at(~train & held), pairs.at(train & held))


def simulate_annotators(pairs: Pairs, pairs_each: int, seed: int) -> Split:
    """Distribute each reader's training pairs over annotators with `pairs_each` pairs.

    Test pairs are scored given other test pairs of the same reader.
    """
    rng = np.random.default_rng(seed)
    train, test = (pairs.at(pairs.part == part) for part in ("train", "test"))
    names = np.array(["" for _ in range(len(train))], dtype=object)
    for reader in np.unique(train.factor):
        members = rng.permutation(np.flatnonzero(train.factor == reader))
        names[members] = [f"{reader}/{number // pairs_each}" for number in range(len(members))]
    test = replace(test, annotator=test.factor)
    return Split(replace(train, annotator=names.astype(str)), test, test)


def score_unknown(
    splits: Sequence[Split],
    rows: dict[str, RowFunction],
    counts: Sequence[int],
    labels: Sequence[int],
    seeds: Sequence[int],
    components: int = COMPONENTS,
) -> Result:
    """Score the codes of groups that are found by each arm.

    Args:
        splits: Pairs of each seed.
        rows: Rows that find the groups, by name.
        counts: Numbers of codes.
        labels: Numbers of an annotator's known labels.
        seeds: Seeds.
        components: Number of principal components that groups are found in.
    """
    result = Result()
    for split, seed in zip(splits, seeds, strict=True):
        rng = np.random.default_rng(seed)
        names, owners = np.unique(split.fitted.annotator, return_inverse=True)
        readers = np.array([split.fitted.factor[owners == number][0] for number in range(len(names))])
        at_head = Components.fit(split.fitted.gradient)
        gradients, scored, known_labels = (
            at_head(part.gradient) for part in (split.fitted, split.scored, split.labels)
        )
        draws = draw_labels(split, max(labels), rng)
        arms = find_groups(split.fitted, owners, rows, counts, seed, components)
        arms[KNOWN] = np.eye(len(np.unique(readers)))[np.unique(readers, return_inverse=True)[1]]
        correct: dict[Key, Floats] = {}
        for arm, weights in arms.items():
            codes = fit_codes(gradients, weights[owners], split.fitted.prompt, np.random.default_rng(seed))
            log_prior = np.log((weights.sum(0) + 1) / (len(weights) + weights.shape[1]))
            for number in labels:
                correct[arm, number] = predict(codes, log_prior, scored, known_labels, draws[:, :number])
            information = normalized_mutual_info_score(readers, weights.argmax(1))
            result.information.setdefault(arm, []).append(float(information))
        for number in labels:
            correct["own majority", number] = own_majority(split, draws[:, :number])
        result.scores.add_seed(split.scored.prompt, correct)
    return result


def find_groups(
    fitted: Pairs,
    owners: NDArray[np.intp],
    rows: dict[str, RowFunction],
    counts: Sequence[int],
    seed: int,
    components: int,
) -> dict[str, Floats]:
    """Find groups of annotators by each kind of row and each method.

    Returns:
        (A, K) weights of the annotators over groups, by arm.
    """
    arms: dict[str, Floats] = {}
    for name, function in rows.items():
        values = function(fitted).astype(float)
        reduced = Components.fit(values, components)(values)
        for count in counts:
            rng = np.random.default_rng(seed)
            penalty = choose_penalty(reduced, owners, fitted.prompt, count, rng)
            arms[f"{name}, EM, {count}"] = fit_mixture(reduced, owners, count, penalty, rng).weights
            arms[f"{name}, clusters, {count}"] = warm_start_clusters(reduced, owners, count)
    return arms


def warm_start_clusters(rows: Floats, owners: NDArray[np.intp], count: int) -> Floats:
    """Cluster annotators as the warm start does: by the rows that an annotator predicts.

    Returns:
        (A, K) 1 for the annotator's cluster, otherwise 0.
    """
    annotators = owners.max() + 1
    features = torch.eye(int(annotators))[torch.from_numpy(owners)]
    _, clusters = cluster_pairs(features, torch.from_numpy(rows).float(), count)
    weights = np.zeros((annotators, count))
    weights[owners, clusters.numpy()] = 1
    return weights


def draw_labels(split: Split, count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Draw known labels of each scored pair's annotator, of other prompts.

    Returns:
        (n, count) indices into `split.labels`, -1 where the annotator has fewer.
    """
    draws = np.full((len(split.scored), count), -1)
    for number, (annotator, prompt) in enumerate(zip(split.scored.annotator, split.scored.prompt, strict=True)):
        own = np.flatnonzero((split.labels.annotator == annotator) & (split.labels.prompt != prompt))
        drawn = rng.permutation(own)[:count]
        draws[number, : len(drawn)] = drawn
    return draws


def predict(codes: Codes, log_prior: Floats, scored: Floats, known_labels: Floats, draws: NDArray[np.intp]) -> Floats:
    """Return (n,) 1 where the label's probability, given the drawn labels, is above 1/2 (see `is_correct`).

    Args:
        codes: The codes.
        log_prior: (K,) log shares of the codes.
        scored: (n, r) rows of the scored pairs.
        known_labels: (m, r) rows of known labels.
        draws: (n, labels) indices of the known labels of each scored pair, -1 for none.
    """
    likelihoods = np.vstack([codes.log_likelihoods(known_labels), np.zeros(len(log_prior))])
    log_weights = log_prior + likelihoods[draws].sum(1)
    right, wrong = (logsumexp(log_weights + codes.log_likelihoods(sign * scored), axis=1) for sign in (1, -1))
    return is_correct(right - wrong)


def own_majority(split: Split, draws: NDArray[np.intp]) -> Floats:
    """Return (n,) 1 where the label has the answer that is chosen more often among the drawn labels.

    It needs answers that recur under other prompts, such as yes and no.
    """
    chosen = np.append(split.labels.answers[:, 0], "")[draws]
    votes = [(chosen == split.scored.answers[:, side, None]).sum(1) for side in (0, 1)]
    return is_correct(votes[0] - votes[1])
