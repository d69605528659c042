"""Margins of the same pairs under several choices of z: prior, posterior, none, and another prompt's.

`docs/accuracy_modes.md` explains the modes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lpc_lightning.algorithms.latent_mixin import BatchScorer
from lpc_lightning.algorithms.metrics import accuracies
from lpc_lightning.algorithms.outputs import EvaluationOutput
from lpc_lightning.latent import LatentSpace
from lpc_lightning.types import PairLogps, PairStates

SWAPPED = "posterior_swapped"
"""Key of the margins under the posterior of the swapped answers. It is used for `swap_turnover` and is not a mode."""
LABEL_CORRECT = "label_correct"
"""Key of the posterior that a label is correct, if the loss infers it, for `wrong_label_auroc/label_correct`."""
LengthScale = Callable[[PairLogps], PairLogps]
"""Change of the answers' log-probabilities before the loss."""


def summed(logps: PairLogps) -> PairLogps:
    """Return log-probabilities that a loss cannot divide by lengths: sums over the tokens of each answer."""
    return replace(
        logps,
        chosen_lengths=torch.ones_like(logps.chosen_lengths),
        rejected_lengths=torch.ones_like(logps.rejected_lengths),
    )


def per_token(logps: PairLogps) -> PairLogps:
    """Return log-probabilities divided by the number of tokens of each answer, policy and reference alike."""
    chosen, rejected = logps.chosen_lengths, logps.rejected_lengths
    return summed(
        replace(
            logps,
            policy_chosen=logps.policy_chosen / chosen,
            policy_rejected=logps.policy_rejected / rejected,
            reference_chosen=None if logps.reference_chosen is None else logps.reference_chosen / chosen,
            reference_rejected=None if logps.reference_rejected is None else logps.reference_rejected / rejected,
        )
    )


LENGTH_SCALES: dict[str, LengthScale] = {"summed": summed, "per_token": per_token}
"""Rewards without and with length normalization, for every algorithm."""


def shuffle_partners(prompts: Sequence[str]) -> list[int | None]:
    """Return for each pair of a batch the pair whose z it gets in mode `shuffled`. None if all have its prompt.

    It is the first pair with another prompt, counted backwards and in a circle from the pair half a batch before. Pairs
    of the same prompt have the same z of the prior, and validation puts them next to each other.

    Args:
        prompts: `PreferenceBatch.prompts`.
    """
    size = len(prompts)
    return [
        next(
            (other for back in range(size) if prompts[other := (row - size // 2 - back) % size] != prompt),
            None,
        )
        for row, prompt in enumerate(prompts)
    ]


def mode_margins(
    evaluated: EvaluationOutput,
    space: LatentSpace | None,
    partners: Sequence[int | None],
    scales: Mapping[str, LengthScale] | None = None,
) -> dict[str, Tensor]:
    """Compute the margin of each pair in every mode of the space, from one backbone pass.

    A margin is the reward of the chosen answer minus that of the rejected answer. In mode `marginal` it is the log-odds
    of the preference. The modes are:

    - `prior`: z from the prior, as the policy is used. The module's own accuracy is computed from these margins.
    - `posterior`: z from the posterior, which uses the label. `posterior_swapped` uses the opposite label.
    - `marginal`: log sum_k p_k exp(-l_k) of the labelled pair, minus that of the pair with the opposite label. l_k is
      the algorithm's loss, without the label noise of a robust loss.
    - `no_latent`: z = 0.
    - `shuffled`: z of another prompt of the batch. NaN for pairs without a partner.

    A loss that infers whether labels are correct (REPO) adds the key `LABEL_CORRECT`, the posterior that each label is
    correct. With a codebook, it is the exact posterior that sums out the code.

    Args:
        evaluated: The return value of `validation_step` or `test_step`.
        space: The module's latent space, or None.
        partners: `shuffle_partners` of the batch.
        scales: Further scales of the answers' log-probabilities, by name (see `LENGTH_SCALES`). None: the algorithm's
            own only.

    Returns:
        (B,) margins by mode. A policy without z has the mode `prior` only. With scales, also the margins under each
        scale, by `MODE/SCALE`. They are from the same passes and under the same z.
    """
    terms, states, score = evaluated["terms"], evaluated["states"], evaluated["score"]
    scales = scales or {}

    def under_scales(mode: str, logps: PairLogps) -> dict[str, Tensor]:
        return {f"{mode}/{name}": score.losses(scale(logps)).margins for name, scale in scales.items()}

    margins = {"prior": terms.pairs.margins} | under_scales("prior", terms.logps)
    if terms.pairs.label_correct is not None:
        summed_out = None if space is None else space.label_correct(states.prompt, score)
        margins[LABEL_CORRECT] = terms.pairs.label_correct if summed_out is None else summed_out
    if terms.z is None:
        return margins
    # Also computed if no pair has a partner: with sharded weights, all devices must run the same passes.
    rows = [row if partner is None else partner for row, partner in enumerate(partners)]
    zs: dict[str, Tensor | None] = {"no_latent": None, "shuffled": terms.z[rows]}
    if space is not None:
        swapped_states = PairStates(prompt=states.prompt, chosen=states.rejected, rejected=states.chosen)
        z, swapped_z = space.posterior_z(states, score), space.posterior_z(swapped_states, score.swapped())
        zs |= {} if z is None else {"posterior": z, SWAPPED: swapped_z}
        preference = score.without_label_noise()
        scorers = {f"marginal/{name}": preference.rescaled(scale) for name, scale in scales.items()}
        scorers["marginal"] = preference
        odds = {name: _log_odds(space, states, each) for name, each in scorers.items()}
        margins |= {name: value for name, value in odds.items() if value is not None}
    for mode, z in zs.items():
        pairs, logps = score.under(z)
        margins |= {mode: pairs.margins} | ({} if mode == SWAPPED else under_scales(mode, logps))
    alone = torch.tensor([partner is None for partner in partners], device=terms.z.device)
    for name in ("shuffled", *(f"shuffled/{scale}" for scale in scales)):
        margins[name] = margins[name].masked_fill(alone, torch.nan)
    return margins


def _log_odds(space: LatentSpace, states: PairStates, score: BatchScorer) -> Tensor | None:
    """Compute the log-odds (B,) of the preferences with the code summed out. None without codes."""
    evidence, swapped = (space.log_evidence(states.prompt, each) for each in (score, score.swapped()))
    return None if evidence is None or swapped is None else evidence - swapped


def turnover(first: Tensor, second: Tensor) -> Tensor:
    """Compute 1 where two predictions (signs of margins) differ and 0 where they agree.

    A zero margin against a nonzero margin counts 1/2.
    """
    return (accuracies(first) - accuracies(second)).abs()
