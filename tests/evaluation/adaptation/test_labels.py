"""Tests of labels given apart from the predicted pairs, of majority labels, and of Gaussian weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from lpc_lightning.algorithms import DPO
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.evaluation.adaptation.annotated_pairs import answer_rows
from lpc_lightning.evaluation.adaptation.inference import INFERENCES, CodeTables, others_majority, single_code
from lpc_lightning.evaluation.adaptation.pairs import AdaptationPairs
from lpc_lightning.evaluation.adaptation.policy import PolicyUnderMixtures
from lpc_lightning.evaluation.adaptation.scores import PairTables, adaptation_mixtures, adaptation_scores
from lpc_lightning.latent import GaussianSpace
from tests.evaluation.adaptation.test_inference import hashed, naive_right, random_tables
from tests.fixtures.real_data import DATA_DIR

NAMES, GIVERS = ["anna"] * 3 + ["ben"] * 4 + ["cleo"], ["ben"] * 5 + ["anna"] * 3
IDS, GIVEN_IDS = [f"new {number}" for number in range(8)], [f"labelled {number}" for number in range(8)]


def label_tables(signs: Sequence[float]) -> CodeTables:
    return replace(single_code(np.zeros(len(signs))), signs=np.array(signs, dtype=float)[:, None])


def vote(counts: Counter[float], sign: float) -> float:
    """Return whether a majority gives a label, a half for a tie."""
    return 1.0 if counts[sign] > counts[-sign] else 0.5 if counts[sign] == counts[-sign] else 0.0


@pytest.mark.parametrize("kind", list(INFERENCES))
def test_labelled_pairs_against_a_loop(kind: str) -> None:
    both = random_tables(16, seed=1)
    tables, given = both.take(np.arange(8)), both.take(np.arange(8, 16))
    scores = adaptation_scores(PairTables(tables, IDS, NAMES), (0, 1, 3, 5), 4, 2, PairTables(given, GIVEN_IDS, GIVERS))
    assert {n: score.pairs for n, score in scores[kind].items()} == {0: 8, 1: 7, 3: 7, 5: 4}
    for n, score in scores[kind].items():
        values = []
        for new, name in enumerate(NAMES):
            own = [index for index, giver in enumerate(GIVERS) if giver == name]
            if len(own) >= n:
                orders = [sorted(own, key=lambda i: hashed("adapt", 2, r, GIVEN_IDS[i])) for r in range(4)]
                values += [naive_right(kind, both, [8 + i for i in order[:n]], new) for order in orders]
        assert score.accuracy == pytest.approx(np.mean(values), abs=1e-12)


def test_labelled_pairs_give_mixtures() -> None:
    """All pairs of an annotator have one mixture, up to their priors. Their own labels do not matter."""
    tables, given = random_tables(8, seed=1), random_tables(8, seed=2)
    labelled = PairTables(given, GIVEN_IDS, GIVERS)
    both = adaptation_mixtures(PairTables(tables, IDS, NAMES), (2,), 0, labelled)
    weights = both["amortized"][2]
    assert len(weights) == 7
    np.testing.assert_array_equal(weights["ben", IDS[3]], weights["ben", IDS[6]])
    other = adaptation_mixtures(PairTables(replace(tables, losses=tables.swapped), IDS, NAMES), (2,), 0, labelled)
    np.testing.assert_array_equal(other["exact"][2]["anna", IDS[0]], both["exact"][2]["anna", IDS[0]])


@pytest.mark.parametrize("apart", [True, False])
def test_own_majority_against_a_loop(apart: bool) -> None:
    draw = np.random.default_rng(3)
    new, given = draw.choice([-1.0, 1.0], 8), draw.choice([-1.0, 1.0], 8)
    labelled = PairTables(label_tables(given), GIVEN_IDS, GIVERS) if apart else None
    scores = adaptation_scores(PairTables(label_tables(new), IDS, NAMES), (0, 1, 2, 3), 5, 0, labelled)["own_majority"]
    assert scores[0].accuracy == 0.5
    for n in (1, 2, 3):
        values = []
        for number, (pair, name) in product(range(5), enumerate(NAMES)):
            names, ids, signs = (GIVERS, GIVEN_IDS, given) if apart else (NAMES, IDS, new)
            own = [index for index, giver in enumerate(names) if giver == name]
            ring = sorted(own, key=lambda index: hashed("adapt", 0, number, ids[index]))
            start = 0 if apart else ring.index(pair) + 1
            if len(ring) >= n + (not apart):
                labels = [signs[ring[(start + step) % len(ring)]] for step in range(n)]
                values.append(vote(Counter(labels), new[pair]))
        assert scores[n].accuracy == pytest.approx(np.mean(values), abs=1e-12)


def test_others_majority_against_a_loop() -> None:
    draw = np.random.default_rng(5)
    signs, prompts = draw.choice([-1.0, 1.0], 40), draw.choice(list("abc"), 40).tolist()
    names = draw.choice(["anna", "ben", "cleo", "dora"], 40).tolist()
    agreement = others_majority(signs[:, None], prompts, names)
    for pair in range(40):
        others = [row for row in range(40) if prompts[row] == prompts[pair] and names[row] != names[pair]]
        assert (np.sign(agreement[pair]) + 1) / 2 == vote(Counter(signs[others].tolist()), signs[pair])


def read_labels(name: str) -> dict[str, list[dict[str, Any]]]:
    rows = [json.loads(line) for line in (DATA_DIR / "preferences" / name).read_text().splitlines()]
    return {split: [row for row in rows if row["split"] == split] for split in ("train", "test")}


@pytest.mark.real
@pytest.mark.skipif(not DATA_DIR.exists(), reason="needs the files of $LPC_DATA_DIR")
@pytest.mark.parametrize(("name", "own", "others"), [("polis", 0.61, 0.60), ("dices_safety", 0.66, 0.69)])
def test_majority_labels_of_real_votes(name: str, own: float, others: float) -> None:
    """Published levels: the annotator's 16 training votes, and the other annotators' votes on the same test pairs."""
    rows = read_labels(f"{name}_votes.jsonl")
    signs = {split: [1.0 if row["chosen"].startswith("Yes") else -1.0 for row in rows[split]] for split in rows}
    texts = {split: [[row[key] for row in rows[split]] for key in ("id", "annotator")] for split in rows}
    labelled = PairTables(label_tables(signs["train"]), *texts["train"])
    scores = adaptation_scores(PairTables(label_tables(signs["test"]), *texts["test"]), (0, 16), labelled=labelled)
    assert scores["own_majority"][0].accuracy == 0.5
    assert scores["own_majority"][16].accuracy == pytest.approx(own, abs=0.012)
    prompts = [json.dumps(row["prompt"]) for row in rows["test"]]
    agreement = others_majority(np.array(signs["test"])[:, None], prompts, texts["test"][1])
    assert np.mean((np.sign(agreement) + 1) / 2) == pytest.approx(others, abs=0.006)


def add(module: DPO, collector: Any, pairs: Sequence[Any]) -> None:
    batch = PaddedLayout(0)(list(pairs))
    with torch.no_grad():
        collector.update(module.scoring_step(batch, 0), batch, module.latent)


def test_gaussian_weights_are_mean_posteriors(tiny_spec: Any, perturb: Any, make_pairs: Any) -> None:
    """The oracle is each pair alone, under z = mean of the annotator's posterior means times the codebook."""
    space = GaussianSpace(num_codes=3, init_logit_std=2.0)
    module = DPO(policy=tiny_spec(), latent=space, reference="live", beta=2.0)
    module.configure_model()
    perturb(module.policy)
    perturb(space.double())
    names = ["anna"] * 4 + ["ben"] * 4
    pairs = [replace(pair, annotator=n) for pair, n in zip(make_pairs([(3, 3, 4)] * 8), names, strict=True)]
    labelled, new = [*pairs[:2], *pairs[4:6]], [*pairs[2:4], *pairs[6:]]
    collector = AdaptationPairs(shots=(0, 1, 2))
    add(module, collector.labelled, labelled)
    add(module, collector, new)
    report = collector.collect()
    assert report.weights == {}
    assert list(report.mixtures) == ["amortized"]
    policy = PolicyUnderMixtures(report.mixtures, "annotator")
    add(module, policy, new)
    scores = policy.scores()["amortized_z"]
    expected = []
    for pair in new:
        batch = PaddedLayout(0)([pair])
        content = answer_rows(batch)[0]["content"]
        with torch.no_grad():
            forward, score = module.score_batch(batch)
            given = [PaddedLayout(0)([each]) for each in labelled if each.annotator == pair.annotator]
            states = [module.score_batch(each)[0].states for each in given]
            mean = torch.stack([space.posterior.logits(each)[0, :3] for each in states]).mean(0)
            weights = report.mixtures["amortized"][2][pair.annotator, content]
            assert weights == pytest.approx(mean.numpy(), abs=1e-9)
            prior = space.prior(forward.states.prompt)[0, :3]
            assert report.mixtures["amortized"][0][pair.annotator, content] == pytest.approx(prior.numpy(), abs=1e-9)
            rewards, _ = score.under((mean @ space.codebook.weight)[None])
        expected.append(float(rewards.chosen_rewards > rewards.rejected_rewards))
    assert scores[2].accuracy == np.mean(expected)
    assert scores[0] == report.baselines["prior"]
