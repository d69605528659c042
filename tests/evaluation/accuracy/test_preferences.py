"""Tests of preference accuracy of checkpoints, exported folders and plain models, on a file of pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lpc_lightning.cli import PreferenceCLI
from lpc_lightning.data import DataError, PreferenceData
from lpc_lightning.evaluation.accuracy.preferences import LIKELIHOOD, preference_accuracy
from lpc_lightning.evaluation.comparison.command import evaluate
from lpc_lightning.inference.opening import OpenedPolicy, open_module, open_policy
from lpc_lightning.policy import PretrainedPolicy, TinyPolicy
from tests.fixtures.commands import POLICY

FLAGS = [*POLICY, "--model=DPO"]
FLAGS += [
    "--model.optimizer=torch.optim.AdamW",
    "--model.optimizer.lr=0.01",
    "--model.latent_lr=0.05",
    "--model.beta=0.5",
]
FLAGS += ["--latent=ExpectedSpace", "--latent.num_codes=3", "--latent.init_logit_std=1.0", "--data=PreferenceData"]
FLAGS += ["--data.batch_size=3", "--data.validation_share=0.4", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]
FLAGS += ["--trainer.precision=32-true", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File with 12 training rows and 7 test rows. One test row is too long."""
    rows = []
    for number in range(19):
        row = {"id": f"row {number}", "prompt": f"Say {number}.", "chosen": "yes " * (1 + number % 3), "rejected": "no"}
        row |= {"split": "train" if number < 12 else "test", "source": ["a", "b"][number % 2], "factor": "kind"}
        rows.append(row)
    rows[15]["chosen"] = "long " * 500
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def checkpoint(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of LPC-DPO, made by `lpc-lightning fit`."""
    root = tmp_path_factory.mktemp("runs")
    paths = [f"--data.path={file}", f"--data.cache_dir={root / 'cache'}", f"--trainer.default_root_dir={root}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")
        PreferenceCLI(["fit", *FLAGS, *paths])
    (path,) = root.glob("version_0/checkpoints/*.ckpt")
    return path


@pytest.fixture
def data(file: Path, tmp_path: Path) -> PreferenceData:
    return PreferenceData(str(file), batch_size=2, max_length=256, validation_share=0.4, cache_dir=str(tmp_path))


def pairs_of(data: PreferenceData, tokenizer: Any) -> Any:
    store = data.load("test", tokenizer)
    assert store is not None
    return list(store)


@torch.no_grad()
def naive_logp(policy: Any, prompt: list[int], answer: list[int], z: Tensor | float = 0.0) -> float:
    states = policy.backbone(input_ids=torch.tensor([prompt + answer]), use_cache=False).last_hidden_state[0]
    logps = torch.log_softmax((states + z) @ policy.head.weight.T, -1)
    return sum(float(logps[len(prompt) - 1 + index, token]) for index, token in enumerate(answer))


@torch.no_grad()
def prompt_state(policy: Any, prompt: list[int]) -> Tensor:
    return policy.backbone(input_ids=torch.tensor([prompt]), use_cache=False).last_hidden_state[0, -1:]


@pytest.mark.slow
def test_checkpoint_scored_by_its_reward(checkpoint: Path, data: PreferenceData) -> None:
    actual = preference_accuracy(str(checkpoint), data, progress_bar=False)
    assert actual.reward == "implicit reward of DPO"
    assert {"accuracy/posterior", "accuracy/marginal", "swap_turnover", "accuracy/shuffled/source/a"} <= set(
        actual.metrics
    )
    module = open_module(str(checkpoint))
    reference = module.policy_spec.build()
    pairs = pairs_of(data, module.tokenizer)
    assert [item["id"] for item in actual.items] == [pair.id for pair in pairs]
    assert (actual.pairs, actual.metrics["pairs"], actual.metrics["pairs/source/a"]) == (6, 6, 4)
    for item, pair in zip(actual.items, pairs, strict=True):
        z = module.latent.infer(prompt_state(module.policy, pair.prompt_ids))  # type: ignore[union-attr]
        for mode, shift in (("prior", z), ("no_latent", 0.0)):
            rewards = [
                naive_logp(module.policy, pair.prompt_ids, answer, shift)
                - naive_logp(reference, pair.prompt_ids, answer)
                for answer in (pair.chosen_ids, pair.rejected_ids)
            ]
            assert item["margins"][mode] == pytest.approx(0.5 * (rewards[0] - rewards[1]), abs=1e-4)
    margins = [item["margins"]["prior"] for item in actual.items]
    assert max(abs(margin) for margin in margins) > 0.01, "training must change the policy"
    assert actual.metrics["margin/prior"] == pytest.approx(sum(margins) / 6)


def test_results_count_dropped_rows(checkpoint: Path, data: PreferenceData) -> None:
    actual = preference_accuracy(str(checkpoint), data, progress_bar=False)
    assert list(actual.dropped.values()) == [1]
    assert (actual.bad, actual.cut) == ({}, {})
    assert "row 15" not in [item["id"] for item in actual.items]


def test_validation_split_equals_training_split(checkpoint: Path, data: PreferenceData) -> None:
    module = open_module(str(checkpoint))
    actual = preference_accuracy(module, data, split="validation", progress_bar=False)
    held_out = data.load("validation", module.tokenizer)
    assert held_out is not None
    assert [item["id"] for item in actual.items] == [pair.id for pair in held_out]
    assert 0 < actual.pairs < 12


def with_prior(checkpoint: Path) -> OpenedPolicy:
    """Open a checkpoint as a policy with a prior, like an exported folder."""
    return open_policy(str(checkpoint), dtype="float32")


def test_reward_without_algorithm_is_mean_logp(checkpoint: Path, data: PreferenceData) -> None:
    opened = with_prior(checkpoint)
    actual = preference_accuracy(opened, data, progress_bar=False)
    assert actual.reward == LIKELIHOOD == "mean token log-probability, no reference"
    modes = {name.split("/")[1] for name in actual.metrics if name.startswith("accuracy/")}
    assert modes == {"prior", "no_latent", "shuffled"}
    assert "swap_turnover" not in actual.metrics
    for item, pair in zip(actual.items, pairs_of(data, opened.tokenizer), strict=True):
        assert opened.prior is not None
        z = opened.prior(prompt_state(opened.policy, pair.prompt_ids))
        for mode, shift in (("prior", z), ("no_latent", 0.0)):
            rewards = [
                naive_logp(opened.policy, pair.prompt_ids, answer, shift) / len(answer)
                for answer in (pair.chosen_ids, pair.rejected_ids)
            ]
            assert item["margins"][mode] == pytest.approx(rewards[0] - rewards[1], abs=1e-4)


def sampling(checkpoint: Path, kind: str) -> Any:
    """Open a checkpoint, and draw z from a prior that gives all codes the same probability."""
    model: Any = open_module(str(checkpoint)) if kind == "module" else with_prior(checkpoint)
    if kind == "module":
        network, model.latent.prior_mode = model.latent.prior, "sample"
    else:
        network, model.prior.settings["prior_mode"] = model.prior.prior, "sample"
    torch.nn.init.zeros_(network.second.weight)
    torch.nn.init.zeros_(network.second.bias)
    return model


@pytest.mark.parametrize("kind", ["module", "export"])
def test_sampled_z_depends_on_seed_only(kind: str, checkpoint: Path, data: PreferenceData) -> None:
    model, margins = sampling(checkpoint, kind), []
    for state, seed in ((1, 3), (2, 3), (2, 4)):
        torch.manual_seed(state)
        items = preference_accuracy(model, data, progress_bar=False, seed=seed).items
        margins.append([item["margins"]["prior"] for item in items])
    assert margins[0] == margins[1] != margins[2]


def test_sampled_z_belongs_to_prompt(checkpoint: Path, data: PreferenceData, file: Path, tmp_path: Path) -> None:
    """Without an algorithm, the order of the pairs changes no draw."""
    opened = sampling(checkpoint, "export")
    (tmp_path / "reversed.jsonl").write_text("\n".join(reversed(file.read_text().splitlines())))
    turned = PreferenceData(str(tmp_path / "reversed.jsonl"), batch_size=3, max_length=256, cache_dir=str(tmp_path))
    first, second = (
        {item["id"]: item["margins"]["prior"] for item in preference_accuracy(opened, pairs, progress_bar=False).items}
        for pairs in (data, turned)
    )
    assert first == pytest.approx(second, abs=1e-5)


def test_plain_model_has_prior_mode_only(data: PreferenceData, tmp_path: Path) -> None:
    spec = TinyPolicy(width=16, layers=1, heads=2)
    spec.build().causal_lm.save_pretrained(tmp_path / "plain")
    spec.load_tokenizer().save_pretrained(tmp_path / "plain")
    actual = preference_accuracy(str(tmp_path / "plain"), data, by=["source"], progress_bar=False)
    assert actual.reward == LIKELIHOOD
    assert set(actual.metrics) == {
        f"{name}{group}"
        for name in ("accuracy/prior", "margin/prior", "log_loss/prior", "pairs")
        for group in ("", "/source/a", "/source/b", "/length_matched")
    } | {"calibration_error/prior", "longer_is_chosen", "longer_is_chosen/length_matched"} | {
        "accuracy/prior/summed", "accuracy/prior/per_token",
    }  # fmt: skip
    policy = PretrainedPolicy(str(tmp_path / "plain")).build()
    for item, pair in zip(actual.items, pairs_of(data, spec.load_tokenizer()), strict=True):
        chosen, rejected = (
            naive_logp(policy, pair.prompt_ids, answer) / len(answer) for answer in (pair.chosen_ids, pair.rejected_ids)
        )
        assert item["margins"] == {"prior": pytest.approx(chosen - rejected, abs=1e-4)}


def test_model_is_unchanged(checkpoint: Path, data: PreferenceData) -> None:
    opened = with_prior(checkpoint)
    before = {name: value.clone() for name, value in opened.policy.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    preference_accuracy(opened, data, progress_bar=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert not opened.policy.training
    assert not any(parameter.requires_grad for parameter in opened.policy.parameters())
    assert all(torch.equal(before[name], value) for name, value in opened.policy.state_dict().items())


def test_error_without_pairs(checkpoint: Path, file: Path, tmp_path: Path) -> None:
    data = PreferenceData({"train": str(file)}, cache_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"preferences: found no test pairs, expected at least one\."):
        preference_accuracy(str(checkpoint), data, progress_bar=False)
    short = PreferenceData(str(file), max_length=3, cache_dir=str(tmp_path))
    with pytest.raises(DataError):
        preference_accuracy(str(checkpoint), short, progress_bar=False)


@pytest.mark.slow
def test_evaluation_counts_pairs_of_training(
    checkpoint: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows of both splits without their split, in reverse. The counts are those of the run that wrote them down."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    unsplit = [{name: value for name, value in row.items() if name != "split"} for row in reversed(rows)]
    unsplit[-1] |= {"chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}  # the opposite label
    files = {"all": unsplit, "tested": rows}
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    trained = torch.load(checkpoint, weights_only=True)["training_data"]["pairs"]
    assert 0 < trained < 12, "the run holds out some rows"
    paths = [str(tmp_path / f"{name}.jsonl") for name in files]
    given = {"tasks": ["none"], "preferences": paths, "output": str(tmp_path / "results"), "max_length": 256}
    for _ in range(2):  # computed, then read
        assert evaluate([str(checkpoint)] * 2, names=["one", "two"], device="cpu", **given)
        sentence = f"preferences-all: {trained} of 18 pairs are training pairs of this run."
        out = capsys.readouterr().out
        assert out.count(f"\n{sentence}\n") == 2
        assert "preferences-tested:" not in out
    records = json.loads((tmp_path / "results" / "one" / "results.json").read_text())["tasks"]
    assert [records[f"preferences-{name}"]["trained_on"] for name in files] == [trained, 0]
    assert f"\none, {sentence}\n\ntwo, {sentence}\n" in (tmp_path / "results" / "comparison.md").read_text()
