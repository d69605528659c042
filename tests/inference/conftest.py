"""Tiny policies with a latent that matters, and the slow way to answer under one: z baked into a stock model's head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lpc_lightning.inference.export import export
from lpc_lightning.inference.modeling_lpc import latent_causal_lm
from lpc_lightning.inference.opening import inference_prior
from lpc_lightning.latent import LatentSpace, MarginalSpace
from lpc_lightning.policy import CausalPolicy, TinyPolicy

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "gemma2": {"sliding_window": 6, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "mistral": {"sliding_window": 6},
    "granite": {"logits_scaling": 0.25},
    "cohere": {"logit_scale": 0.5},
}
"""A plain one, learned positions, a soft cap on the logits, windows, and scales on the logits."""
CODES = 5
# Gemma's soft-capped attention (eager) turns float64's masks into -inf, and padding into NaN, without any latent.
DTYPES = {"gemma2": "float32"}


@dataclass
class Latent:
    """A policy, the space that was trained with it, and the model under test."""

    policy: CausalPolicy
    space: LatentSpace
    model: Any

    @property
    def stock(self) -> PreTrainedModel:
        return self.policy.causal_lm

    @torch.no_grad()
    def prompt_state(self, ids: Tensor) -> Tensor:
        """(1, d) h_x of one prompt (q,), without padding."""
        states = self.policy.backbone(input_ids=ids[None], use_cache=False).last_hidden_state
        return states[:, -1]

    def baked(self, z: Tensor) -> Any:
        """A stock model, weights copied, whose head has W z as its bias: whatever it does, it does under this z."""
        model = copy.deepcopy(self.stock)
        head = model.get_output_embeddings()
        biased = nn.Linear(head.in_features, head.out_features, dtype=head.weight.dtype)
        biased.weight = head.weight
        with torch.no_grad():
            biased.bias.copy_(z @ head.weight.T + (0 if head.bias is None else head.bias))
        model.set_output_embeddings(biased)
        return model


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of a model without a latent."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    spec = TinyPolicy(width=16, layers=1, heads=2)
    spec.build().causal_lm.save_pretrained(folder)
    spec.load_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def make_latent(perturb: Callable[..., None], exact: Callable[..., CausalPolicy]) -> Callable[..., Latent]:
    """A policy of a family with a latent whose z moves the logits and depends on the prompt."""

    def make(family: str = "llama", space: LatentSpace | None = None, dtype: str = "float64", **policy: Any) -> Latent:
        size: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2, "context": 64}
        built = TinyPolicy(family=family, options=FAMILIES[family], dtype=dtype, **(size | policy)).build()  # type: ignore[arg-type]
        # Enough for answers that do not repeat one token, for codes that differ, and for a prior that is unsure.
        perturb(built, deviation=0.4)
        if dtype == "float64":
            exact(built)
        built.eval().requires_grad_(False)
        built.causal_lm.generation_config.eos_token_id = None  # answers run to their full length
        space = space or MarginalSpace(num_codes=CODES, hidden=8, init_logit_std=1.5)
        torch.manual_seed(5)
        space.build(built.width, built.head)
        space.to(getattr(torch, dtype))
        perturb(getattr(space, "prior", nn.Identity()), deviation=0.6, seed=6)
        return Latent(built, space, latent_causal_lm(built.causal_lm, inference_prior(space)))

    return make


@pytest.fixture(scope="session")
def latents(make_latent: Callable[..., Latent]) -> Callable[[str], Latent]:
    """The same, made once a family."""
    made: dict[str, Latent] = {}

    def of(family: str) -> Latent:
        if family not in made:
            made[family] = make_latent(family, dtype=DTYPES.get(family, "float64"))
        return made[family]

    return of


@pytest.fixture(params=list(FAMILIES))
def latent(request: pytest.FixtureRequest, latents: Callable[[str], Latent]) -> Latent:
    """Every family in turn."""
    return latents(request.param)


@pytest.fixture
def llama(latents: Callable[[str], Latent]) -> Latent:
    return latents("llama")


@pytest.fixture(scope="session")
def prompts() -> list[Tensor]:
    """Four prompts of different lengths."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 1024, (size,), generator=generator) for size in (7, 3, 11, 5)]


@pytest.fixture(scope="session")
def padded() -> Callable[..., dict[str, Tensor]]:
    """Prompts as a batch, with the mask of their tokens, 0 at padding."""

    def pad(prompts: list[Tensor], side: str = "left") -> dict[str, Tensor]:
        width = max(len(ids) for ids in prompts)
        tokens, mask = torch.zeros(2, len(prompts), width, dtype=torch.long)
        for row, ids in enumerate(prompts):
            place = slice(width - len(ids), width) if side == "left" else slice(0, len(ids))
            tokens[row, place], mask[row, place] = ids, 1
        return {"input_ids": tokens, "attention_mask": mask}

    return pad


def logits_by_hand(latent: Any, states: Tensor, z: Tensor) -> Tensor:
    """cap(scale (W (h + z) + b)), with the values of the config."""
    head, config = latent.stock.get_output_embeddings(), latent.stock.config
    logits = (states + z) @ head.weight.T + (0 if head.bias is None else head.bias)
    logits = logits * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def close(found: Tensor, expected: Tensor, exact: float = 1e-9) -> None:
    tolerance = exact if found.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


FIT = ["--model.latent_lr=0.05", "--data.train_pairs=4", "--data.validation_pairs=2", "--data.test_pairs=0"]
FIT += ["--trainer.max_epochs=1", "--trainer.num_sanity_val_steps=-1"]
CODED = ["--latent=MarginalSpace", f"--latent.num_codes={CODES}", "--latent.hidden=8", "--latent.init_logit_std=1.0"]
CALLBACKS = """
- class_path: ModelCheckpoint
  init_args: {filename: best, monitor: val/rewards/accuracies, mode: max, save_last: true}
- class_path: lpc_lightning.callbacks.RunSummary
"""


@pytest.fixture(scope="session")
def fitted(tiny_fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`best.ckpt` of a run by `lpc-lightning fit`; each set of flags is run once a session."""
    callbacks = tmp_path_factory.mktemp("callbacks") / "callbacks.yaml"
    callbacks.write_text(CALLBACKS)
    return lambda *flags: tiny_fit(*FIT, f"--callbacks={callbacks}", *flags) / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="session")
def checkpoint(fitted: Callable[..., Path]) -> Path:
    """Of LPC-DPO."""
    return fitted(*CODED)


# Exports


GEMMA = '{"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0}'
CASES: dict[str, list[str]] = {
    "codes": CODED,
    "adapter": [*CODED, "--policy.lora.rank=2"],
    "tied": [*CODED, "--policy.family=gpt2", "--latent.prior_mode=argmax"],
    "soft-cap": [*CODED, "--policy.family=gemma2", f"--policy.options={GEMMA}"],
    "gaussian": ["--latent=GaussianSpace", "--latent.num_codes=5", "--latent.init_logit_std=1.0", "--model=SimPO"],
    "bf16": [*CODED, "--trainer.precision=bf16-true"],
    "plain": [],
}
LATENT_FILES = {"latent.safetensors", "modeling_lpc.py", "digests.json"}
FILES = {"config.json", "generation_config.json", "model.safetensors", "README.md", "training.json", "tokenizer.json"}
FILES |= {"tokenizer_config.json", "chat_template.jinja", "digests.json"}


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(3, 1024, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.fixture(scope="session")
def exported(fitted: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each case."""
    root = tmp_path_factory.mktemp("exports")
    return {name: export(str(fitted(*flags)), str(root / name)) for name, flags in CASES.items()}
