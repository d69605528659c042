"""Tests of explanations on a real module, against stock models with each code in the head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lpc_lightning.algorithms import DPO
from lpc_lightning.data import MixtureSource, PreferenceMixture, SyntheticPreferences
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.evaluation.accuracy.preferences import evaluate_pairs
from lpc_lightning.evaluation.codebook.explanation import Explanation, ExplanationPairs
from lpc_lightning.evaluation.codebook.pair_keys import find_examples
from lpc_lightning.latent import MarginalSpace, MLPSpace
from tests.evaluation.conftest import write_rows

BETA, CODES, PAIRS = 0.5, 3, 9


@pytest.fixture(scope="module")
def scored(
    small_policy: Callable[..., Any], perturb: Callable[..., None], exact: Callable[..., Any], cache_dir: Path
) -> tuple[DPO, SyntheticPreferences, ExplanationPairs]:
    """A module with codes and a prior that matter, its data, and all validation pairs."""
    data = SyntheticPreferences(validation_pairs=PAIRS, batch_size=4, cache_dir=str(cache_dir))
    space = MarginalSpace(num_codes=CODES, hidden=8, init_logit_std=0.05)
    module = DPO(policy=small_policy(dtype="float64"), latent=space, beta=BETA)
    module.configure_model()
    perturb(exact(module.policy), deviation=0.6)
    perturb(space.prior, deviation=1.0)
    module.eval()
    pairs = ExplanationPairs()
    return module, data, pairs


@pytest.fixture(scope="module")
def explained(scored: Any) -> Explanation:
    module, data, pairs = scored
    evaluate_pairs(module, data, pairs, "validation", progress_bar=False)
    explanation = pairs.explain(module.latent.codes, module.policy.head, module.tokenizer, tokens=4, examples=PAIRS)
    assert explanation is not None
    return explanation


def under(model: Any, z: Tensor) -> Any:
    """Return a copy of a stock model with W z as the bias of its head."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    biased = nn.Linear(head.in_features, head.out_features, dtype=head.weight.dtype)
    biased.weight = head.weight
    biased.bias.data.copy_(z.to(head.weight) @ head.weight.T)
    model.set_output_embeddings(biased)
    return model


@torch.no_grad()
def test_explanation_against_stock_models(scored: Any, explained: Explanation, naive_logps: Any) -> None:
    """The reference cancels in the change of a margin. The policy is in float64, the latent in float32."""
    module, data, _ = scored
    store = list(data.pairs["validation"])
    stock, codes = module.policy.causal_lm, module.latent.codebook.weight

    def contrast(model: Any, pair: Any) -> float:
        chosen, rejected = naive_logps(model, [pair]).tolist()
        return BETA * (chosen - rejected)

    priors, mixture = [], []
    for pair in store:
        state = stock.get_decoder()(torch.tensor([pair.prompt_ids])).last_hidden_state[:, -1]
        prior = module.latent.log_prior(state).exp()
        priors.append(prior[0].tolist())
        mixture.append(contrast(under(stock, (prior @ codes)[0]), pair))
    shares, likeliest = np.mean(priors, 0), np.argmax(priors, 1)
    assert len(set(likeliest)) > 1
    for number, code in enumerate(explained.codes):
        model = under(stock, codes[number])
        changes = {pair.id: contrast(model, pair) - mixture[row] for row, pair in enumerate(store)}
        assert code.share == pytest.approx(shares[number], abs=1e-5)
        assert code.likeliest == (likeliest == number).sum()
        assert [each.pair[0] for each in code.decided] == sorted(changes, key=lambda key: -abs(changes[key]))
        for each in code.decided:
            assert each.margin - each.prior_margin == pytest.approx(changes[each.pair[0]], rel=1e-5, abs=1e-5)
        ranked = sorted(range(PAIRS), key=lambda row: -priors[row][number])
        prompts = list(dict.fromkeys(store[row].prompt for row in ranked))
        by_id = {pair.id: pair.prompt for pair in store}
        assert [by_id[each.pair[0]] for each in code.prompts] == prompts
        assert code.prompts[0].probability == pytest.approx(priors[ranked[0]][number], abs=1e-5)


def test_explanation_has_tokens_of_the_answers(scored: Any, explained: Explanation) -> None:
    _, data, _ = scored
    answered = {token for pair in data.pairs["validation"] for token in (*pair.chosen_ids, *pair.rejected_ids)}
    for code in explained.codes:
        assert len(code.raised) == len(code.lowered) == 4
        assert {each.token for each in (*code.raised, *code.lowered)} <= answered


def test_explanation_finds_its_texts(scored: Any, explained: Explanation) -> None:
    _, data, _ = scored
    by_id = {example.id: example for example in data.source("validation").examples}
    shown = explained.with_texts(find_examples(data, "validation", explained.shown_pairs))
    for code in shown.codes:
        for each in code.decided:
            example = by_id[each.pair[0]]
            texts = (example.prompt[-1]["content"], example.chosen, example.rejected)
            assert (each.prompt, each.chosen, each.rejected) == texts
        for each in code.prompts:
            assert each.prompt == by_id[each.pair[0]].prompt[-1]["content"]
    assert [replace(code, prompts=[], decided=[]) for code in shown.codes] == [
        replace(code, prompts=[], decided=[]) for code in explained.codes
    ]


def test_texts_of_equal_ids(scored: Any, tmp_path: Path) -> None:
    """Pairs with the id of their prompt, one of them with both labels, and two data sets with the same ids.

    Rows without an id are named by the file's name and the line, which two folders may share. The oracle is the margin
    of a pair alone: a text belongs to the pair of this margin.
    """
    module, _, _ = scored
    answers = [("Yes.", "No."), ("No.", "Yes."), ("Perhaps.", "Ask him!"), ("Perhaps.", "Never, I think.")]
    texts = {f"{folder}?": answers for folder in ("first", "second")}
    sources = []
    for name, labels in texts.items():
        path = tmp_path / name[:-1] / "pairs.jsonl"
        common = {"prompt": name, "id": "same", "split": "validation"}
        rows = [{**common, "chosen": chosen, "rejected": rejected} for chosen, rejected in labels]
        write_rows(path, [{**rows[0], "split": "train"}, {**common, "chosen": "a", "rejected": "a"}, *rows])
        sources.append(MixtureSource(path=str(path), name=name))
    data = PreferenceMixture(sources, bad_rows="skip", batch_size=3, cache_dir=str(tmp_path / "cache"))
    collector = ExplanationPairs()
    evaluate_pairs(module, data, collector, "validation", progress_bar=False)
    explanation = collector.explain(module.latent.codes, module.policy.head, module.tokenizer, examples=PAIRS)
    assert explanation is not None
    shown = explanation.with_texts(find_examples(data, "validation", explanation.shown_pairs))
    for code in shown.codes:
        found = {(each.prompt, each.chosen, each.rejected): each.margin for each in code.decided}
        assert set(found) == {(prompt, *label) for prompt in texts for label in answers}
        assert {each.prompt for each in code.prompts} == set(texts)
        z = module.latent.codes[code.code][None]
        for pair in data.pairs["validation"]:
            with torch.no_grad():
                _, score = module.score_batch(PaddedLayout(0)([pair]))
                margin = float(score.under(z)[0].margins)
            chosen, rejected = (
                module.tokenizer.decode(ids, skip_special_tokens=True).strip()
                for ids in (pair.chosen_ids, pair.rejected_ids)
            )
            assert found[pair.source, chosen, rejected] == pytest.approx(margin, abs=1e-6)


def test_explanation_without_codes() -> None:
    pairs = ExplanationPairs()
    pairs.update({}, None, MLPSpace())  # type: ignore[arg-type, typeddict-item]  # they are not read
    assert pairs.explain(torch.zeros(2, 3), None, None) is None  # type: ignore[arg-type]  # nothing to explain
