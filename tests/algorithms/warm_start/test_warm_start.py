"""Tests of the warm start in real runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lpc_lightning.algorithms import DPO, IPO, KTO, ORPO, PreferenceModule, SimPO
from lpc_lightning.algorithms.warm_start import decision as decision_module
from lpc_lightning.algorithms.warm_start import warm_start as warm_start_module
from lpc_lightning.algorithms.warm_start.linearized_policy import LinearizedPairs
from lpc_lightning.callbacks import LabelFlipNoise, RunSummary
from lpc_lightning.data import ByAnnotator, Columns, PreferenceData
from lpc_lightning.errors import ConfigError
from lpc_lightning.latent import GaussianSpace, GumbelSpace, LatentSpace, MarginalSpace, MLPSpace
from lpc_lightning.policy import LoRA, TinyPolicy


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def marginal(warm_start_pairs: int = 16, **settings: Any) -> MarginalSpace:
    return MarginalSpace(num_codes=3, hidden=8, warm_start_pairs=warm_start_pairs, **settings)


@pytest.fixture
def module(small_policy: Callable[..., TinyPolicy]) -> Callable[..., PreferenceModule]:
    """Return a function that makes a module with a marginal latent and a warm start on 16 pairs."""

    def make(
        latent: LatentSpace | None = None, algorithm: type[PreferenceModule] = DPO, **policy: Any
    ) -> PreferenceModule:
        settings: dict[str, Any] = {"optimizer": adam, "latent_lr": 1e-2}
        return algorithm(policy=small_policy(**policy), latent=latent or marginal(), **settings)

    return make


class Start(Callback):
    """All weights at the first training batch."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.weights:
            self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def of(self, part: str) -> dict[str, Tensor]:
        return {name: value for name, value in self.weights.items() if name.startswith(part)}


@pytest.fixture
def no_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every fitted space. The runs have too few pairs for a decision."""
    monkeypatch.setattr(decision_module, "SIGNIFICANCE", 1.0)


@pytest.fixture
def warm_starts(monkeypatch: pytest.MonkeyPatch) -> list[LinearizedPairs]:
    """Pairs of each warm start so far."""
    made: list[LinearizedPairs] = []

    class Watched(LinearizedPairs):
        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts)
            made.append(self)

    monkeypatch.setattr(warm_start_module, "LinearizedPairs", Watched)
    return made


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_warm_start_fits_latent_not_policy(module: Any, small_policy: Any, fit_run: Any, no_decision: None) -> None:
    starts = []
    for warm_start_pairs in (0, 16):
        starts.append(start := Start())
        fit_run(module(marginal(warm_start_pairs)), callbacks=[start], max_steps=8)
    plain, warm_started = starts
    assert same(plain.of("policy"), warm_started.of("policy"))
    published = small_policy().build().state_dict()
    assert same({f"policy.{name}": value for name, value in published.items()}, warm_started.of("policy"))
    assert not plain.of("latent")["latent.prior.moments.pairs"]
    assert warm_started.of("latent")["latent.prior.moments.pairs"] == 16 - 2 - 4
    for name in ("latent.codebook.weight", "latent.prior.first.weight", "latent.prior.moments.mean"):
        assert not torch.equal(plain.weights[name], warm_started.weights[name])
    assert all(value.isfinite().all() for value in warm_started.of("latent").values())


def test_warm_start_depends_on_run_seed(module: Any, fit_run: Any, no_decision: None) -> None:
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(starts))  # must not matter
        starts.append(start := Start())
        fit_run(
            module(GumbelSpace(num_codes=3, hidden=8, warm_start_pairs=16)), seed=seed, callbacks=[start], max_steps=8
        )
    first, again, other = (start.of("latent") for start in starts)
    assert same(first, again)
    assert not torch.equal(first["latent.codebook.weight"], other["latent.codebook.weight"])


class Save(Callback):
    """Save after the second and after the sixth batch, both within a step of four batches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if (batch := args[-1]) in (1, 5):
            trainer.save_checkpoint(self.folder / f"{batch}.ckpt")


@pytest.mark.parametrize("batch", [1, 5])
def test_resumed_run_has_no_second_warm_start(
    batch: int, module: Any, fit_run: Any, tmp_path: Path, warm_starts: list[LinearizedPairs], no_decision: None
) -> None:
    options: dict[str, Any] = {"max_epochs": 1, "accumulate_grad_batches": 4}
    whole = fit_run(module(), callbacks=[Save(tmp_path)], **options)
    assert len(warm_starts) == 1
    checkpoint = torch.load(tmp_path / f"{batch}.ckpt", weights_only=True)
    assert checkpoint["global_step"] == batch // 4
    resumed = fit_run(module(), ckpt_path=tmp_path / f"{batch}.ckpt", **options)
    assert len(warm_starts) == 1
    assert same(whole.weights, resumed.weights)
    assert resumed.module.warm_start_result == whole.module.warm_start_result


def test_resume_from_before_the_warm_start(
    module: Any, fit_run: Any, tmp_path: Path, warm_starts: list[LinearizedPairs], no_decision: None
) -> None:
    class Early(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "early.ckpt")

    whole = fit_run(module(), callbacks=[Early()], max_steps=8)
    resumed = fit_run(module(), ckpt_path=tmp_path / "early.ckpt", max_steps=8)
    assert len(warm_starts) == 2
    assert same(whole.weights, resumed.weights)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [DPO, SimPO])
def test_warm_start_uses_noisy_labels(
    algorithm: type[PreferenceModule], module: Any, fit_run: Any, warm_starts: list[LinearizedPairs], tmp_path: Path
) -> None:
    for rate in (0.0, 0.4, 1.0):
        noise = [LabelFlipNoise(rate)]
        fit_run(module(marginal(21), algorithm), callbacks=noise, max_epochs=1, default_root_dir=tmp_path)
    clean, some, all_wrong = warm_starts
    assert torch.equal(clean.prompt, some.prompt)
    assert torch.equal(clean.prompt, all_wrong.prompt)
    torch.testing.assert_close(all_wrong.z_gradients, clean.z_gradients.flip(1))
    torch.testing.assert_close(all_wrong.plain, clean.plain.flip(1))
    torch.testing.assert_close(all_wrong.lengths, clean.lengths.flip(1))
    if algorithm is DPO:
        torch.testing.assert_close(all_wrong.reference, clean.reference.flip(1))
    torch.testing.assert_close(all_wrong.chosen, clean.rejected)
    unchanged = torch.tensor(
        [torch.allclose(*pair, atol=1e-5) for pair in zip(some.z_gradients, clean.z_gradients, strict=True)]
    )
    assert 5 <= unchanged.sum() <= 17
    torch.testing.assert_close(some.z_gradients[~unchanged], clean.z_gradients[~unchanged].flip(1))


def test_warm_start_logps_equal_naive_logps(
    module: Any, fit_run: Any, small_data: Any, small_policy: Any, naive_logps: Any, warm_starts: list[LinearizedPairs]
) -> None:
    data = small_data()
    fit_run(module(marginal(1000)), data, max_epochs=1)
    (pairs,) = warm_starts
    assert len(pairs) == 21
    with torch.no_grad():
        expected = naive_logps(small_policy().build().causal_lm, data.training_pairs[:]).view(2, -1).T
    _, score = pairs.select(torch.arange(21))
    losses, logps = score.under(None)
    torch.testing.assert_close(logps.policy_chosen.sort()[0].double(), expected[:, 0].sort()[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(logps.policy_rejected.sort()[0].double(), expected[:, 1].sort()[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(logps.reference_chosen, logps.policy_chosen, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(losses.losses, torch.full((21,), 2.0).log(), rtol=1e-3, atol=0)


def test_warm_start_uses_only_pairs_of_the_run(
    module: Any, fit_run: Any, warm_starts: list[LinearizedPairs], small_data: Any
) -> None:
    """A cached reference has no values for other pairs."""
    fit_run(module(marginal(1000)), small_data(), max_steps=4)
    fit_run(module(marginal(7)), small_data(), max_steps=4)
    assert [len(pairs) for pairs in warm_starts] == [8, 7]


def test_warm_start_logs_its_result(
    module: Any,
    fit_run: Any,
    small_data: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        data = small_data(cache_dir=str(tmp_path))
        fit_run(module(), data, callbacks=[RunSummary()], max_steps=8, default_root_dir=tmp_path)
    # Lightning's own handler and ours may both record the line.
    (line,) = {record.message for record in caplog.records if record.message.startswith("warm start: ")}
    assert line.startswith("warm start: 16 training pairs (0 reused), in ")
    assert "; kept the plain start: 4 held-out pairs of 4 prompts are likelier by " in line
    summary = json.loads((tmp_path / "summary.json").read_text())["warm_start"]
    assert not summary["installed"]
    assert line.endswith(summary["reason"])
    assert summary["gain"] <= summary["needed"]


LATENTS: dict[str, Callable[[], LatentSpace]] = {
    "annotators": lambda: marginal(annotators=True),
    "gumbel": lambda: GumbelSpace(num_codes=3, hidden=8, warm_start_pairs=16),
    "gaussian": lambda: GaussianSpace(num_codes=3, hidden=8, warm_start_pairs=16),
    "mlp": lambda: MLPSpace(hidden=8, warm_start_pairs=16),
}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [DPO, IPO, SimPO, KTO, ORPO])
@pytest.mark.parametrize("latent", list(LATENTS))
def test_warm_start_of_latents_and_algorithms(
    latent: str, algorithm: type[PreferenceModule], module: Any, fit_run: Any, small_data: Any, warm_starts: Any
) -> None:
    data = small_data(deciding="hidden", annotators=3)
    run = fit_run(module(LATENTS[latent](), algorithm), data, max_steps=8)
    (pairs,) = warm_starts
    assert len(set(pairs.annotators)) == 3
    assert all(weight.isfinite().all() for weight in run.weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_warm_start_in_any_precision(precision: Any, module: Any, fit_run: Any, no_decision: None) -> None:
    dtype = torch.float64 if precision == "64-true" else torch.float32
    wide, narrow = Start(), Start()
    fit_run(module(), callbacks=[wide], max_steps=8)
    run = fit_run(module(reader=True), callbacks=[narrow], max_steps=8, precision=precision)
    assert narrow.weights["latent.codebook.weight"].dtype == dtype
    assert narrow.weights["latent.prior.moments.mean"].dtype == dtype
    assert narrow.weights["latent.prior.moments.pairs"] == wide.weights["latent.prior.moments.pairs"]
    assert narrow.weights["latent.codebook.weight"].any()
    assert all(weight.isfinite().all() for weight in run.weights.values())


def test_warm_start_with_adapter_and_live_reference(
    small_policy: Any, fit_run: Any, warm_starts: list[LinearizedPairs]
) -> None:
    for lora in (None, LoRA(rank=2)):
        policy = small_policy(lora=lora)
        fit_run(DPO(policy=policy, latent=marginal(), reference="live", optimizer=adam), max_steps=8)
    whole, adapted = warm_starts
    torch.testing.assert_close(whole.z_gradients, adapted.z_gradients)
    torch.testing.assert_close(whole.plain, adapted.plain)
    torch.testing.assert_close(whole.reference, whole.plain, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(whole.reference, adapted.reference)


def test_warm_start_refuses_other_data(small_policy: Any, make_loader: Any, make_pairs: Any, make_trainer: Any) -> None:
    module = DPO(policy=small_policy(), latent=marginal(), reference="live", optimizer=adam)
    loader = make_loader(make_pairs([(3, 4, 2)] * 8))
    with pytest.raises(
        ConfigError, match=r"latent\.warm_start_pairs: found 16 with data of NoneType, expected a Preference"
    ):
        make_trainer(max_steps=1, limit_val_batches=0).fit(module, loader, loader)


@pytest.mark.parametrize(("codes", "warm_start_pairs", "fewest"), [(3, 5, 6), (11, 1000, 22), (1, 3, 6)])
def test_warm_start_refuses_too_few_pairs(
    codes: int, warm_start_pairs: int, fewest: int, module: Any, fit_run: Any
) -> None:
    latent = MarginalSpace(num_codes=codes, hidden=8, warm_start_pairs=warm_start_pairs)
    available = min(warm_start_pairs, 21)
    expected = rf"latent\.warm_start_pairs: found {available} training pairs \(setting: {warm_start_pairs}\), "
    expected += f"expected at least {fewest} "
    with pytest.raises(ConfigError, match=expected):
        fit_run(module(latent), max_epochs=1)


def test_negative_warm_start_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"latent\.warm_start_pairs: found -1, expected at least 0\."):
        marginal(-1)


def test_annotators_setting_needs_annotators(module: Any, fit_run: Any) -> None:
    shares = MarginalSpace(num_codes=2, annotators=True)
    with pytest.raises(ConfigError, match=r"latent\.annotators: found true, and no annotator in \d+ training pairs"):
        fit_run(module(shares), max_steps=1)


@pytest.mark.parametrize(("named", "marker"), [(None, None), ("annotator", None), (None, "[FLIP]")])
def test_warm_start_holds_out_whole_prompts(
    named: Any, marker: str | None, module: Any, fit_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten questions have four labels each, also if a prompt has a name or a marker. The margin numbers the question."""
    rows = [
        {"prompt": f"Name {n}!", "chosen": who, "rejected": "no", "annotator": who, "margin": n / 8}
        for who in "abcd"
        for n in range(10)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fitted, fit = [], warm_start_module.fit

    def watched(space: LatentSpace, pairs: LinearizedPairs, held: int, *rest: Any) -> tuple[float, float]:
        fitted.append((pairs, held, *rest))
        return fit(space, pairs, held, *rest)

    monkeypatch.setattr(warm_start_module, "fit", watched)
    settings: dict[str, Any] = {
        "validation_share": 0.0, "test_split": None, "batch_size": 4, "batch_order": ByAnnotator(2)
    }  # fmt: skip
    columns = Columns(named_in_prompt=named)
    data = PreferenceData(str(tmp_path / "pairs.jsonl"), columns=columns, cache_dir=str(tmp_path), **settings)
    settings = {"callbacks": [LabelFlipNoise(0.5, marker=marker)], "default_root_dir": tmp_path, "max_epochs": 1}
    run = fit_run(module(marginal(40, annotators=True)), data=data, **settings)
    ((pairs, held, latent_lr, pairs_per_annotator),) = fitted
    assert (len(pairs), held, latent_lr, pairs_per_annotator) == (32, 4, 1e-2, 2)
    states, score = pairs.select(torch.arange(32))
    assert len(set(states.contents)) == 32
    questions = score.under(None)[1].target_margins.tolist()
    assert len(set(questions[:-4])) == 7
    assert len({*questions[:-4], questions[-1]}) == 8
    assert questions[-4:] == 4 * questions[-1:]
    assert sorted(pairs.annotators[-4:]) == list("abcd")
    assert (run.module.warm_start_result["pairs"], run.module.warm_start_result["prompts"]) == (8, 2)


def test_warm_start_holds_out_copies_together(
    module: Any, fit_run: Any, tmp_path: Path, warm_starts: list[LinearizedPairs]
) -> None:
    """Ten pairs of one prompt have three annotators each, who disagree. A margin numbers the pair."""
    rows = [
        {"prompt": "Name one!", "chosen": str(n), "rejected": "no", "annotator": who, "margin": n / 8}
        for n in range(10)
        for who in "abc"
    ]
    rows = [row | {"chosen": "no", "rejected": row["chosen"]} if row["annotator"] == "c" else row for row in rows]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {"validation_share": 0.0, "test_split": None, "batch_size": 4}
    data = PreferenceData(str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path), **settings)
    run = fit_run(module(marginal(30)), data=data, max_epochs=1)
    _, score = warm_starts[0].select(torch.arange(30))
    numbers = score.under(None)[1].target_margins
    assert numbers is not None
    # A tenth of 30 pairs is one pair with its copies. Two different pairs decide.
    parts = [set(part.tolist()) for part in numbers.split([21, 3, 6])]
    assert [len(part) for part in parts] == [7, 1, 2]
    assert len(set.union(*parts)) == 10
    result = run.module.warm_start_result
    assert (result["pairs"], result["prompts"], result["different_pairs"]) == (6, 1, 2)
    assert "6 held-out pairs of 2 different pairs" in result["reason"]


def test_warm_start_refuses_copies_of_a_few_pairs(module: Any, fit_run: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "Name one!", "chosen": str(n % 3), "rejected": "no"} for n in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {"validation_share": 0.0, "test_split": None, "batch_size": 4}
    data = PreferenceData(str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path), **settings)
    with pytest.raises(
        ConfigError, match=r"^latent\.warm_start_pairs: found 3 different pairs of 1 prompts among 30 training pairs"
    ):
        fit_run(module(marginal(30)), data=data, max_epochs=1)


def test_warm_start_has_the_margins_of_its_pairs(
    module: Any, fit_run: Any, tmp_path: Path, warm_starts: list[LinearizedPairs]
) -> None:
    """The margin of a pair is the number in its annotator's name."""
    rows = [
        {"prompt": f"Name {n}!", "chosen": "yes", "rejected": "no", "annotator": str(n / 8), "margin": n / 8}
        for n in range(16)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"validation_share": 0.0, "test_split": None, "batch_size": 4}
    data = PreferenceData(str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path), **settings)
    fit_run(module(), data=data, max_epochs=1)
    (pairs,) = warm_starts
    _, score = pairs.select(torch.arange(16))
    margins = score.under(None)[1].target_margins
    assert margins is not None
    assert margins.tolist() == [float(name) for name in pairs.annotators]
