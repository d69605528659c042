"""New fits from a checkpoint or an export: policy, reference and latent at step 0, against stock loading."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lpc_lightning.algorithms import DPO
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.errors import CheckpointError, ConfigError, UnsupportedPolicyError
from lpc_lightning.inference import TrainedPolicy, open_policy
from lpc_lightning.inference.export import export
from lpc_lightning.latent import GumbelSpace, LatentSpace, MarginalSpace
from lpc_lightning.policy import LoRA, PretrainedPolicy, TinyPolicy
from lpc_lightning.types import TokenizedPair

pytestmark = pytest.mark.slow

CODED = ["--latent=MarginalSpace", "--latent.num_codes=5", "--latent.hidden=8", "--latent.init_logit_std=1.0"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def codes(number: int = 5, **space: Any) -> MarginalSpace:
    return MarginalSpace(num_codes=number, hidden=8, **space)


def trained(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def adapted(fitted: Callable[..., Path]) -> Path:
    """A checkpoint of an adapter."""
    return fitted(*CODED, "--policy.lora.rank=2", "--policy.lora.dropout=0.5")


@pytest.fixture(scope="module")
def exported(fitted: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose latent has no running moments."""
    checkpoint = fitted(*CODED, "--latent.standardize=false")
    return export(str(checkpoint), str(tmp_path_factory.mktemp("exports") / "plain"))


@pytest.fixture
def pairs(make_pairs: Callable[..., list[TokenizedPair]]) -> list[TokenizedPair]:
    return make_pairs([(5, 3, 7), (11, 9, 1), (3, 4, 5)])


def by_hand(path: Path) -> PreTrainedModel:
    """Return the model of a checkpoint: its weights, or the base model plus alpha / r times B A."""
    model = TinyPolicy(width=16, layers=1, heads=2).build().causal_lm
    state = {name.removeprefix("policy.model."): value for name, value in trained(path).items()}
    weights = {name: value for name, value in model.state_dict().items() if "lora_A" not in name}
    for name in weights:
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.default.weight" in state:
            update = state[f"{layer}.lora_B.default.weight"] @ state[f"{layer}.lora_A.default.weight"]
            weights[name] = weights[name] + 32 / 2 * update
        elif name in state:
            weights[name] = state[name]
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("lora", [None, LoRA(rank=3)], ids=["all weights", "a new adapter"])
@pytest.mark.parametrize("kind", ["checkpoint", "adapted", "exported"])
@torch.no_grad()
def test_policy_and_reference_start_as_trained(
    kind: str,
    lora: LoRA | None,
    request: pytest.FixtureRequest,
    pairs: list[TokenizedPair],
    naive_logps: Callable[..., Tensor],
) -> None:
    path = request.getfixturevalue(kind)
    model = AutoModelForCausalLM.from_pretrained(path) if kind == "exported" else by_hand(path)
    expected = naive_logps(model, pairs)
    untrained = naive_logps(TinyPolicy(width=16, layers=1, heads=2).build().causal_lm, pairs)
    assert (expected - untrained).abs().max() > 1e-2
    module = DPO(policy=TrainedPolicy(str(path), keep_latent=False, lora=lora), reference="live")
    module.configure_model()
    batch = PaddedLayout(0)(pairs)
    torch.testing.assert_close(module.policy(batch).logps().double(), expected, **CLOSE)
    assert module.reference is not None
    torch.testing.assert_close(module.reference.logps(batch).double(), expected, **CLOSE)
    parameters = dict(module.policy.named_parameters())
    assert all(p.requires_grad == (lora is None or "lora" in name) for name, p in parameters.items())


@pytest.mark.parametrize("kind", ["checkpoint", "adapted", "exported"])
@torch.no_grad()
def test_latent_is_kept(kind: str, request: pytest.FixtureRequest, pairs: list[TokenizedPair]) -> None:
    path = request.getfixturevalue(kind)
    latent = codes(standardize=kind != "exported")
    module = DPO(policy=TrainedPolicy(str(path)), latent=latent, reference="live")
    module.configure_model()
    batch = PaddedLayout(0)(pairs)
    forward, score = module.score_batch(batch)
    found = module.inference_terms(forward.states, score).logps
    opened = open_policy(str(path), device="cpu")
    assert opened.prior is not None
    old = opened.policy(batch)
    expected = old.logps(opened.prior(old.states.prompt))
    if kind != "exported":
        state = latent.state_dict()
        assert all(torch.equal(state[name], trained(path)[f"latent.{name}"]) for name in state)
    torch.testing.assert_close(torch.cat([found.policy_chosen, found.policy_rejected]), expected, **CLOSE)
    assert (expected - old.logps()).abs().max() > 1e-2
    # The reference is the start policy at z = 0.
    assert found.reference_chosen is not None
    torch.testing.assert_close(found.reference_chosen, old.logps()[: len(pairs)], **CLOSE)


def test_latent_is_dropped(checkpoint: Path) -> None:
    latent = codes()
    DPO(policy=TrainedPolicy(str(checkpoint), keep_latent=False), latent=latent).configure_model()
    assert not torch.equal(latent.codebook.weight, trained(checkpoint)["latent.codebook.weight"])


def test_export_whose_latent_is_gone(exported: Path, tmp_path: Path) -> None:
    """A fit must not start with a new latent in its place without a setting that says so."""
    folder = Path(shutil.copytree(exported, tmp_path / "copied"))
    (folder / "digests.json").unlink()
    (folder / "latent.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"latent\.safetensors: found no latent .* set policy\.keep_latent to false"
    ):
        DPO(policy=TrainedPolicy(str(folder)), latent=codes()).configure_model()
    DPO(policy=TrainedPolicy(str(folder), keep_latent=False), latent=codes()).configure_model()


def test_checkpoint_without_latent_starts_any_fit(fitted: Callable[..., Path]) -> None:
    for latent in (None, codes()):
        DPO(policy=TrainedPolicy(str(fitted())), latent=latent).configure_model()


@pytest.mark.parametrize(
    ("kind", "latent", "message"),
    [
        ("checkpoint", None, r"latent: found null and a latent in .*best\.ckpt, .* policy\.keep_latent to false"),
        ("checkpoint", codes(3), r"codebook\.weight: found \(5, 16\), expected \(3, 16\); .*Set latent as in that run"),
        (
            "checkpoint",
            codes(standardize=False),
            r"does not fit MarginalSpace \(prior\.moments\.\w+: found, not expected",
        ),
        (
            "checkpoint",
            GumbelSpace(num_codes=5, hidden=8),
            r"does not fit GumbelSpace \(posterior\.moments\.\w+: not found",
        ),
        ("exported", codes(), r"prior\.moments\.\w+: not found.*start from the checkpoint"),
        (
            "checkpoint",
            codes(warm_start_pairs=64),
            r"latent\.warm_start_pairs: found 64 .* Set it to 0, or policy\.keep",
        ),
    ],
    ids=["null", "fewer codes", "no moments", "posterior", "export", "warm start"],
)
def test_latent_that_does_not_fit_is_refused(
    kind: str, latent: LatentSpace | None, message: str, request: pytest.FixtureRequest
) -> None:
    module = DPO(policy=TrainedPolicy(str(request.getfixturevalue(kind))), latent=latent)
    with pytest.raises(ConfigError, match=message):
        module.configure_model()


def test_checkpoint_of_a_frozen_policy(fitted: Callable[..., Path]) -> None:
    """The checkpoint has no weights of the policy. A new fit trains them, from those of the base model."""
    path = fitted(*CODED, "--policy.trainable=false")
    latent = codes()
    module = DPO(policy=TrainedPolicy(str(path)), latent=latent)
    module.configure_model()
    stock = TinyPolicy(width=16, layers=1, heads=2).build().causal_lm.state_dict()
    for name, parameter in module.policy.causal_lm.named_parameters():
        assert torch.equal(parameter, stock[name])
        assert parameter.requires_grad
    assert torch.equal(latent.codebook.weight, trained(path)["latent.codebook.weight"])


def test_other_paths_are_refused(tmp_path: Path) -> None:
    for path in (str(tmp_path), "hub/name"):
        with pytest.raises(
            ConfigError, match=rf"policy\.path: found {path}, expected a checkpoint \(\.ckpt\) or an exp"
        ):
            TrainedPolicy(path).build()
    with pytest.raises(CheckpointError, match=r"policy\.path: found no file .*none\.ckpt"):
        TrainedPolicy(str(tmp_path / "none.ckpt")).build()


def test_cached_reference_is_start_policy(
    adapted: Path, small_data: Any, fit_run: Any, tmp_path: Path, naive_logps: Callable[..., Tensor]
) -> None:
    module = DPO(policy=TrainedPolicy(str(adapted), lora=LoRA(rank=3)), latent=codes())
    data = small_data(train_pairs=4, validation_pairs=2, cache_dir=str(tmp_path / "cache"))
    fit_run(module, data, max_steps=2)
    pairs = [data.training_pairs[index] for index in range(4)]
    with torch.no_grad():
        expected = naive_logps(by_hand(adapted), pairs)
    cached = torch.tensor([pair.reference_logps for pair in pairs], dtype=torch.float64).T.flatten()
    torch.testing.assert_close(cached, expected, **CLOSE)


def test_fit_from_a_fit_opens(adapted: Path, fitted: Callable[..., Path], tmp_path: Path) -> None:
    start = ["--policy=TrainedPolicy", f"--policy.path={adapted}", "--policy.lora.rank=2", *CODED]
    again = fitted(*start)
    assert set(trained(again)) == set(trained(adapted))
    folder = export(str(again), str(tmp_path / "again"))
    assert open_policy(str(folder)).prior is not None
    assert str(adapted) not in (folder / "README.md").read_text() + (folder / "training.json").read_text()


def test_checkpoint_as_pretrained_names_trained_policy(checkpoint: Path) -> None:
    with pytest.raises(UnsupportedPolicyError, match=r"`fit --policy TrainedPolicy` starts a new fit from it"):
        PretrainedPolicy(str(checkpoint)).build()
