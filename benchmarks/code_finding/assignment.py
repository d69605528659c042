"""The reader of a single labelled pair, predicted from what a network of the latent space could read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV, GroupKFold

from benchmarks.code_finding.pairs import Floats, Pairs
from benchmarks.code_finding.ridge import FOLDS, PENALTIES, Components
from benchmarks.code_finding.scores import Key, Scores


def inputs_by_name(pairs: Pairs, layers: Sequence[int]) -> dict[str, Floats]:
    """Return the inputs that are compared. The last states of both answers are what the posterior reads."""
    inputs: dict[str, Floats] = {"last states": _both(pairs.last), "gradient": pairs.gradient}
    for layer in layers:
        inputs[f"mean states {layer}"] = _both(pairs.mean[layer])
        inputs[f"mean difference {layer}"] = pairs.mean_difference(layer)
        inputs[f"prompt {layer}"] = pairs.prompt_state[layer]
    return inputs


def score_assignment(pairs: Pairs, layers: Sequence[int], sizes: Sequence[int], seeds: Sequence[int]) -> Scores:
    """Score the prediction of a test pair's reader by ridge classification of training pairs.

    Readers are compared with those of the same topic only: the part of their name before the last slash.

    Args:
        pairs: The pairs. Their factor is the reader.
        layers: Layers of states.
        sizes: Numbers of prompts whose training pairs are read.
        seeds: Seeds of the drawn prompts.
    """
    train, test = (pairs.at(pairs.part == part) for part in ("train", "test"))
    inputs, test_inputs = inputs_by_name(train, layers), inputs_by_name(test, layers)
    names = np.unique(train.prompt)
    scores = Scores()
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(names)
        correct: dict[Key, Floats] = {}
        for size in sizes:
            members = np.isin(train.prompt, order[:size])
            for arm, values in inputs.items():
                mean = values[members].mean(0)
                components = Components.fit(values[members] - mean)
                search = GridSearchCV(RidgeClassifier(), {"alpha": PENALTIES}, cv=GroupKFold(FOLDS))
                search.fit(components(values[members] - mean), train.factor[members], groups=train.prompt[members])
                decisions = search.decision_function(components(test_inputs[arm] - mean))
                if decisions.ndim == 1:  # two readers
                    decisions = np.stack([-decisions, decisions], axis=1)
                other_topic = _topics(test.factor)[:, None] != _topics(search.classes_)
                predicted = search.classes_[np.where(other_topic, -np.inf, decisions).argmax(1)]
                correct[arm, size] = (predicted == test.factor).astype(float)
        scores.add_seed(test.prompt, correct)
    return scores


def _topics(names: np.ndarray) -> np.ndarray:
    return np.array([name.rpartition("/")[0] for name in names])


def _both(states: Floats) -> Floats:
    return states.reshape(len(states), -1)
