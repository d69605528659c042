"""Token lengths of preference pairs: measured of a file, or drawn from log-normal distributions.

A step costs what its lengths cost, whatever the tokens are. So a benchmark without a tokenizer needs lengths alone.

    python -m benchmarks.gpu.lengths --tokenizer models/SmolLM2-135M-Instruct --data hh.jsonl --output lengths.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Lengths = list[tuple[int, int, int]]
"""Tokens of the prompt, the chosen and the rejected answer of each pair."""


@dataclass(frozen=True)
class LengthModel:
    """Log-normal lengths of prompts and answers, cut as `too_long: truncate_answer` cuts them."""

    log_mean: tuple[float, float, float]
    """Mean of the logarithm, for prompt, chosen and rejected answer."""
    log_std: tuple[float, float, float]
    """Standard deviation of the logarithm."""
    correlation: float
    """Correlation of the logarithms of both answers. The prompt is independent of them."""
    max_length: int
    """Most tokens of a prompt with its longer answer."""

    def draw(self, pairs: int, seed: int = 0) -> Lengths:
        """Draw the lengths of `pairs` pairs."""
        random = np.random.default_rng(seed)
        prompt, shared, *own = random.standard_normal((4, pairs))
        answers = [np.sqrt(self.correlation) * shared + np.sqrt(1 - self.correlation) * each for each in own]
        normal = np.stack([prompt, *answers], axis=1)
        drawn = np.exp(np.array(self.log_mean) + np.array(self.log_std) * normal).round().astype(int)
        return cut(drawn, self.max_length)


FITTED = {
    "hh": LengthModel((4.73, 3.51, 3.47), (0.75, 0.90, 0.89), 0.28, max_length=512),
    "ultrafeedback": LengthModel((4.80, 4.94, 4.91), (0.88, 1.46, 1.33), 0.56, max_length=1024),
}
"""Fitted to the logarithms of 4080 training pairs of HH-RLHF (helpful and harmless) and of 1048 training pairs of
binarized UltraFeedback, tokenized by SmolLM2-135M-Instruct with its chat template. Means of the real pairs: 242 and 706
tokens, prompt counted once; of the drawn pairs: 239 and 671."""


def cut(lengths: np.ndarray, max_length: int) -> Lengths:
    """Limit prompts to `max_length - 1` tokens and answers to what is left behind the prompt."""
    prompts = np.clip(lengths[:, :1], 1, max_length - 1)
    answers = np.clip(lengths[:, 1:], 1, max_length - prompts)
    return [(int(prompt), int(chosen), int(rejected)) for prompt, chosen, rejected in np.hstack([prompts, answers])]


def measure(data: Path, tokenizer: str, max_length: int) -> Lengths:
    """Tokenize a file of preference pairs and return its lengths; answers are cut at `max_length`."""
    from transformers import AutoTokenizer

    from lpc_lightning.data import PreferenceData

    module = PreferenceData(
        str(data), max_length=max_length, too_long="truncate_answer", validation_share=0.0, test_split=None
    )
    pairs = module.load("train", AutoTokenizer.from_pretrained(tokenizer))
    assert pairs is not None
    return [(int(prompt), int(chosen), int(rejected)) for prompt, chosen, rejected in pairs.piece_lengths]


def read(path: Path) -> Lengths:
    """Read a file that this module wrote.

    Raises:
        ValueError: The file holds something else.
    """
    lengths = json.loads(path.read_text())
    if not lengths or any(len(each) != 3 or min(each) < 1 for each in lengths):
        raise ValueError(
            f"{path}: found other values than triples of positive numbers, expected [[prompt, chosen, rejected], ...] "
            "in tokens. Write it with `python -m benchmarks.gpu.lengths`."
        )
    return [(prompt, chosen, rejected) for prompt, chosen, rejected in lengths]


def main() -> None:
    """Write the lengths of a file of pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer of transformers")
    parser.add_argument("--data", type=Path, required=True, help="file of preference pairs, in any form of data.path")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a prompt with its longer answer")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write: numbers, no text")
    options = parser.parse_args()
    lengths = measure(options.data, options.tokenizer, options.max_length)
    options.output.write_text(json.dumps(lengths))
    print(f"{options.output}: {len(lengths)} pairs, {sum(map(sum, lengths)) / len(lengths):.0f} tokens a pair.")


if __name__ == "__main__":
    main()
