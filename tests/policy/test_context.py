"""Tests that pairs longer than a model's context are refused, or get a warning if its positions are rotary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lpc_lightning.algorithms import DPO, SimPO
from lpc_lightning.data import PreferenceData
from lpc_lightning.errors import UnsupportedPolicyError
from lpc_lightning.evaluation.accuracy.preferences import preference_accuracy
from lpc_lightning.policy import TinyPolicy
from lpc_lightning.policy.checks import check_context
from tests.policy.test_every_family import small_config

SIZE: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2}
REFUSAL = (
    r"^data\.max_length: found pairs of up to {} tokens, expected at most {}, the positions that this gpt2 has\. Set"
)
WARNING = r"^data\.max_length: found pairs of up to {} tokens, and a context of {} \(max_position_embeddings of llama"


def reads(model: PreTrainedModel, tokens: int) -> bool:
    """Return True if plain transformers computes a text of so many tokens."""
    try:
        model(input_ids=torch.full((1, tokens), 7), use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "opt", "biogpt", "gptj", "codegen", "ctrl", "mpt"])
@torch.no_grad()
def test_context_of_a_table_of_positions(family: str) -> None:
    """Transformers fails at one token more than the check allows."""
    model = AutoModelForCausalLM.from_config(small_config(family)).eval()
    assert [reads(model, tokens) for tokens in (64, 65)] == [True, False]
    check_context(model.get_decoder(), 64)
    with pytest.raises(UnsupportedPolicyError, match=r"up to 65 tokens, expected at most 64, the positions"):
        check_context(model.get_decoder(), 65)


@pytest.mark.parametrize("family", ["bloom", "xglm", "mamba", "jamba"])
@torch.no_grad()
def test_context_without_a_limit(family: str) -> None:
    """A warning would be an error."""
    model = AutoModelForCausalLM.from_config(small_config(family)).eval()
    assert reads(model, 80)
    check_context(model.get_decoder(), 80)


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({}, 32),
        ({"rope_type": "linear", "factor": 2.0}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, 32),
    ],
)
def test_context_of_rotary_positions(rope: dict[str, Any], context: int) -> None:
    """A scaling may be a part of the context of the config, or come on top of it."""
    options = {"rope_parameters": {"rope_theta": 10_000.0, **rope}} if rope else {}
    policy = TinyPolicy(**SIZE, context=32, options=options).build()
    policy.check_context(context)
    with pytest.warns(UserWarning, match=WARNING.format(context + 1, context)):
        policy.check_context(context + 1)


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """Return a function that makes data with one pair of some 40 tokens, and shorter ones, and its longest pair."""

    def make(**settings: Any) -> tuple[PreferenceData, int]:
        texts = [("Why?", "So.", "No."), ("Why is the sky blue in the day?", "It is.", "b" * 20)]
        rows = [dict(zip(("prompt", "chosen", "rejected"), text, strict=True)) for text in texts * 2]
        for number, row in enumerate(rows):
            row["split"] = "train" if number < 2 else "test"
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path, cache = str(tmp_path / "pairs.jsonl"), str(tmp_path / "cache")
        data = PreferenceData(path, validation_share=0.0, batch_size=2, cache_dir=cache, **settings)
        pairs = data.load("train", TinyPolicy().load_tokenizer())
        assert pairs is not None
        longest = max(len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs)
        return data, longest

    return make


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_fit_with_pairs_as_long_as_the_table(layout: str, made: Any, fit_run: Any) -> None:
    """The longest pair counts, not max_length. At its length the fit runs, at one position less it is refused."""
    data, longest = made(layout=layout)
    policy = {"family": "gpt2", "attention": "eager", **SIZE}
    fit_run(SimPO(policy=TinyPolicy(context=longest, **policy)), data, max_steps=1)
    with pytest.raises(UnsupportedPolicyError, match=REFUSAL.format(longest, longest - 1)):
        fit_run(SimPO(policy=TinyPolicy(context=longest - 1, **policy)), data, max_steps=1)
    shorter, _ = made(layout=layout, max_length=longest - 1)  # as the error says
    fit_run(SimPO(policy=TinyPolicy(context=longest - 1, **policy)), shorter, max_steps=1)


@pytest.mark.parametrize("reference", ["cached", "live"])
def test_fit_with_a_reference_of_a_short_context(reference: Any, made: Any, fit_run: Any, tmp_path: Path) -> None:
    data, longest = made()
    short = TinyPolicy("gpt2", **SIZE, context=longest - 1)
    short.build().causal_lm.save_pretrained(tmp_path / "gpt2")
    short.load_tokenizer().save_pretrained(tmp_path / "gpt2")
    module = DPO(policy=TinyPolicy(**SIZE), reference=reference, reference_path=str(tmp_path / "gpt2"))
    with pytest.raises(UnsupportedPolicyError, match=REFUSAL.format(longest, longest - 1)):
        fit_run(module, data, max_steps=1)


def test_fit_beyond_a_rotary_context(made: Any, fit_run: Any) -> None:
    data, longest = made()
    with pytest.warns(UserWarning, match=WARNING.format(longest, 16)):
        fit_run(SimPO(policy=TinyPolicy(**SIZE, context=16)), data, max_steps=1)


@pytest.mark.parametrize("kind", ["module", "folder"])
def test_evaluation_with_pairs_beyond_the_table(kind: str, made: Any, tmp_path: Path) -> None:
    data, longest = made()
    policy = TinyPolicy("gpt2", **SIZE, context=longest - 1)
    model: Any = SimPO(policy=policy)
    if kind == "folder":
        policy.build().causal_lm.save_pretrained(tmp_path / "gpt2")
        policy.load_tokenizer().save_pretrained(tmp_path / "gpt2")
        model = str(tmp_path / "gpt2")
    else:
        model.configure_model()
    with pytest.raises(UnsupportedPolicyError, match=REFUSAL.format(longest, longest - 1)):
        preference_accuracy(model, data, progress_bar=False)
