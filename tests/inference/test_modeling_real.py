"""The same on SmolLM2-135M: tied embeddings, a real vocabulary, a real chat template."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LogitsProcessorList

from lpc_lightning.inference.modeling_lpc import LatentCausalLM, latent_causal_lm
from lpc_lightning.inference.opening import inference_prior, open_policy
from lpc_lightning.latent import MarginalSpace

SMOLLM2 = Path(__file__).parents[2] / "models/SmolLM2-135M-Instruct"
PROMPTS = ["Name three fruits.", "Write one sentence about the sea and the people who live by it."]
NEW = 10


@pytest.mark.real
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="models/SmolLM2-135M-Instruct is absent: lpc-lightning prepare")
@torch.no_grad()
def test_smollm2_answers_under_a_latent(tmp_path: Path, perturb: Any) -> None:
    opened = open_policy(str(SMOLLM2))
    stock, tokenizer = opened.policy.causal_lm, opened.tokenizer
    space = MarginalSpace(num_codes=4, hidden=16, init_logit_std=1.0)
    torch.manual_seed(0)
    space.build(opened.policy.width, opened.policy.head)
    perturb(space.prior, deviation=0.3)
    model: Any = latent_causal_lm(stock, inference_prior(space))

    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    options = {"max_new_tokens": NEW, "do_sample": False}
    together = model.generate(**batch, **options)[:, -NEW:]
    for row, mask in enumerate(batch["attention_mask"]):
        ids = batch["input_ids"][row][mask == 1][None]
        z = space.infer(opened.policy.backbone(input_ids=ids).last_hidden_state[:, -1])
        baked = copy.deepcopy(stock)
        head = nn.Linear(*reversed(stock.lm_head.weight.shape))
        head.weight, head.bias = stock.lm_head.weight, nn.Parameter(z[0] @ stock.lm_head.weight.T)
        baked.lm_head = head
        assert torch.equal(together[row], baked.generate(ids, **options)[0, -NEW:])
    plain = stock.generate(**batch, **options)[:, -NEW:]
    assert not torch.equal(together, plain)
    steer = LogitsProcessorList([model.logits_processor(**batch)])
    assert torch.equal(stock.generate(**batch, **options, logits_processor=steer)[:, -NEW:], together)

    model.save_pretrained(tmp_path)
    again = LatentCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(bare(**batch).logits, stock(**batch).logits, rtol=1e-5, atol=1e-5)
