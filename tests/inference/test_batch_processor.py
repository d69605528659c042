"""Tests of the logits processor of whole batches, in isolation from any engine.

The data classes repeat those of vLLM V1 (`vllm/v1/sample/logits_processor/interface.py`): names, order and meaning.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import save_file
from torch import Tensor

from lpc_lightning.errors import ConfigError
from lpc_lightning.files.integrity import write_digests
from lpc_lightning.inference.batch_processor import CodeBiasProcessor
from lpc_lightning.inference.code_biases import CodeBiases

CODES, VOCABULARY = 4, 11


class MoveDirectionality(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


@dataclass
class SamplingParams:
    extra_args: dict[str, Any] | None = None


@dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: Sequence[int] = ()
    added: Sequence[tuple[int, SamplingParams, list[int] | None, list[int]]] = ()
    moved: Sequence[tuple[int, int, MoveDirectionality]] = ()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder with a table of biases and the weights of two annotators."""
    table = torch.randn(CODES, VOCABULARY, generator=torch.Generator().manual_seed(0))
    save_file({"code_biases": table}, tmp_path / "code_biases.safetensors")
    (tmp_path / "code_weights.json").write_text(json.dumps({"ann": [0.1, 0.2, 0.3, 0.4], "bob": [1, 0, 0, 0]}))
    return tmp_path


def load(folder: Path) -> CodeBiasProcessor:
    config = SimpleNamespace(model_config=SimpleNamespace(model=str(folder)))
    return CodeBiasProcessor(config, torch.device("cpu"), False)


def added_to(processor: CodeBiasProcessor, rows: int, columns: int = VOCABULARY) -> Tensor:
    return processor.apply(torch.zeros(rows, columns))


def add(row: int, **arguments: Any) -> tuple[int, SamplingParams, list[int], list[int]]:
    return row, SamplingParams(arguments or None), [1, 2], []


def test_each_request_gets_its_own_bias(folder: Path) -> None:
    processor, table = load(folder), CodeBiases.read(folder).table
    requests = [
        add(0, latent_code=2),
        add(1),
        add(2, latent_annotator="ann"),
        add(3, latent_weights=[0.5, 0, 0, 0.5]),
        add(4, latent_weights="0.5,0,0,0.5", other="kept"),
        add(5, latent_code="1"),
    ]
    processor.update_state(BatchUpdate(6, added=requests))
    mixture = (table[0] + table[3]) / 2
    annotator = 0.1 * table[0] + 0.2 * table[1] + 0.3 * table[2] + 0.4 * table[3]
    expected = torch.stack([table[2], torch.zeros(VOCABULARY), annotator, mixture, mixture, table[1]])
    torch.testing.assert_close(added_to(processor, 6), expected)
    processor.update_state(None)
    padded = added_to(processor, 6, VOCABULARY + 3)
    torch.testing.assert_close(padded, torch.nn.functional.pad(expected, (0, 3)))
    assert not processor.is_argmax_invariant()
    logits = torch.zeros(6, VOCABULARY, dtype=torch.bfloat16)
    assert processor.apply(logits) is logits


@dataclass
class Batch:
    """A persistent batch as an engine keeps it: rows without gaps, with the code of each request."""

    codes: list[int | None] = field(default_factory=list)

    def step(self, generator: random.Random) -> BatchUpdate:
        """Remove some requests, add some into the gaps or behind, close gaps by moves, and swap two rows."""
        rows: dict[int, int | None] = dict(enumerate(self.codes))
        gaps = sorted(row for row in rows if generator.random() < 0.3)
        removed = list(gaps)
        for row in removed:
            del rows[row]
        added = []
        for _ in range(generator.randint(0, 3)):
            row = gaps.pop(0) if gaps else max(rows, default=-1) + 1
            rows[row] = generator.choice([None, *range(CODES)])
            added.append(add(row) if rows[row] is None else add(row, latent_code=rows[row]))
            if row in removed:
                removed.remove(row)  # an added request replaces the one that has left
        moved = []
        while gaps and max(rows, default=-1) > gaps[0]:
            last, gap = max(rows), gaps.pop(0)
            rows[gap] = rows.pop(last)
            moved.append((last, gap, MoveDirectionality.UNIDIRECTIONAL))
        if len(rows) > 1 and generator.random() < 0.5:
            one, other = generator.sample(sorted(rows), 2)
            rows[one], rows[other] = rows[other], rows[one]
            moved.append((one, other, MoveDirectionality.SWAP))
        self.codes = [rows[row] for row in range(len(rows))]
        return BatchUpdate(len(rows), sorted(removed, reverse=True), added, moved)


def test_biases_follow_requests_that_move(folder: Path) -> None:
    """A thousand steps of an engine, against a list of the requests."""
    processor, table = load(folder), CodeBiases.read(folder).table
    batch, generator = Batch(), random.Random(0)
    sizes = set()
    for _ in range(1000):
        processor.update_state(batch.step(generator))
        sizes.add(len(batch.codes))
        expected = [torch.zeros(VOCABULARY) if code is None else table[code] for code in batch.codes]
        actual = added_to(processor, len(batch.codes))
        assert all(torch.equal(row, other) for row, other in zip(actual, expected, strict=True))
    assert len(sizes) > 5


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"latent_code": 4}, r"latent_code: found 4, expected the number of a code, 0 to 3\."),
        ({"latent_code": "x"}, r"latent_code: found 'x', expected"),
        ({"latent_weights": [1.0]}, r"latent_weights: found \[1\.0\], expected 4 finite numbers"),
        ({"latent_weights": "1,2,3,nan"}, "latent_weights: found '1,2,3,nan', expected 4 finite"),
        ({"latent_weights": 1.5}, r"latent_weights: found 1\.5, expected 4"),
        ({"latent_weights": [10**400, 0, 0, 0]}, r"latent_weights: found \[10+, 0, 0, 0\], expected 4"),
        ({"latent_annotator": ["ann"]}, r"latent_annotator: found \['ann'\], expected one of the 2 names in"),
        (
            {"latent_annotator": "eve"},
            r"latent_annotator: found 'eve', expected one of the 2 names in",
        ),
    ],
)
def test_wrong_argument_leaves_other_requests_alone(
    arguments: dict[str, Any], pattern: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    processor, biases = load(folder), CodeBiases.read(folder)
    with pytest.raises(ValueError, match=pattern):
        biases.weights(arguments)
    processor.update_state(BatchUpdate(2, added=[add(0, **arguments), add(1, latent_code=0)]))
    torch.testing.assert_close(added_to(processor, 2), torch.stack([torch.zeros(VOCABULARY), biases.table[0]]))
    assert "The request is answered by the plain policy." in caplog.text


def test_two_arguments_are_refused_before_the_engine() -> None:
    CodeBiasProcessor.validate_params(SamplingParams(None))
    CodeBiasProcessor.validate_params(SamplingParams({"latent_code": 1, "other": 2}))
    with pytest.raises(ValueError, match="extra_args: found latent_code and latent_annotator, expected at most one"):
        CodeBiasProcessor.validate_params(SamplingParams({"latent_code": 1, "latent_annotator": "ann"}))


def test_damaged_weights_of_annotators_are_refused(folder: Path) -> None:
    (folder / "code_weights.json").write_text('{"ann": [0.1')
    with pytest.raises(
        ConfigError, match=r"code_weights\.json: found no JSON .* Write it again with `lpc-lightning adapt`"
    ):
        load(folder)


def test_folder_without_a_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found no code_biases\.safetensors, expected a local folder that"):
        load(tmp_path)


@torch.no_grad()
def test_decoded_batch_equals_the_latent_model(llama: Any, prompts: list[Tensor], tmp_path: Path) -> None:
    """Greedy answers of the stock model to a batch, each request under another latent, and `generate` of our model."""
    save_file({"code_biases": llama.model.code_biases().float()}, tmp_path / "code_biases.safetensors")
    weights = [0.4, 0.0, 0.3, 0.0, 0.3]
    mixture = torch.tensor(weights).double()
    under: list[dict[str, Any]] = [{"prior_mode": 1}, {"code_weights": mixture}, {"prior_mode": 4}]
    processor = load(tmp_path)
    requests = [add(0, latent_code=1), add(1, latent_weights=weights), add(2, latent_code=4)]
    processor.update_state(BatchUpdate(3, added=requests))
    rows = [ids[None] for ids in prompts[:3]]
    for _ in range(6):
        logits = torch.cat([llama.stock(input_ids=ids).logits[:, -1] for ids in rows])
        tokens = processor.apply(logits).argmax(-1)
        rows = [torch.cat([ids, token[None, None]], dim=1) for ids, token in zip(rows, tokens, strict=True)]
    for ids, prompt, settings in zip(rows, prompts, under, strict=False):
        expected = llama.model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=6, do_sample=False,
            pad_token_id=0, **settings,
        )  # fmt: skip
        assert torch.equal(ids, expected)


def test_single_token_biases_are_the_bias(folder: Path) -> None:
    biases = CodeBiases.read(folder)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    pairs = biases.logit_bias(weights)
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1))
    biased = logits.clone()
    for token, value in pairs:
        biased[token] += value
    torch.testing.assert_close(biased.softmax(-1), (logits + weights @ biases.table).softmax(-1))
    assert biases.logit_bias(weights, most=3) == pairs[:3]
    assert [abs(value) for _, value in pairs] == sorted((abs(value) for _, value in pairs), reverse=True)


def test_table_with_a_flipped_bit_is_refused(folder: Path) -> None:
    path = folder / "code_biases.safetensors"
    write_digests(folder, {path.name: hashlib.sha256(path.read_bytes()).hexdigest()})
    assert CodeBiases.read(folder).table.shape == (CODES, VOCABULARY)
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ConfigError, match=r"code_biases.safetensors does not have the SHA-256 in .*digests.json"):
        CodeBiases.read(folder)


def test_table_survives_a_gguf_file(folder: Path) -> None:
    table = CodeBiases.read(folder).table
    path = folder / "code_biases.gguf"
    writer = GGUFWriter(path, arch="lpc-code-biases")
    writer.add_tensor("code_biases", table.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = GGUFReader(path).tensors
    assert tensor.name == "code_biases"
    assert torch.equal(torch.from_numpy(tensor.data.copy()).view(CODES, VOCABULARY), table)
