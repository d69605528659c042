"""Random tokens of given lengths: the pairs that both sides train on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from benchmarks.gpu.lengths import Lengths
from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.data.datamodule import Stage
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.tokenization.tokens import SCHEMA, TokenStore
from lpc_lightning.types import TokenizedPair


class RandomTokens(PreferenceDataModule):
    """Training pairs of random token ids, with the lengths in a file. There are no validation or test pairs."""

    def __init__(self, lengths: str, vocabulary: int, **data: Any) -> None:
        """Keep the settings.

        Args:
            lengths: JSON file of [prompt, chosen, rejected] lengths in tokens, one entry a pair.
            vocabulary: Token ids are drawn below this number.
            data: Settings of `PreferenceDataModule`.
        """
        super().__init__(**data)
        self.lengths_file, self.vocabulary = Path(lengths), vocabulary

    def source(self, stage: Stage) -> None:
        """Return None: there are no examples behind the tokens."""
        return

    def load(self, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> TokenStore | None:
        """Return the pairs of `train`, written to the cache in the form of every other data set; else None."""
        if stage != "train":
            return None
        content = self.lengths_file.read_bytes()
        name = hashlib.sha256(content + str(self.vocabulary).encode()).hexdigest()[:32]
        folder = (self.cache_dir or self.lengths_file.parent) / "tokens" / name
        if not folder.exists():
            folder.mkdir(parents=True)
            write(json.loads(content), self.vocabulary, folder / "pairs.arrow")
        self.pairs[stage] = pairs = TokenStore(folder)
        self.reports[stage] = DataReport(kept=len(pairs))
        return pairs


def write(lengths: Lengths, vocabulary: int, path: Path) -> None:
    """Write pairs of random ids as the token cache holds them."""
    random = np.random.default_rng(0)
    pairs = []
    for number, pair in enumerate(lengths):
        prompt, chosen, rejected = (random.integers(vocabulary, size=count).tolist() for count in pair)
        pairs.append(TokenizedPair(f"pair-{number}", prompt, chosen, rejected, index=number))
    columns = {name: [getattr(pair, name) for pair in pairs] for name in SCHEMA.names}
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as stream:
        stream.write_table(pa.Table.from_pydict(columns, schema=SCHEMA))
