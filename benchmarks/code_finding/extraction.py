"""One pass of a frozen policy over pairs: gradients with respect to z at the head, and mean states at given layers.

The values belong to an answer and its prompt. They depend neither on the label nor on the other answer, so that only as
many pairs are computed as hold every answer once or more.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from benchmarks.code_finding.pairs import Pairs
from lpc_lightning.algorithms.warm_start.linearized_policy import make_rows
from lpc_lightning.data import DataError, PreferenceData
from lpc_lightning.data.datamodule import Stage
from lpc_lightning.data.sources.columns import Columns
from lpc_lightning.data.sources.rows import entry_of
from lpc_lightning.policy import CausalPolicy, PolicySpec, policy_fingerprint
from lpc_lightning.policy.causal import BatchForward, sum_by_answer
from lpc_lightning.reference.cached import computation_key
from lpc_lightning.reference.pair_cache import PairCache
from lpc_lightning.reference.pair_pass import PairFunction
from lpc_lightning.reference.shared_pass import shared_pass
from lpc_lightning.types import PreferenceBatch, TokenizedPair, token_hash

PARTS: tuple[Stage, ...] = ("train", "test")
"""Parts of a file that are read."""


def extract(
    data: Path,
    spec: PolicySpec,
    layers: Sequence[int],
    columns: Columns,
    train_prompts: int | None = None,
    group: str | None = None,
    precision: str = "bf16-mixed",
) -> Pairs:
    """Compute the values of all test pairs, and of the training pairs of some or all prompts.

    A pass that was stopped goes on where its last stored part ends.

    Args:
        data: File of preference pairs with the splits train and test.
        spec: The policy.
        layers: Layers whose states are stored, from 1 to the policy's number of layers.
        columns: Names of the columns of annotator and factor.
        train_prompts: Number of training prompts, drawn by seed 0. None: all of them.
        group: Entry that divides the factors further, such as `meta.opinion_group`. None: the factors as they are.
        precision: Precision of the pass, as in `trainer.precision`.

    Raises:
        DataError: The file is unreadable, or a part has no pairs.
    """
    tokenizer = spec.load_tokenizer()
    source = PreferenceData(
        str(data),
        max_length=1024,
        too_long="truncate_answer",
        validation_share=0.0,
        columns=columns,
    )
    quiet: Any = {"precision": precision, "logger": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", **quiet)
    policy = spec.build().eval()
    source.trainer = trainer
    source.set_tokenizer(tokenizer)
    source.set_policy(policy)
    tables = []
    for part in PARTS[::-1]:
        pairs = source.load(part, tokenizer)
        if pairs is None or not len(pairs):
            raise DataError(f"{data}: found no pairs of the split {part!r}, expected both train and test.")
        chosen = list(range(len(pairs)))
        if part == "train" and train_prompts is not None:
            names = sorted({pair.prompt for pair in pairs})
            drawn = set(np.random.default_rng(0).permutation(names)[:train_prompts])
            chosen = [index for index, pair in enumerate(pairs) if pair.prompt in drawn]
        labelled = [pairs[index] for index in chosen]
        covering = [chosen[number] for number in covering_pairs(labelled)]
        key = computation_key(policy_fingerprint(policy), policy, trainer) | {"layers": str(list(layers))}
        numbers = (5 + 3 * len(layers)) * policy.width + 4
        cache = PairCache("code_finding", numbers, key, pairs, source.cache_dir, np.float32)
        open_function = partial(_open_values, policy, layers)
        values, _ = shared_pass(cache, pairs, covering, source.make_layout(), open_function, trainer, f"{part} pairs")
        covered = [pairs[index] for index in sorted(covering)]
        table = assemble(labelled, covered, values, policy.width, layers, part)
        if group is not None:
            examples = list(source.kept_examples(part))
            groups = [f"{examples[index].factor}/{_entry(examples[index].meta, group)}" for index in chosen]
            table = replace(table, factor=np.array(groups))
        tables.append(table)
    return Pairs.concatenate(tables[::-1])


def covering_pairs(pairs: Sequence[TokenizedPair]) -> list[int]:
    """Return numbers of pairs that together hold every answer. Pairs of two new answers come first."""
    held: set[tuple[str, tuple[int, ...]]] = set()
    covering: list[int] = []
    for new in (2, 1):
        for number, pair in enumerate(pairs):
            answers = set(_answers(pair))
            if len(answers - held) >= new:
                held |= answers
                covering.append(number)
    return covering


def assemble(
    pairs: Sequence[TokenizedPair],
    covered: Sequence[TokenizedPair],
    values: np.ndarray,
    width: int,
    layers: Sequence[int],
    part: str,
) -> Pairs:
    """Return pairs with the values of their prompt and answers.

    Args:
        pairs: (N,) pairs.
        covered: (n,) pairs that were computed.
        values: (n, (5 + 3 layers) width + 4) values of these, see `answer_values`.
        width: Width d of a hidden state.
        layers: The layers.
        part: Part of the file that the pairs belong to.
    """
    states = values[:, 5 * width + 4 :].reshape(len(values), len(layers), 3, width)
    by_answer: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}
    for row, pair in enumerate(covered):
        by_answer |= {answer: (row, side) for side, answer in enumerate(_answers(pair))}
    places = np.array([[by_answer[answer] for answer in _answers(pair)] for pair in pairs])  # (N, 2, (row, side))
    rows, sides = places[..., 0], places[..., 1]
    last, gradients = (
        values[:, first * width : (first + 2) * width].reshape(-1, 2, width)[rows, sides] for first in (1, 3)
    )
    return Pairs(
        part=np.full(len(pairs), part),
        prompt=np.array([pair.prompt for pair in pairs]),
        annotator=np.array([pair.annotator for pair in pairs]),
        factor=np.array([pair.factor for pair in pairs]),
        answers=np.array([[token_hash(array("q", ids).tobytes()) for _, ids in _answers(pair)] for pair in pairs]),
        gradient=gradients[:, 0] - gradients[:, 1],
        last=last,
        mean={layer: states[rows, number, 1 + sides] for number, layer in enumerate(layers)},
        prompt_state={layer: states[rows[:, 0], number, 0] for number, layer in enumerate(layers)},
    )


def _entry(row: Mapping[str, Any], entry: str) -> Any:
    value = entry_of(row, entry)
    if value is None:
        raise DataError(f"--group: found no entry {entry!r} in {sorted(row)}, expected one. Correct its name.")
    return value


def _answers(pair: TokenizedPair) -> list[tuple[str, tuple[int, ...]]]:
    return [(pair.prompt, tuple(ids)) for ids in (pair.chosen_ids, pair.rejected_ids)]


@contextmanager
def _open_values(policy: CausalPolicy, layers: Sequence[int]) -> Iterator[PairFunction]:
    yield partial(answer_values, policy, layers)


@torch.no_grad()
def answer_values(policy: CausalPolicy, layers: Sequence[int], batch: PreferenceBatch) -> Tensor:
    """Compute (B, (5 + 3 L) d + 4) float32 values of the pairs of a batch.

    They are those of `make_rows`, then for each of the L layers the state of the last prompt token and the mean states
    of the chosen and of the rejected answer.
    """
    states: dict[int, Tensor] = {}

    def keep(layer: int, module: nn.Module, inputs: Any, output: Any) -> None:
        states[layer] = (output if isinstance(output, Tensor) else output[0]).flatten(0, 1).float()

    handles = [policy.layers[layer - 1].register_forward_hook(partial(keep, layer)) for layer in layers]
    try:
        forward: BatchForward = policy(batch)
    finally:
        for handle in handles:
            handle.remove()
    parts = [make_rows(forward.states, *forward.first_order(), batch)]
    for layer in layers:
        means = mean_states(states[layer], batch)
        parts += [states[layer][batch.prompt_end], *means.chunk(2)]
    return torch.cat(parts, dim=1)


def mean_states(states: Tensor, batch: PreferenceBatch) -> Tensor:
    """Compute (2B, d) mean states over the tokens of each answer, from (R T, d) states of all tokens.

    The tokens of an answer are consecutive in every layout.
    """
    first = batch.completion_end - batch.lengths + 1
    owner = torch.arange(len(first)).repeat_interleave(batch.lengths)
    starts = batch.lengths.cumsum(0) - batch.lengths
    tokens = torch.arange(len(owner)) - starts[owner] + first[owner]
    return sum_by_answer(states[tokens], owner, len(first)) / batch.lengths[:, None]
