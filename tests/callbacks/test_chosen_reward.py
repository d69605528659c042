"""Tests of the warning about falling rewards, in real runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lpc_lightning.algorithms import DPO, PreferenceModule, SimPO
from lpc_lightning.callbacks import ChosenRewardWarning
from lpc_lightning.errors import ConfigError
from lpc_lightning.latent import MarginalSpace


def ascent(parameters: Any) -> torch.optim.Optimizer:
    """Return an optimizer that makes the loss larger, and with it the chosen answers less likely."""
    return torch.optim.SGD(parameters, lr=0.5, maximize=True)


def chosen_reward_warnings(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in caught if "train/rewards/chosen" in str(each.message)]


@pytest.fixture
def fit(fit_run: Any, small_policy: Any) -> Callable[..., Any]:
    """Return a function that trains for some steps, of which each is logged."""

    def run(
        callback: ChosenRewardWarning, algorithm: type[PreferenceModule] = DPO, steps: int = 8, **module: Any
    ) -> Any:
        made = algorithm(policy=small_policy(), **module)
        return fit_run(made, callbacks=[callback], max_steps=steps, log_every_n_steps=1)

    return run


@pytest.mark.slow
def test_warning_once(fit: Callable[..., Any]) -> None:
    callback = ChosenRewardWarning(patience=3)
    (message,) = chosen_reward_warnings(lambda: fit(callback, optimizer=ascent, nll_weight=1.0))
    assert message.startswith("train/rewards/chosen: found -")
    assert "below 0 in the last 3 logged steps" in message
    again = ChosenRewardWarning(patience=3)
    again.load_state_dict(callback.state_dict())
    assert not chosen_reward_warnings(lambda: fit(again, optimizer=ascent, nll_weight=1.0))


@pytest.mark.slow
@pytest.mark.parametrize(("patience", "warned"), [(4, True), (5, False)])
def test_patience_counts_steps(patience: int, warned: bool, small_policy: Any, fit_run: Any) -> None:
    """Of five logged steps, the policy's reward is 0 in the first one, before any change, and below 0 in four."""
    module, callback = DPO(policy=small_policy(), optimizer=ascent, nll_weight=1.0), ChosenRewardWarning(patience)
    settings = {"max_steps": 5, "log_every_n_steps": 1, "accumulate_grad_batches": 3}
    found = chosen_reward_warnings(lambda: fit_run(module, callbacks=[callback], **settings))
    assert bool(found) == warned


@pytest.mark.slow
def test_no_warning_with_sft_term(fit: Callable[..., Any]) -> None:
    """The SFT term alone, with a weight that outweighs DPO, makes chosen answers likelier in every step."""
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=1e-3)  # noqa: E731
    callback = ChosenRewardWarning(patience=3)
    latent = MarginalSpace(num_codes=3, hidden=8)
    assert not chosen_reward_warnings(lambda: fit(callback, optimizer=optimizer, nll_weight=100.0, latent=latent))


def test_no_warning_without_reference(fit: Callable[..., Any]) -> None:
    """SimPO's rewards are mean log-probabilities, always below zero."""
    assert not chosen_reward_warnings(lambda: fit(ChosenRewardWarning(patience=1), SimPO, steps=2))


def test_patience_below_one() -> None:
    with pytest.raises(ConfigError, match=r"ChosenRewardWarning\.patience: found 0, expected at least 1"):
        ChosenRewardWarning(patience=0)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_nll_weight_out_of_range(weight: float, small_policy: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.nll_weight: found .*, expected a number of at least 0"):
        DPO(policy=small_policy(), nll_weight=weight)
