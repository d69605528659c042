"""The pairs that both sides train on, in the order in which our loader draws them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from lpc_lightning.data import DataError, PreferenceData
from lpc_lightning.types import TokenizedPair


def write_pairs(model: str, data: dict[str, Any], seed: int, steps: int, output: Path) -> None:
    """Write the tokenized pairs of each step as JSON lines, and beside them what there is to compute.

    Args:
        model: Folder of the policy.
        data: Settings of `PreferenceData`.
        seed: Seed of the order (`seed_everything`).
        steps: How many.
        output: File to write.

    Raises:
        DataError: The data cannot be read, or holds fewer pairs.
    """
    module = PreferenceData(**data)
    store = module.load("train", AutoTokenizer.from_pretrained(model))
    assert store is not None
    batches = list(module.training_batches(store, seed))[:steps]
    if len(batches) < steps:
        raise DataError(
            f"{data['path']}: found {len(store)} pairs to train on, expected {steps} batches of {module.batch_size}. "
            "Take fewer steps, smaller batches, or a larger file."
        )
    config = AutoConfig.from_pretrained(model).get_text_config()
    with output.open("w") as file:
        for batch in batches:
            pairs = [store[number] for number in batch]
            line = {"pairs": [asdict(pair) for pair in pairs], "work": asdict(work(pairs, config))}
            file.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class Work:
    """The least that a step has to compute: every prompt once, the head at answer tokens, nothing twice."""

    tokens: int
    """Prompts once, and both answers."""
    answers: int
    """Answer tokens."""
    forward_flops: float
    """Floating-point operations of the matrix products of a forward pass. Backward is twice as many: two products for
    each of forward. A live reference adds a forward pass."""


def work(pairs: list[TokenizedPair], config: Any) -> Work:
    """Count the work of a step on `pairs` for a Llama-like model."""
    tokens = answers = seen = 0
    for pair in pairs:
        prompt, completions = len(pair.prompt_ids), (len(pair.chosen_ids), len(pair.rejected_ids))
        tokens += prompt + sum(completions)
        answers += sum(completions)
        seen += prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in completions)
    d, heads = config.hidden_size, config.num_attention_heads
    width = getattr(config, "head_dim", None) or d // heads
    kv = getattr(config, "num_key_value_heads", heads)
    layer = d * width * (2 * heads + 2 * kv) + 3 * d * config.intermediate_size
    forward = 2 * config.num_hidden_layers * (layer * tokens + 2 * heads * width * seen)
    forward += 2 * d * config.vocab_size * answers
    return Work(tokens, answers, float(forward))


def main() -> None:
    """`python -m benchmarks.workload '{"model": ...}' pairs.jsonl`, in a process of its own: it needs torch."""
    settings, output = sys.argv[1:]
    try:
        write_pairs(**json.loads(settings), output=Path(output))
    except DataError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
