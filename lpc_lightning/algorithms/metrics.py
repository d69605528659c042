"""What a run reports, summed over pairs, batches and devices. The names are TRL's where TRL has one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from lpc_lightning.latent import LatentTerms
from lpc_lightning.types import PairStates


def accuracies(margins: Tensor) -> Tensor:
    """1 where the chosen answer is ahead, 0 where it is behind, 1/2 at a tie.

    At the first step of DPO all margins are exactly 0, and a policy that has learned nothing is right half of the time
    (TRL counts ties as wrong).
    """
    return torch.where(margins.isnan(), margins, (margins.sign() + 1) / 2)  # the sign of NaN is 0, a tie


def pair_values(terms: LatentTerms) -> dict[str, Tensor]:
    """Values whose mean over pairs is a metric, (B,) each."""
    pairs, logps = terms.pairs, terms.logps
    margins = pairs.chosen_rewards - pairs.rejected_rewards
    return {
        "loss": (pairs.losses + terms.penalty).detach(),
        "rewards/chosen": pairs.chosen_rewards,
        "rewards/rejected": pairs.rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": accuracies(margins),
        "logps/chosen": logps.policy_chosen.detach(),
        "logps/rejected": logps.policy_rejected.detach(),
    }


def latent_values(terms: LatentTerms, states: PairStates) -> dict[str, Tensor]:
    """Values of the latent whose mean over pairs is a metric, (B,) each; only those that the space has."""
    values: dict[str, Tensor] = {}
    if terms.z is not None:
        values["z_norm_ratio"] = terms.z.detach().float().norm(dim=-1) / states.prompt.detach().float().norm(dim=-1)
    if terms.kl is not None:
        values["kl"] = terms.kl.detach()
    if isinstance(terms.penalty, Tensor):
        values["kl_weighted"] = terms.penalty.detach()
    if terms.prior is not None:
        values["prior_entropy"] = entropy(terms.prior)
    if terms.posterior is not None:
        values["posterior_entropy"] = entropy(terms.posterior)
    if terms.prior is not None and terms.posterior is not None:
        values["agreement"] = (terms.prior.argmax(-1) == terms.posterior.argmax(-1)).float()
    return {f"latent/{name}": value for name, value in values.items()}


def fetch(values: Mapping[str, float | Tensor]) -> dict[str, Tensor]:
    """Copy single numbers from a device to the CPU, all of them in one transfer.

    Args:
        values: Numbers by name: tensors of one element on one device, or plain numbers.

    Returns:
        The same names with float64 tensors on the CPU, in the same order.
    """
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    fetched = torch.stack([value.double() for value in tensors.values()]).cpu() if tensors else torch.zeros(0)
    on_cpu = dict(zip(tensors, fetched, strict=True))
    return {
        name: on_cpu[name] if name in on_cpu else torch.tensor(value, dtype=torch.float64, device="cpu")
        for name, value in values.items()
    }


def entropy(log_probabilities: Tensor) -> Tensor:
    """(B, K) log-probabilities to (B,) nats, without gradient."""
    logs = log_probabilities.detach()
    return -(logs.exp() * logs).sum(-1)


class CodeUse(Metric):
    """How much of the codebook the prior uses: perplexity of its mean over prompts, and codes that never lead.

    `codebook_perplexity` is exp of the entropy of the mean prior, 1 (one code) to K (all alike). A prior that is
    uniform for every prompt has a high perplexity as well: read it next to `prior_entropy`.
    """

    full_state_update = False

    def __init__(self, num_codes: int) -> None:
        """Start counting.

        Args:
            num_codes: K.
        """
        super().__init__()
        self.add_state("mass", torch.zeros(num_codes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("leads", torch.zeros(num_codes, dtype=torch.long), dist_reduce_fx="sum")
        self.mass: Tensor
        self.leads: Tensor

    def update(self, log_prior: Tensor) -> None:
        """Take in (B, K) prior log-probabilities."""
        self.mass += log_prior.detach().double().exp().sum(0)
        # Not `bincount`, which on a GPU has the CPU wait for the largest number.
        codes = torch.arange(self.leads.shape[0], device=log_prior.device)
        self.leads += (log_prior.argmax(-1, keepdim=True) == codes).sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Perplexity and dead codes."""
        share = self.mass / self.mass.sum()
        return {
            "latent/codebook_perplexity": torch.special.entr(share).sum().exp(),
            "latent/dead_codes": (self.leads == 0).sum().double(),
        }


class PairMeans(Metric):
    """Means over all pairs of whatever values come in, each pair counted once."""

    full_state_update = False

    def __init__(self) -> None:
        """Start with no pairs."""
        super().__init__()
        self.add_state("sums", torch.zeros(0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.names: tuple[str, ...] = ()
        self.sums: Tensor
        self.pairs: Tensor

    def update(self, values: dict[str, Tensor]) -> None:
        """Take in (B,) values by name; the names are the same at every update."""
        self.names = tuple(values)
        sums = torch.stack([value.double().sum() for value in values.values()])
        self.sums = sums if self.sums.numel() == 0 else self.sums + sums
        self.pairs += next(iter(values.values())).shape[0]

    def compute(self) -> dict[str, Tensor]:
        """Mean by name."""
        return dict(zip(self.names, self.sums / self.pairs, strict=True))


class PreferenceMetrics(torch.nn.Module):
    """Everything that one stage (training, validation, test) reports."""

    def __init__(self, num_codes: int | None) -> None:
        """Start counting.

        Args:
            num_codes: K of a discrete latent space, or None.
        """
        super().__init__()
        self.means = PairMeans()
        self.use = None if num_codes is None else CodeUse(num_codes)
        self.settings: dict[str, float] = {}

    def update(self, terms: LatentTerms, states: PairStates) -> None:
        """Take in a batch."""
        self.means.update(pair_values(terms) | latent_values(terms, states))
        if self.use is not None and terms.prior is not None:
            self.use.update(terms.prior)
        self.settings = {f"latent/{name}": value for name, value in terms.settings.items()}

    def collect(self) -> dict[str, float | Tensor]:
        """All metrics since the last call, over all devices; starts anew."""
        found: dict[str, float | Tensor] = {**self.means.compute(), **self.settings}
        if self.use is not None:
            found |= self.use.compute()
            self.use.reset()
        self.means.reset()
        return found
