"""Tests of losses, gradients and metrics against TRL's DPOTrainer, with the same models and the same padded batch.

TRL computes its log-probabilities in float32 for every type of the model, by its own kernel. The models are float64, so
that nothing else is rounded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from lpc_lightning.algorithms import DPO, IPO, KTO, PreferenceModule
from lpc_lightning.data.batching.layouts import Layout, PaddedLayout, SharedPrefixLayout
from lpc_lightning.latent import VectorSpace
from lpc_lightning.losses import orpo_loss
from lpc_lightning.reference.live import FrozenModel
from lpc_lightning.robust import UnbiasedLoss
from lpc_lightning.types import PairLogps, TokenizedPair

PRECISION = 1e-5
ALGORITHMS: dict[str, tuple[type[PreferenceModule], dict[str, Any], dict[str, Any]]] = {
    "dpo": (DPO, {"beta": 0.3}, {"loss_type": "sigmoid", "beta": 0.3}),
    "rdpo": (
        DPO,
        {"beta": 0.2, "robust_loss": UnbiasedLoss(0.15)},
        {"loss_type": "robust", "label_smoothing": 0.15, "beta": 0.2},
    ),
    "ipo": (IPO, {"beta": 0.4, "length_average": True}, {"loss_type": "ipo", "beta": 0.4}),
}
WITH_SFT = (
    DPO,
    {"beta": 0.3, "nll_weight": 0.7},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7], "beta": 0.3},
)
LAYOUTS: dict[str, Layout] = {"padded": PaddedLayout(0), "shared prefix": SharedPrefixLayout(0, row_tokens=40)}
FINAL_NORM = {"llama": "model.norm", "gpt2": "transformer.ln_f", "gemma2": "model.norm"}

every_algorithm = pytest.mark.parametrize("algorithm", list(ALGORITHMS))
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
every_family = pytest.mark.parametrize("family", list(FINAL_NORM))
Sides = tuple[PreferenceModule, DPOTrainer]


@pytest.fixture
def pairs(make_pairs: Callable[..., list[TokenizedPair]]) -> list[TokenizedPair]:
    return make_pairs([(5, 3, 7), (11, 9, 1), (1, 1, 4), (3, 13, 5)])


@pytest.fixture
def sides(tiny_spec: Callable[..., Any], perturb: Callable[..., None], tmp_path: Path) -> Callable[..., Sides]:
    """Our module and TRL's trainer with equal weights. The policies differ from their references."""

    def make(algorithm: str, family: str, **latent: Any) -> Sides:
        kind, ours, theirs = WITH_SFT if algorithm == "dpo with sft" else ALGORITHMS[algorithm]
        # With windows and eager attention, rows of padding are NaN, and TRL's own code would read them.
        options = {"sliding_window": 64} if family == "gemma2" else None
        module = kind(policy=tiny_spec(family, options=options), reference="live", **ours, **latent)
        module.configure_model()
        assert isinstance(module.reference, FrozenModel)
        perturb(module.policy, seed=1)
        perturb(module.reference, seed=2)
        if module.latent is not None:
            module.latent.double()
        config = DPOConfig(
            str(tmp_path),
            report_to="none",
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            max_length=None,
            save_strategy="no",
            disable_tqdm=True,
            **theirs,
        )
        trainer = DPOTrainer(
            copy.deepcopy(module.policy.causal_lm),
            copy.deepcopy(module.reference.policy.causal_lm),
            config,
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
            processing_class=module.tokenizer,
        )
        return module, trainer

    return make


def collated(trainer: DPOTrainer, pairs: list[TokenizedPair]) -> dict[str, Tensor]:
    """Return the pairs as a batch of TRL."""
    batch = trainer.data_collator(
        [{"prompt_ids": p.prompt_ids, "chosen_ids": p.chosen_ids, "rejected_ids": p.rejected_ids} for p in pairs]
    )
    assert (batch["attention_mask"] == 0).any(), "a batch without padding proves less"
    return batch


def add_before_head(model: nn.Module, family: str, z: Tensor) -> None:
    """Add z (B, d) to all states that enter the head, for chosen and rejected answers."""
    norm = model.get_submodule(FINAL_NORM[family])
    norm.register_forward_hook(lambda _, inputs, states: states + torch.cat([z, z])[:, None])


def assert_close(found: Tensor, expected: Tensor, name: str = "") -> None:
    assert expected.abs().max() > 0, name
    tolerance = {"rtol": PRECISION, "atol": PRECISION * float(expected.abs().max())}
    torch.testing.assert_close(found.double(), expected.double(), **tolerance, msg=lambda text: f"{name}: {text}")


def assert_same_gradients(module: PreferenceModule, gradients: dict[str, Tensor], trainer: DPOTrainer) -> None:
    theirs = {f"policy.model.{name}": parameter.grad for name, parameter in trainer.model.named_parameters()}
    assert set(gradients) - {"latent.vector"} == set(theirs)
    for name, gradient in theirs.items():
        assert gradient is not None
        assert_close(gradients[name], gradient, name)


@pytest.mark.slow
@every_family
@every_algorithm
@every_layout
def test_step_equals_trl(
    family: str,
    algorithm: str,
    layout: Layout,
    sides: Callable[..., Sides],
    pairs: list[TokenizedPair],
    train_step: Callable[..., Any],
) -> None:
    module, trainer = sides(algorithm, family)
    theirs = trainer.compute_loss(trainer.model, collated(trainer, pairs))
    theirs.backward()
    ours = train_step(module, pairs, layout)
    assert_close(ours.loss, theirs.detach(), "loss")
    assert_same_gradients(module, ours.gradients, trainer)


@every_layout
def test_step_with_sft_term_equals_trl(
    layout: Layout,
    sides: Callable[..., Sides],
    make_pairs: Callable[..., list[TokenizedPair]],
    train_step: Callable[..., Any],
) -> None:
    """TRL averages over the tokens of a batch. This equals the mean over answers if all have the same length."""
    pairs = make_pairs([(5, 6, 7), (11, 6, 1), (1, 6, 4), (3, 6, 5)])
    module, trainer = sides("dpo with sft", "llama")
    theirs = trainer.compute_loss(trainer.model, collated(trainer, pairs))
    theirs.backward()
    ours = train_step(module, pairs, layout)
    assert_close(ours.loss, theirs.detach(), "loss")
    assert_same_gradients(module, ours.gradients, trainer)


@every_family
@every_algorithm
def test_vector_latent_equals_trl_with_added_vector(
    family: str,
    algorithm: str,
    sides: Callable[..., Sides],
    pairs: list[TokenizedPair],
    train_step: Callable[..., Any],
) -> None:
    module, trainer = sides(algorithm, family, latent=VectorSpace(init_logit_std=0.5))
    z = module.latent.vector.detach().clone().requires_grad_()
    add_before_head(trainer.model, family, z.expand(len(pairs), -1))
    theirs = trainer.compute_loss(trainer.model, collated(trainer, pairs))
    theirs.backward()
    ours = train_step(module, pairs)
    assert_close(ours.loss, theirs.detach(), "loss")
    assert_close(ours.gradients["latent.vector"], z.grad, "z")
    assert_same_gradients(module, ours.gradients, trainer)


@every_algorithm
@every_layout
def test_z_per_pair_equals_trl_with_added_z(
    algorithm: str, layout: Layout, sides: Callable[..., Sides], pairs: list[TokenizedPair]
) -> None:
    module, trainer = sides(algorithm, "llama")
    generator = torch.Generator().manual_seed(0)
    ours_z = torch.randn(len(pairs), module.policy.width, generator=generator, dtype=torch.float64)
    theirs_z = ours_z.clone().requires_grad_()
    add_before_head(trainer.model, "llama", theirs_z)
    theirs = trainer.compute_loss(trainer.model, collated(trainer, pairs))
    theirs.backward()
    plain = module.score_batch(layout(pairs))[1].under(None)[0].losses.mean()
    ours = module.score_batch(layout(pairs))[1].under(ours_z.requires_grad_())[0].losses.mean()
    assert (plain - ours).abs() > 1e-2
    ours.backward()
    assert_close(ours.detach(), theirs.detach(), "loss")
    assert_close(ours_z.grad, theirs_z.grad, "z")
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert_same_gradients(module, gradients, trainer)


@pytest.mark.parametrize("algorithm", ["dpo", "rdpo"])
def test_metrics_equal_trls(
    algorithm: str, sides: Callable[..., Sides], pairs: list[TokenizedPair], train_step: Callable[..., Any]
) -> None:
    module, trainer = sides(algorithm, "llama")
    trainer.compute_loss(trainer.model, collated(trainer, pairs))
    ours = train_step(module, pairs).metrics
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        (theirs,) = trainer._metrics["train"][name]
        assert float(ours[f"train/{name}"]) == pytest.approx(theirs, rel=PRECISION)
    for name in ("logps/chosen", "logps/rejected"):
        (theirs,) = trainer._metrics["train"][name]
        assert float(ours[f"train/{name}"]) == pytest.approx(theirs, rel=PRECISION)
    assert 0 < float(ours["train/rewards/accuracies"]) < 1


@pytest.mark.parametrize("estimates", [True, False], ids=["kto", "apo_zero_unpaired"])
def test_kto_step_equals_trl(
    estimates: bool,
    tiny_spec: Callable[..., Any],
    perturb: Callable[..., None],
    tmp_path: Path,
    pairs: list[TokenizedPair],
    train_step: Callable[..., Any],
) -> None:
    """TRL's estimate of the KL is our reference point. Its batch has the answers of our pairs as rows."""
    module = KTO(policy=tiny_spec("llama"), reference="live", beta=0.3, desirable_weight=0.7)
    module.configure_model()
    perturb(module.policy, seed=1)
    perturb(module.reference, seed=2)
    config = KTOConfig(
        str(tmp_path),
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        max_length=None,
        save_strategy="no",
        disable_tqdm=True,
        beta=0.3,
        desirable_weight=0.7,
        loss_type="kto" if estimates else "apo_zero_unpaired",
        per_device_train_batch_size=8,
    )
    rows = [
        (pair.prompt_ids, ids, ids == pair.chosen_ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)
    ]
    trainer = KTOTrainer(
        copy.deepcopy(module.policy.causal_lm),
        copy.deepcopy(module.reference.policy.causal_lm),
        config,
        train_dataset=Dataset.from_list([{"prompt": "a", "completion": " b", "label": each} for each in (True, False)]),
        processing_class=module.tokenizer,
    )
    batch = trainer.data_collator(
        [
            {"prompt_ids": prompt, "completion_ids": answer, "label": label}
            | ({"KL_completion_ids": rows[number - 1][1]} if estimates else {})
            for number, (prompt, answer, label) in enumerate(rows)
        ]
    )
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()
    (kl,) = trainer._metrics["train"]["kl"]
    assert (kl > 0) == estimates
    module.reference_point = kl
    ours = train_step(module, pairs)
    assert_close(ours.loss, theirs.detach(), "loss")
    assert_same_gradients(module, ours.gradients, trainer)


def test_orpo_odds_ratio_equals_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    generator = torch.Generator().manual_seed(0)
    sums = -10 * torch.rand(2, 5, generator=generator) - 0.1
    lengths = torch.randint(1, 9, (2, 5), generator=generator).float()
    ours = orpo_loss(PairLogps(*sums, None, None, *lengths), beta=0.3)
    device = SimpleNamespace(device=torch.device("cpu"))
    trainer = SimpleNamespace(beta=0.3, accelerator=device)
    losses, *rewards, _, _ = ORPOTrainer.odds_ratio_loss(trainer, *(sums / lengths))
    # TRL subtracts the odds ratio from the SFT term, which is over prompt and answer.
    assert_close(ours.losses, -losses - sums[0] / lengths[0], "loss")
    assert_close(ours.chosen_rewards, rewards[0], "chosen reward")
    assert_close(ours.rejected_rewards, rewards[1], "rejected reward")
