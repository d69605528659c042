"""What a stranger reads: front matter that the hub takes, and no claim that the run does not bear out."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.inference.card import Exported, model_card
from lpc_lightning.policy import TinyPolicy
from lpc_lightning.types import Message

ORIGIN: dict[str, Any] = {
    "path": "runs/version_0/checkpoints/best.ckpt",
    "algorithm": "SimPO",
    "settings": {
        "beta": 2.0,
        "robust": False,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-7, "foreach": None}},
    },
    "policy": {
        "class_path": "lpc_lightning.policy.PretrainedPolicy",
        "init_args": {"path": "somebody/Base-7B", "revision": "main", "lora": None},
    },
    "latent": {
        "class_path": "lpc_lightning.latent.GumbelSpace",
        "init_args": {
            "num_codes": 8,
            "kl_weight": {"class_path": "lpc_lightning.latent.WarmUp", "init_args": {"value": 0.1}},
        },
    },
    "step": 120,
    "epoch": 0,
    "seed": 3,
    "training_pairs": 1000,
    "data": {"class_path": "lpc_lightning.data.PreferenceData", "init_args": {"path": "pairs|mine.jsonl"}},
    "trainer": {"precision": "bf16-mixed", "gradient_clip_val": 1.0, "accumulate_grad_batches": 4},
    "dtype": "bfloat16",
}
CODES = {"kind": "discrete", "num_codes": 8, "prior_mode": "mean"}


def card(origin: dict[str, Any] | None = None, template: str = "chat", **message: Any) -> str:
    tokenizer = TinyPolicy().load_tokenizer()
    return model_card(Exported("my-model", ORIGIN | (origin or {}), make_template(tokenizer, template), **message))


def front(text: str) -> dict[str, Any]:
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def rows(text: str, section: str) -> list[list[str]]:
    """The cells of a section's tables, without the rules below the headers."""
    part = text.split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ") and not re.fullmatch(r"[|:\- ]+", line)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_front_matter() -> None:
    assert front(card(latent=CODES)) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "somebody/Base-7B",
        "tags": ["preference-optimization", "simpo", "latent-preference-coding"],
    }
    assert "license" not in front(card())  # it is not ours to state
    assert front(card())["tags"] == ["preference-optimization", "simpo"]


def test_local_base_model_is_not_a_hub_name(tmp_path: Any) -> None:
    policy = {"class_path": "lpc_lightning.policy.PretrainedPolicy", "init_args": {"path": str(tmp_path)}}
    text = card({"policy": policy})
    assert "base_model" not in front(text)
    assert f"`{tmp_path.name}`, aligned on preference pairs with SimPO" in text
    assert str(tmp_path.parent) not in text


def test_card_of_hostile_settings_has_no_html() -> None:
    html = "<script>x</script>`"
    policy = {"class_path": f"x.{html}", "init_args": {"path": html, html: [html]}}
    results = {f"{html}/results.json": {"metrics": {html: {html: 0.5}}, "origin": {"path": html}}}
    text = card({"policy": policy, "algorithm": html, "seed": html, "settings": {"a": html}}, results=results)
    page = MarkdownIt("commonmark").enable("table").render(text)  # it lets HTML through
    assert "<table>" in page
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "base_model" not in front(text)


def test_model_card_training_settings() -> None:
    message = {row[0]: row[1] for row in rows(card(latent=CODES), "Training")}
    assert message["algorithm"] == "SimPO (beta 2.0, optimizer AdamW (lr 5e-07))"
    assert message["latent"] == "GumbelSpace (num_codes 8, kl_weight WarmUp (value 0.1))"
    assert message["policy"] == "PretrainedPolicy (path `somebody/Base-7B`, revision `main`)"
    assert message["data"] == r"PreferenceData (path `pairs\|mine.jsonl`)"
    assert (message["training pairs"], message["optimizer steps"], message["seed"]) == ("1000", "120", "3")
    assert (message["precision"], message["clipping"], message["micro-batches to a step"]) == ("bf16-mixed", "1.0", "4")
    assert message["weights exported as"] == "bfloat16"


def test_model_card_unknown_values() -> None:
    text = card({"data": None, "trainer": {}, "seed": None, "training_pairs": None, "latent": None})
    message = {row[0]: row[1] for row in rows(text, "Training")}
    assert message["data"] == "not known: the checkpoint lay beside no config.yaml"
    assert message["latent"] == "none"
    assert not {"seed", "precision", "training pairs"} & set(message)
    assert "None lay in the run's folder when this was exported." in text


def test_results() -> None:
    summary = {
        "validation_before": {"rewards/accuracies": 0.5, "loss": 0.6931472},
        "validation_after": {"rewards/accuracies": 0.625, "loss": 0.654321, "latent/dead_codes": 3.0},
    }
    benchmarks = {
        "origin": {"path": "runs/version_0/checkpoints/last.ckpt"},
        "metrics": {"gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.0433}},
    }
    found = rows(card(results={"summary.json": summary, "lm_eval/results.json": benchmarks}), "Results")
    assert found == [
        ["", "before training", "after"],
        ["pairs whose chosen answer has the higher reward, z from the prompt alone", "0.5", "0.625"],
        ["loss", "0.6931", "0.6543"],
        ["codes that are no prompt's likeliest", "", "3"],
        ["task", "metric", "value", "standard error"],
        ["gsm8k", "exact_match,strict-match", "0.25", "0.0433"],
    ]
    assert "(`lm_eval/results.json`, of `runs/version_0/checkpoints/last.ckpt`)" in card(
        results={"lm_eval/results.json": benchmarks}
    )


def test_plain_policy_needs_no_remote_code() -> None:
    text = card({"latent": None})
    for word in ("trust_remote_code", "z is", "## Steer", "prior_mode"):
        assert word not in text


def test_model_card_names_scoring_by_lm_eval() -> None:
    text = card(latent=CODES)
    assert "prompt_end" in text
    assert "lm-eval" in text
    assert "lm-eval" not in card({"latent": None})


def test_model_card_names_refused_decoding() -> None:
    limits = card(latent=CODES).split("## Limits\n")[1]
    for name in ("Assisted decoding", "continuous batching", "`guidance_scale`"):
        assert name in limits


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize("kind", ["discrete", "gaussian", "mlp", "vector"])
@pytest.mark.parametrize("linear", [True, False])
def test_its_code_is_code(kind: str, template: str, linear: bool) -> None:
    text = card(template=template, latent=CODES | {"kind": kind}, linear=linear)
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    for block in blocks:
        ast.parse(block)
    assert len(blocks) == 2 + linear
    assert ("soft-capped" in text) is not linear
    assert ("prior_mode=7" in text) is (kind == "discrete")


def test_a_prompt_is_written_as_in_training() -> None:
    assert r'"User: What makes a good question?\n\nAssistant:"' in card(template="plain")
    assert "apply_chat_template" in card(template="chat")
    assert "apply_chat_template" not in card(template="plain")


def test_model_card_template_arguments() -> None:
    """The code of the card writes the prompt of training."""
    tokenizer = TinyPolicy().load_tokenizer()
    tokenizer.chat_template = "{% if quiet %}Be quiet. {% endif %}" + str(tokenizer.chat_template)
    template = make_template(tokenizer, "chat", {"quiet": True})
    (block,) = re.findall(r"```python\n(.*?)```", model_card(Exported("my-model", ORIGIN, template)), re.S)
    found: dict[str, Any] = {"tokenizer": tokenizer}
    exec(block[block.index("messages =") : block.index("def answer")], found)
    messages = [Message(role="user", content="What makes a good question?")]
    assert found["prompt"]["input_ids"][0].tolist() == template.prompt_ids(messages)


def test_model_card_adapter() -> None:
    policy = ORIGIN["policy"] | {"init_args": {"path": "somebody/Base-7B", "lora": {"rank": 8, "alpha": 16}}}
    text = card({"policy": policy})
    assert "by a low-rank adapter, which is merged into the weights" in text
    assert "lora (rank 8, alpha 16)" in text
