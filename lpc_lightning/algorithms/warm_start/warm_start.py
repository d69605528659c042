"""The warm start of a run (see the package)."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lpc_lightning.algorithms.warm_start.decision import Decision, decide
from lpc_lightning.algorithms.warm_start.fit import fit
from lpc_lightning.algorithms.warm_start.held_out import hold_out
from lpc_lightning.algorithms.warm_start.linearized_policy import LinearizedPairs, MeanToken
from lpc_lightning.algorithms.warm_start.pair_gradients import labelled_rows, reference_logps
from lpc_lightning.data.trainer_data import required_data
from lpc_lightning.distributed.sharding import keeps_weights_elsewhere
from lpc_lightning.errors import ConfigError
from lpc_lightning.latent import LatentSpace
from lpc_lightning.policy.eval_mode import eval_mode
from lpc_lightning.seeding import derive, own_random_state, run_seed
from lpc_lightning.types import PreferenceBatch

TOKEN_PAIRS = 16
"""Number of pairs whose tokens give the policy's mean token. They are fitted pairs, drawn without regard to prompts."""

if TYPE_CHECKING:
    from lpc_lightning.algorithms.base import PreferenceModule


def warm_start(module: PreferenceModule, space: LatentSpace) -> Decision:
    """Fit `space` to `space.warm_start_pairs` of the run's training pairs. The policy is not changed.

    The labels are those of the run, with its label noise. If pairs that are held out from the fit and its selection are
    not likelier under the fitted space, it stays as it was (see `decision`).

    Raises:
        ConfigError: The data is no `PreferenceDataModule`, there are fewer than six pairs or two pairs per code, nearly
            all pairs are copies of a few, or the strategy keeps the weights elsewhere.
    """
    started, trainer = time.perf_counter(), module.trainer
    data = required_data(
        trainer,
        f"latent.warm_start_pairs: found {space.warm_start_pairs}",
        "Set it to 0 for a run without warm start.",
    )
    if keeps_weights_elsewhere(trainer.strategy):
        raise ConfigError(
            f"latent.warm_start_pairs: found {space.warm_start_pairs} with {type(trainer.strategy).__name__}, "
            "expected a strategy under which each device holds all weights. Set trainer.strategy to auto or ddp, or "
            "latent.warm_start_pairs to 0 for a run without warm start."
        )
    pairs, seed = data.training_pairs, derive("warm start", run_seed())
    indices = np.random.default_rng(seed).permutation(sorted(data.reads("train")))[: space.warm_start_pairs].tolist()
    fewest = 2 * max(3, space.num_codes)
    if len(indices) < fewest:
        raise ConfigError(
            f"latent.warm_start_pairs: found {len(indices)} training pairs (setting: {space.warm_start_pairs}), "
            f"expected at least {fewest} (six, and two for each code). Use more pairs or fewer codes "
            "(latent.num_codes), or set it to 0 for a run without warm start."
        )

    drawn = [pairs[index] for index in indices]
    prompts, contents = [pair.prompt for pair in drawn], [pair.content for pair in drawn]
    parts = hold_out(prompts, contents)
    if parts is None:
        raise ConfigError(
            f"latent.warm_start_pairs: found {len(set(contents))} different pairs of {len(set(prompts))} prompts among "
            f"{len(indices)} training pairs, expected more: copies of a pair are held out together, and would be more "
            "than half of the pairs. Use more different pairs, or set it to 0 for a run without warm start."
        )
    # In the shuffled order: in that of the parts, the first pairs may all be of one prompt.
    fitted = sorted(parts.order[: len(indices) - parts.selection - parts.decision])
    sample = [indices[number] for number in fitted[:TOKEN_PAIRS]]
    indices = [indices[number] for number in parts.order]
    rows, computed = labelled_rows(module, data, indices)
    reference = None if module.reference is None else reference_logps(module.reference, data, indices, trainer)
    # Planned, so that compiled layers on a GPU run it: a mask of all tokens by all could need gigabytes.
    layout = data.make_layout().for_batches([pairs.pieces[sample]], most=1)
    token = _mean_token(module, layout([pairs[index] for index in sample]))
    annotators, prompts, contents = (
        [values[number] for number in parts.order] for values in ([pair.annotator for pair in drawn], prompts, contents)
    )
    margins = None if pairs.margins is None else torch.from_numpy(pairs.margins[indices]).to(rows.device)
    linearized = LinearizedPairs(rows, reference, token, annotators, module.label_loss, margins, contents)
    first = len(indices) - parts.decision

    with own_random_state(module.device), torch.enable_grad():
        torch.manual_seed(seed)
        trained = copy.deepcopy(space).float()
        fit(trained, linearized.part(slice(first)), parts.selection, module.latent_lr, data.pairs_per_annotator)
        deciding, clusters = linearized.part(slice(first, None)), None if parts.whole_prompts else contents[first:]
        decision = decide(trained, deciding, prompts[first:], data.pairs_per_annotator, clusters)
    if decision.installed:
        space.load_state_dict(trained.state_dict())
    if trainer.world_size > 1:
        # The first process decides. Tensor by tensor: a strategy's `broadcast` pickles them, and each process would
        # unpickle them on the device of the first process.
        for tensor in (*space.parameters(), *space.buffers()):
            dist.broadcast(tensor.data, src=0)
    took = time.perf_counter() - started
    rank_zero_info(
        f"warm start: {len(indices)} training pairs ({len(indices) - computed} reused), in {took:.1f} s; {decision}"
    )
    return decision


@torch.no_grad()
def _mean_token(module: PreferenceModule, batch: PreferenceBatch) -> MeanToken:
    with module.trainer.precision_plugin.forward_context(), eval_mode(module.policy):
        log_p = module.policy(batch.to(module.device)).mean_token()
    head = module.policy.head
    return MeanToken(replace(head, weight=head.weight.detach().float()), log_p.float())
