"""Tests that lm-eval ends the answers of a trained policy where training ended them, however it is opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.evaluation.benchmarks.latent_lm import LatentLM
from lpc_lightning.evaluation.benchmarks.results import read_results
from lpc_lightning.evaluation.benchmarks.runner import run_benchmarks
from lpc_lightning.inference.export import export
from lpc_lightning.inference.opening import OpenedPolicy, open_policy
from lpc_lightning.policy import TinyPolicy
from tests.fixtures.commands import LATENT, checkpoint_of

pytestmark = pytest.mark.slow
Texts = Callable[[OpenedPolicy], list[str]]


@pytest.fixture
def base(tmp_path: Path, perturb: Callable[..., None]) -> Path:
    """Folder of a model that is likely to write its chat template's end token. Its own end token is another one."""
    spec = TinyPolicy(width=16, layers=1, heads=2)
    policy, tokenizer = spec.build(), spec.load_tokenizer()
    perturb(policy, deviation=0.6)
    end = make_template(tokenizer).end_id
    tokenizer.eos_token = tokenizer.bos_token
    assert make_template(tokenizer).end_id == end != tokenizer.eos_token_id
    policy.causal_lm.generation_config.eos_token_id = policy.causal_lm.config.eos_token_id = tokenizer.eos_token_id
    head = policy.causal_lm.get_output_embeddings().weight
    with torch.no_grad():
        prompt = torch.tensor([tokenizer("Which number follows 1?").input_ids])
        written = policy.causal_lm.generate(prompt, max_new_tokens=4, do_sample=False)
        head[end] = 1.3 * head[written[0, -1]]
    policy.causal_lm.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def task(task_file: Callable[..., str]) -> str:
    rows = [{"question": f"Which number follows {number}?", "answer": "2"} for number in range(5)]
    generation = {"until": ["\n\n\n"], "do_sample": False, "max_gen_toks": 12}
    return task_file(
        "numbers", rows, output_type="generate_until", doc_to_choice=None, doc_to_text="{{question}}",
        doc_to_target="{{answer}}", generation_kwargs=generation,
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip


@pytest.fixture
def texts(task: str) -> Texts:
    """Function that returns the answers of an opened policy."""

    def answer(opened: OpenedPolicy) -> list[str]:
        items = run_benchmarks(LatentLM(opened.policy, opened.tokenizer, opened.prior), [task]).items
        return [item["response"] for item in items]

    return answer


def fit_of(base: Path) -> list[str]:
    return ["--policy=PretrainedPolicy", f"--policy.path={base}", "--model.optimizer.lr=1e-4"]


@pytest.mark.parametrize("latent", [[], LATENT], ids=["plain", "codes"])
def test_checkpoint_ends_like_its_export(
    latent: list[str], base: Path, task: str, texts: Texts, tiny_fit: Callable[..., Path], tmp_path: Path
) -> None:
    callback = ["--callbacks+=lpc_lightning.callbacks.LMEvaluation", f"--callbacks.tasks=[{task}]"]
    run = tiny_fit(*fit_of(base), *latent, *callback)
    checkpoint = str(checkpoint_of(run))
    exported = open_policy(str(export(checkpoint, str(tmp_path / "exported"))))
    expected = texts(exported)
    assert texts(open_policy(checkpoint)) == expected
    assert [item["response"] for item in read_results(run / "lm_eval").items] == expected
    exported.policy.causal_lm.generation_config = GenerationConfig(eos_token_id=exported.tokenizer.eos_token_id)
    assert texts(exported) != expected, "no answer has the end token"


def test_adapter_ends_like_its_checkpoint(
    base: Path, texts: Texts, tiny_fit: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = str(checkpoint_of(tiny_fit(*fit_of(base), "--policy.lora.rank=2")))
    folder = export(checkpoint, str(tmp_path / "adapter"), adapter=True)
    assert texts(open_policy(str(folder))) == texts(open_policy(checkpoint))


def test_plain_model_ends_as_published(base: Path) -> None:
    published = json.loads((base / "generation_config.json").read_text())["eos_token_id"]
    opened: Any = open_policy(str(base))
    tokenizer: PreTrainedTokenizerBase = opened.tokenizer
    assert opened.policy.causal_lm.generation_config.eos_token_id == published == tokenizer.eos_token_id
