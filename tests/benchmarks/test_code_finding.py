"""What finds the codes: the pass, ridge regression, the mixture, and the three tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_expit, logsumexp
from sklearn.linear_model import Ridge
from sklearn.metrics import normalized_mutual_info_score
from sklearn.model_selection import GridSearchCV, PredefinedSplit

from benchmarks.code_finding.__main__ import main
from benchmarks.code_finding.assignment import score_assignment
from benchmarks.code_finding.extraction import answer_values, covering_pairs
from benchmarks.code_finding.known import rows_by_name, score_known
from benchmarks.code_finding.mixture import choose_penalty, fit_mixture, maximize
from benchmarks.code_finding.pairs import Pairs
from benchmarks.code_finding.ridge import PENALTIES, Codes, Components, fit_codes, folds_of, solve_path
from benchmarks.code_finding.unknown import predict, score_unknown, simulate_annotators, split_annotators
from lpc_lightning.data.batching.layouts import PaddedLayout, SharedPrefixLayout
from lpc_lightning.policy import TinyPolicy
from lpc_lightning.types import TokenizedPair

WIDTH = 6


def planted(annotators: int, pairs_each: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that one of two codes orders, their annotators, and the code of each annotator."""
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(annotators), pairs_each)
    code_of = np.arange(annotators) % 2
    rows = rng.standard_normal((len(owners), WIDTH))
    codes = np.array([[2.0, 1, 0, 0, 0, 0], [-1.0, 2, 0, 0, 0, 0]])
    margins = (rows * codes[code_of[owners]]).sum(1)
    return rows * np.sign(margins)[:, None], owners, code_of


def planted_pairs(prompts: int = 60) -> Pairs:
    """Two readers who want the opposite. Each prompt has a pair of each, and a third is held out."""
    rows, owners, code_of = planted(2, prompts)
    names = np.array(["a", "b"])[code_of[owners]]
    prompt = np.tile(np.arange(prompts), 2)
    states = np.stack([rows / 2, -rows / 2], axis=1)
    return Pairs(
        part=np.where(prompt % 3 == 0, "test", "train"),
        prompt=prompt.astype(str),
        annotator=np.array([f"{name}{number % 5}" for name, number in zip(names, prompt, strict=True)]),
        factor=names,
        answers=np.tile(["yes", "no"], (len(rows), 1)),
        gradient=rows,
        last=states,
        mean={1: states},
        prompt_state={1: np.zeros_like(rows)},
    )


@pytest.mark.parametrize("layout", [PaddedLayout(0), SharedPrefixLayout(0, None)], ids=["padded", "shared"])
def test_values_match_a_naive_pass(layout: PaddedLayout | SharedPrefixLayout) -> None:
    """Gradients against finite differences, states against a pass of each sequence alone."""
    policy = TinyPolicy(width=8, layers=2, heads=2, dtype="float64").build().double().eval()
    pairs = [TokenizedPair("p", [5, 6, 7], [8, 9], [10, 11, 12, 13]), TokenizedPair("q", [5, 6], [9, 9, 9], [8])]
    values = answer_values(policy, [1, 2], layout(pairs)).double()
    model, d = policy.causal_lm, policy.width

    def log_probability(prompt: list[int], answer: list[int], z: torch.Tensor) -> torch.Tensor:
        states = model.model(torch.tensor([prompt + answer])).last_hidden_state[0, len(prompt) - 1 : -1]
        return model.lm_head(states + z).log_softmax(-1)[range(len(answer)), answer].sum()

    with torch.no_grad():
        for row, pair in zip(values, pairs, strict=True):
            for side, answer in enumerate((pair.chosen_ids, pair.rejected_ids)):
                steps = 1e-5 * torch.eye(d, dtype=torch.float64)
                slopes = (
                    torch.stack(
                        [
                            log_probability(pair.prompt_ids, answer, z) - log_probability(pair.prompt_ids, answer, -z)
                            for z in steps
                        ]
                    )
                    / 2e-5
                )
                torch.testing.assert_close(row[(3 + side) * d : (4 + side) * d], slopes, rtol=1e-4, atol=1e-5)
                alone = model.model(torch.tensor([pair.prompt_ids + answer]), output_hidden_states=True).hidden_states
                stored = row[5 * d + 4 :].view(2, 3, d)[0]  # of two layers the first; the second is normalized
                start = len(pair.prompt_ids)
                torch.testing.assert_close(stored[1 + side], alone[1][0, start:].mean(0), rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(stored[0], alone[1][0, start - 1], rtol=1e-5, atol=1e-6)


def test_covering_pairs_hold_every_answer() -> None:
    """Of four pairs of four answers, two are enough. The same answer to another prompt is another answer."""
    pairs = [
        TokenizedPair("", [1], chosen, rejected)
        for chosen, rejected in [([2], [3]), ([3], [4]), ([4], [5]), ([5], [2])]
    ]
    assert covering_pairs([*pairs, TokenizedPair("", [9], [2], [3])]) == [0, 2, 4]


@pytest.mark.parametrize("count", [4, 40], ids=["dual", "primal"])
def test_solve_path_matches_scikit_learn(count: int) -> None:
    rng = np.random.default_rng(0)
    rows, weights = rng.standard_normal((count, WIDTH)), rng.uniform(0, 2, count)
    path = solve_path(rows, weights, (0.3, 7.0))
    for number, penalty in enumerate((0.3, 7.0)):
        ridge = Ridge(penalty, fit_intercept=False).fit(rows, np.ones(count), sample_weight=weights)
        np.testing.assert_allclose(path[:, number], ridge.coef_)


def test_components_keep_all_dimensions() -> None:
    """With as many components as dimensions, products change by the scale only."""
    rows = 3 * np.random.default_rng(0).standard_normal((20, WIDTH))
    reduced = Components.fit(rows)(rows)
    np.testing.assert_allclose(reduced @ reduced.T, rows @ rows.T / np.square(rows).mean())


def test_folds_hold_whole_prompts() -> None:
    prompts = np.repeat(np.arange(20), 3)
    folds = folds_of(prompts, np.random.default_rng(0)).reshape(20, 3)
    assert (folds == folds[:, :1]).all()
    assert np.bincount(folds[:, 0]).tolist() == [4] * 5


def test_penalty_is_that_of_cross_validation() -> None:
    rng = np.random.default_rng(3)
    rows, prompts = rng.standard_normal((60, WIDTH)) + 0.3, np.arange(60)
    folds = PredefinedSplit(folds_of(prompts, np.random.default_rng(0)))
    search = GridSearchCV(Ridge(fit_intercept=False), {"alpha": PENALTIES}, scoring="neg_mean_squared_error", cv=folds)
    search.fit(rows, np.ones(60))
    codes = fit_codes(rows, np.ones((60, 1)), prompts, np.random.default_rng(0))
    assert codes.penalty == search.best_params_["alpha"]
    np.testing.assert_allclose(codes.weights[:, 0], search.best_estimator_.coef_)


def test_mixture_recovers_planted_codes() -> None:
    """From a random start, and with a penalty chosen by held-out prompts."""
    rows, owners, code_of = planted(40, 12)
    rng = np.random.default_rng(0)
    penalty = choose_penalty(rows, owners, np.arange(len(rows)), 2, rng)
    mixture = fit_mixture(rows, owners, 2, penalty, rng)
    assert normalized_mutual_info_score(code_of, mixture.weights.argmax(1)) == pytest.approx(1)


def test_mixture_leaves_each_annotator_out() -> None:
    """The evidence is that of codes refitted without the annotator, by a loop over annotators."""
    rows, owners, _ = planted(7, 3)
    owners = np.where(owners == 6, 5, owners)  # annotators with different numbers of pairs
    start = np.random.default_rng(1).dirichlet([1, 1], 6)
    mixture = _one_step(rows, owners, start)
    weights, refitted = start[owners], np.zeros((len(rows), 2))
    for annotator in range(6):
        own = owners == annotator
        for code in range(2):
            ridge = Ridge(2.0, fit_intercept=False)
            ridge.fit(rows[~own], np.ones((~own).sum()), sample_weight=weights[~own, code])
            refitted[own, code] = ridge.predict(rows[own])
    joint = mixture.log_prior + np.stack(
        [log_expit(mixture.scale * refitted[owners == annotator]).sum(0) for annotator in range(6)]
    )
    assert mixture.evidence == pytest.approx(logsumexp(joint, axis=1).sum())


def _one_step(rows: np.ndarray, owners: np.ndarray, start: np.ndarray):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.code_finding.mixture.STEPS", 1)
        return maximize(rows, owners, start, 2.0)


def test_predict_follows_bayes_rule() -> None:
    """Two opposite codes of equal weight decide nothing. One label decides for the code that it agrees with."""
    codes = Codes(np.array([[1.0, -1.0]]), 2.0, 1.0)
    rows, draws = np.array([[0.5], [0.5]]), np.array([[0], [1]])
    labels = np.array([[3.0], [-3.0]])
    log_prior = np.log([0.5, 0.5])
    assert predict(codes, log_prior, rows, labels, draws[:, :0]).tolist() == [0.5, 0.5]
    assert predict(codes, log_prior, rows, labels, draws).tolist() == [1, 0]
    assert predict(codes, log_prior, rows, labels, np.array([[-1], [1]])).tolist() == [0.5, 0]


def test_splits_share_no_prompt_and_no_annotator() -> None:
    pairs = planted_pairs()
    for seed in (1, 2):
        split = split_annotators(pairs, seed)
        assert not set(split.fitted.prompt) & set(split.scored.prompt)
        assert not set(split.fitted.annotator) & set(split.scored.annotator)
        assert set(split.labels.annotator) >= set(split.scored.annotator)
    simulated = simulate_annotators(pairs, 4, 1)
    _, counts = np.unique(simulated.fitted.annotator, return_counts=True)
    assert counts.tolist() == [4] * 20
    assert not set(simulated.fitted.prompt) & set(simulated.labels.prompt)


def test_scores_of_planted_readers() -> None:
    """With the reader known, and with the groups found, labels of the reader show what the reader wants."""
    pairs = planted_pairs()
    known = score_known(pairs, rows_by_name([1]), [8, 32], [1, 2])
    assert known.accuracy(("gradient", 32)).mean > 0.85
    assert known.accuracy(("mean state 1", 32), ("gradient", 32)).mean == pytest.approx(0)
    splits = [simulate_annotators(pairs, 8, seed) for seed in (1, 2)]
    result = score_unknown(splits, rows_by_name([1]), [2], [0, 8], [1, 2])
    for arm in ("gradient, EM, 2", "known readers"):
        assert result.scores.accuracy((arm, 8)).mean > 0.8
    assert result.information["known readers"] == pytest.approx([1, 1])


def test_assignment_of_readers_who_differ() -> None:
    """The sign of one entry separates two readers, so that the inputs that hold it are right."""
    pairs = planted_pairs()
    pairs.gradient[:, 5] = np.where(pairs.factor == "a", 3, -3)
    scores = score_assignment(pairs, [1], [40], [1, 2])
    assert scores.accuracy(("gradient", 40)).mean > 0.9
    assert scores.accuracy(("prompt 1", 40)).mean == pytest.approx(0.5)


def test_commands(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass of a file, then all tables from its values."""
    rows = [
        {
            "prompt": f"say {number}",
            "chosen": "yes" if annotator % 2 else "no",
            "rejected": "no" if annotator % 2 else "yes",
            "annotator": f"person {annotator}",
            "factor": "topic",
            "meta": {"group": annotator % 2},
            "split": "train" if number < 8 else "test",
        }
        for number in range(12)
        for annotator in range(10)
    ]
    data = tmp_path / "votes.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    values = tmp_path / "values.npz"
    command = ["code_finding", "extract", "--model", arguments[1], "--data", str(data), "--layers", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--group", "meta.group", "--out", str(values)])
    main()
    pairs = Pairs.load(values)
    assert len(pairs) == 120
    assert set(pairs.factor) == {"topic/0", "topic/1"}
    options = [
        "--layer",
        "1",
        "--sizes",
        "8",
        "--prompts",
        "8",
        "--codes",
        "2",
        "--labels",
        "0",
        "4",
        "--seeds",
        "1",
        "2",
    ]
    monkeypatch.setattr(
        sys, "argv", ["code_finding", "analyse", str(values), *options, "--out", str(tmp_path / "votes")]
    )
    main()
    tables = sorted(path.name for path in tmp_path.glob("votes_*.csv"))
    assert tables == [
        f"votes_{name}.csv" for name in ("assignment", "clusters_2", "em_2", "groups", "known", "references")
    ]
    majority = (tmp_path / "votes_references.csv").read_text().splitlines()[-1].split(",")
    assert majority[:3] == ["own majority", "4", "1.0000"]
