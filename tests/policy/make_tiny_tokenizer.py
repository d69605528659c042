"""Make `tiny_tokenizer.json` again, by `python tests/policy/make_tiny_tokenizer.py`."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel

from lpc_lightning.data.synthetic import PreferenceGenerator
from lpc_lightning.policy.tiny import TOKENIZER

TOKENS = 1024


def main() -> None:
    """Train byte-level BPE on the built-in pairs. Its alphabet has all bytes, so that it encodes any text."""
    examples = PreferenceGenerator(deciding="visible", seed=0).examples(4000)
    texts = (text for example in examples for text in (example.prompt[-1]["content"], example.chosen, example.rejected))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(TOKENIZER), pretty=False)


if __name__ == "__main__":
    main()
