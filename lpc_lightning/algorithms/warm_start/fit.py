"""A latent space fitted to pairs under the sketch of a policy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, rms_norm

from lpc_lightning.algorithms.warm_start.clusters import cluster_pairs, prompt_canonical_variates
from lpc_lightning.algorithms.warm_start.linearized_policy import LinearizedPairs
from lpc_lightning.data.batching.annotator_batches import group_by_annotator
from lpc_lightning.latent import DiscreteSpace, LatentSpace
from lpc_lightning.latent.evidence import given_earlier_pairs
from lpc_lightning.latent.networks import Codebook

BATCH = 32
"""Pairs in a step."""
AT_ONCE = 256
"""Pairs that are looked at together without gradient."""
EPOCHS = 8
"""Of imitation, and of the algorithm's own loss."""
CALM = 0.3
"""Share of `latent_lr` by which networks learn once they imitate the clusters."""
SCALES = tuple(10.0 ** (power / 4) for power in range(-4, 11))
"""Deviations, in nats, of log pi(y_w|x, e_k) - log pi(y_l|x, e_k) over codes and pairs, among which one is chosen."""
CODE_STEP = 0.03
"""Learning rate of a codebook, as a share of its root mean square."""


def fit(
    space: LatentSpace, pairs: LinearizedPairs, held: int, latent_lr: float, pairs_per_annotator: int | None = None
) -> tuple[float, float]:
    """Fit `space`, which is changed, in float32.

    Args:
        space: Built, in float32.
        pairs: Four or more, shuffled, the same on all devices.
        held: How many of them, the last ones, are held out (see `hold_out`).
        latent_lr: Learning rate of the networks.
        pairs_per_annotator: Pairs of one annotator that stand together in a batch (see `annotator_batches`); None: as
            drawn.

    Returns:
        Mean losses of held-out pairs, in nats: without a latent, and as the space has been fitted.
    """
    fitted, held_out = torch.arange(len(pairs)).split([len(pairs) - held, held])
    batches = partial(_batches, pairs.annotators, pairs_per_annotator)
    tested = batches(held_out)
    with torch.no_grad():
        space.train()
        for indices in fitted.split(AT_ONCE):
            space.training_terms(*pairs.take(indices), 0.0)
        space.close_window(alike=True)
        space.eval()
        plain = float(pairs.take(held_out)[1].under(None)[0].losses.mean())

    def step(indices: Tensor, progress: float) -> Tensor:
        terms = space.training_terms(*pairs.take(indices), progress)
        return (terms.pairs.losses + terms.penalty).mean()

    if isinstance(space, DiscreteSpace):
        clusters = _take_clusters(space, pairs, len(fitted))

        def imitate(indices: Tensor, progress: float) -> Tensor:
            return space.imitation_loss(pairs.take(indices)[0], clusters[indices]).mean()

        networks = [parameter for name, parameter in space.named_parameters() if not name.startswith("codebook")]
        _descend(space, [{"params": networks, "lr": latent_lr}], imitate, fitted, tested, batches)
        _take_scale(space, pairs, held_out)
    return plain, _descend(space, _groups(space, CALM * latent_lr), step, fitted, tested, batches)


def _take_clusters(space: DiscreteSpace, pairs: LinearizedPairs, fitted: int) -> Tensor:
    """Give codes the directions of clusters, by the labels of the first `fitted` pairs; (N,) the kind of each pair."""
    if space.annotators and any(pairs.annotators):
        names = {name: number for number, name in enumerate(dict.fromkeys(pairs.annotators))}
        known = one_hot(torch.tensor([names[name] for name in pairs.annotators])).float()
    else:
        prompts = rms_norm(pairs.prompt, pairs.prompt.shape[-1:])
        known = prompt_canonical_variates(
            (prompts - prompts.mean(0)) / prompts.std(0).clamp_min(1e-6), pairs.z_gradients.sum(1)
        ).cpu()
    codes, clusters = cluster_pairs(known, pairs.z_gradient_difference[:fitted].cpu(), space.num_codes)
    space.codebook.weight.data.copy_(codes)
    return clusters.to(pairs.prompt.device)


@torch.no_grad()
def _take_scale(space: DiscreteSpace, pairs: LinearizedPairs, held_out: Tensor) -> None:
    """Give the codebook the scale under which held-out labels have the highest evidence.

    Where annotators' pairs share what they say, each is scored given the earlier ones: two opposite codes, each with
    weight 1/2, say nothing of single pairs at any scale.
    """
    states, score = pairs.take(held_out)
    log_prior = space.log_prior(states.prompt)
    directions = space.codebook.weight / (
        pairs.z_gradient_difference[held_out] @ space.codebook.weight.T
    ).std().clamp_min(1e-12)

    def evidence(scale: float) -> Tensor:
        said = score.under_codes(scale * directions)[0].label_log_likelihood
        given = given_earlier_pairs(log_prior, said, states.annotators) if space.annotators else log_prior
        return (given + said).logsumexp(-1).mean()

    best = int(torch.stack([evidence(scale) for scale in SCALES]).argmax())
    space.codebook.weight.copy_(SCALES[best] * directions)


def _groups(space: LatentSpace, latent_lr: float) -> list[dict[str, object]]:
    """Codebooks move by a share of their size, networks by `latent_lr`."""
    books = [part.weight for part in space.modules() if isinstance(part, Codebook)]
    others = [p for p in space.parameters() if not any(p is weight for weight in books)]
    groups: list[dict[str, object]] = [{"params": others, "lr": latent_lr}] if others else []
    return groups + [{"params": [w], "lr": CODE_STEP * float(w.detach().square().mean().sqrt())} for w in books]


def _descend(
    space: nn.Module,
    groups: list[dict[str, object]],
    loss_of: Callable[[Tensor, float], Tensor],
    fitted: Tensor,
    tested: Sequence[Tensor],
    batches: Callable[[Tensor], Sequence[Tensor]],
) -> float:
    """Adam over `EPOCHS`, steps falling to 0; keep the epoch whose held-out loss is lowest, the start among them."""
    optimizer = torch.optim.Adam(groups)
    steps = EPOCHS * max(1, len(fitted) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    best, best_state = _mean(loss_of, tested), copy.deepcopy(space.state_dict())
    for epoch in range(EPOCHS):
        for number, indices in enumerate(batches(fitted[torch.randperm(len(fitted))])[: steps // EPOCHS]):
            optimizer.zero_grad()
            loss_of(indices, (epoch * (steps // EPOCHS) + number) / steps).backward()
            optimizer.step()
            schedule.step()
        if (now := _mean(loss_of, tested)) < best:
            best, best_state = now, copy.deepcopy(space.state_dict())
    space.load_state_dict(best_state)
    return best


@torch.no_grad()
def _mean(loss_of: Callable[[Tensor, float], Tensor], batches: Sequence[Tensor]) -> float:
    """Mean loss of a pair at the end of training."""
    return sum(float(loss_of(batch, 1.0)) * len(batch) for batch in batches) / sum(map(len, batches))


def _batches(annotators: Sequence[str], pairs_per_annotator: int | None, indices: Tensor) -> Sequence[Tensor]:
    """The pairs at `indices`, which are shuffled, in batches like those of training."""
    if pairs_per_annotator is not None:
        generator = torch.default_generator
        indices = torch.tensor(
            group_by_annotator(indices.tolist(), annotators, BATCH, 1, pairs_per_annotator, generator)
        )
    return indices.split(BATCH)
