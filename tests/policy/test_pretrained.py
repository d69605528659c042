"""Tests of policies from folders: a saved model is loaded unchanged, and unsupported ones raise errors."""

from __future__ import annotations

import copy
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import T5Config

from lpc_lightning.data.batching.layouts import PaddedLayout, SharedPrefixLayout
from lpc_lightning.errors import ConfigError, UnsupportedPolicyError
from lpc_lightning.inference.opening import open_module, open_policy
from lpc_lightning.policy import CausalPolicy, LoRA, PretrainedPolicy, TinyPolicy
from lpc_lightning.types import TokenizedPair
from tests.fixtures.commands import run_command

SMOLLM2 = Path(__file__).parents[2] / "models/SmolLM2-135M-Instruct"


def save(policy: CausalPolicy, spec: TinyPolicy, folder: Path) -> str:
    # Saving removes derived fields from the config, in place.
    copy.deepcopy(policy.causal_lm).save_pretrained(folder)
    spec.load_tokenizer().save_pretrained(folder)
    return str(folder)


def test_checkpoint_as_policy_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"PK")
    with pytest.raises(
        UnsupportedPolicyError, match=r"found the checkpoint .*last\.ckpt, expected .*lpc-lightning export"
    ):
        PretrainedPolicy(str(path)).build()


@pytest.mark.parametrize("targets", [["q_proj", "nope"], ["nope"], ["attn.q_proj", "proj"]])
def test_lora_target_without_layer_is_refused(targets: list[str], tiny_spec: Callable[..., TinyPolicy]) -> None:
    message = r"target_modules: found .*, which no layer .* is called, expected .*: down_proj, .*, up_proj, v_proj\.$"
    with pytest.raises(ConfigError, match=message):
        tiny_spec(lora=LoRA(target_modules=targets)).build()


def test_lora_target_may_be_the_end_of_a_path(tiny_spec: Callable[..., TinyPolicy]) -> None:
    policy = tiny_spec(lora=LoRA(target_modules=["self_attn.q_proj", "down_proj"])).build()
    trained = {name.split(".lora_")[0] for name, weight in policy.named_parameters() if weight.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"q_proj", "down_proj"}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2", "gemma2"])
@torch.no_grad()
def test_saved_policy_is_loaded_unchanged(
    family: str,
    tmp_path: Path,
    tiny_spec: Callable[..., TinyPolicy],
    perturb: Callable[..., None],
    make_pairs: Callable[..., Any],
) -> None:
    spec = tiny_spec(family)
    original = spec.build()
    perturb(original)
    folder = save(original, spec, tmp_path / "model")
    # transformers opens every folder of Qwen2 with Qwen2's tokenizer class. The tiny tokenizer needs its own folder.
    tokenizer = str(tmp_path / "tokenizer") if family == "qwen2" else None
    spec.load_tokenizer().save_pretrained(tmp_path / "tokenizer")
    saved = PretrainedPolicy(folder, dtype="float64", tokenizer=tokenizer)
    again = saved.build()
    before, after = original.state_dict(), again.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    batch = SharedPrefixLayout(0, 40)(make_pairs([(5, 11, 7), (3, 4, 9)]))
    assert torch.equal(again(batch).logps(), original(batch).logps())
    text = "Two words, and 🥚."
    ours, theirs = saved.load_tokenizer(), spec.load_tokenizer()
    assert ours.encode(text) == theirs.encode(text)
    assert ours.chat_template == theirs.chat_template


def test_dtype_setting_overrides_file(tmp_path: Path, tiny_spec: Callable[..., TinyPolicy]) -> None:
    spec = tiny_spec("llama")
    folder = save(spec.build(), spec, tmp_path)
    assert PretrainedPolicy(folder).build().model.dtype == torch.float32
    assert PretrainedPolicy(folder, dtype="bfloat16").build().model.dtype == torch.bfloat16


def test_path_as_a_path_object(tmp_path: Path, tiny_spec: Callable[..., TinyPolicy]) -> None:
    spec = tiny_spec("llama")
    folder = save(model := spec.build(), spec, tmp_path)
    again = PretrainedPolicy(Path(folder), dtype="float64", tokenizer=Path(folder))
    assert (again.path, again.tokenizer) == (folder, folder)
    assert all(map(torch.equal, again.build().parameters(), model.parameters()))


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=32).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedPolicyError, match=r"\(t5\), an encoder-decoder, expected a decoder-only model"):
        PretrainedPolicy(str(tmp_path)).build()


@pytest.mark.parametrize(
    "path", ["models/no-such-model", "./nowhere", "/nowhere/at/all", "runs/a/export", "missing.Q4_1.gguf"]
)
def test_missing_path_is_refused(path: str) -> None:
    with pytest.raises(UnsupportedPolicyError, match=f"policy.path: found no file or folder {path}"):
        PretrainedPolicy(path).build()


def test_name_that_may_be_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a missing folder with one slash may be that of a model on the hub: the error names both."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnsupportedPolicyError) as raised:
        PretrainedPolicy("runs/no-such-export").build()
    text = str(raised.value)
    assert text.startswith(f"policy.path: found no file or folder runs/no-such-export in {Path.cwd()}, and could not ")
    assert "load it from the hub (the hub has no such name, or is out of reach): " in text
    assert "\n" not in text


def test_folder_without_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedPolicyError, match=f"found the folder {tmp_path} without config.json"):
        PretrainedPolicy(str(tmp_path)).build()


@pytest.fixture(scope="module")
def smollm2_folder() -> str:
    if not SMOLLM2.is_dir():
        pytest.skip(f"{SMOLLM2} is missing: run `lpc-lightning prepare`")
    return str(SMOLLM2)


@pytest.fixture(scope="module")
def smollm2(smollm2_folder: str) -> CausalPolicy:
    return PretrainedPolicy(smollm2_folder).build()


@pytest.mark.real
def test_dequantized_model_is_complete(smollm2: CausalPolicy) -> None:
    config = smollm2.causal_lm.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size, config.vocab_size) == (
        "llama",
        30,
        576,
        49152,
    )
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.tie_word_embeddings
    assert smollm2.causal_lm.get_input_embeddings().weight is smollm2.head.weight
    assert sum(parameter.numel() for parameter in smollm2.parameters()) == 134_515_008
    assert smollm2.takes_block_mask


@pytest.mark.slow
@pytest.mark.real
def test_rows_are_packed_in_bfloat16(smollm2_folder: str) -> None:
    """In 16 bits the states of some tokens are mostly rounding errors."""
    assert PretrainedPolicy(smollm2_folder, dtype="bfloat16").build().attends_by_segment


@pytest.mark.real
def test_chat_template_has_system_turn(smollm2_folder: str) -> None:
    tokenizer = PretrainedPolicy(smollm2_folder).load_tokenizer()
    chat = [{"role": "user", "content": "Hi?"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert rendered.endswith("<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id] == [2]


@pytest.mark.real
@pytest.mark.parametrize(
    ("question", "right", "wrong"),
    [
        ("What is the capital of France?", "The capital of France is Paris.", "The capital of France is egg."),
        ("What is 2 + 2?", "2 + 2 = 4", "2 + 2 = 9"),
        ("Say hello.", "Hello! How can I help you today?", "today help Hello? I you! can How"),
    ],
)
@torch.no_grad()
def test_pretrained_policy_prefers_sense(question: str, right: str, wrong: str, smollm2: CausalPolicy) -> None:
    tokenizer = PretrainedPolicy(str(SMOLLM2)).load_tokenizer()
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)["input_ids"]
    answers = [[*tokenizer.encode(answer), tokenizer.eos_token_id] for answer in (right, wrong)]
    pair = TokenizedPair("", prompt, *answers)
    padded, packed = (smollm2(layout([pair])).logps() for layout in (PaddedLayout(0), SharedPrefixLayout(0, 1)))
    sense, nonsense = padded.tolist()
    assert sense > nonsense + 4
    assert sense / len(answers[0]) > -2.5, "a sensible answer is not a surprise"
    torch.testing.assert_close(packed, padded, rtol=0, atol=2e-3)


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path(__file__).with_name("marker").touch()
Path("{marker}").touch()

class MarkedConfig(LlamaConfig):
    model_type = "marked"

class MarkedForCausalLM(LlamaForCausalLM):
    config_class = MarkedConfig

class MarkedTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def own_code(
    tmp_path: Path, tiny_spec: Callable[..., TinyPolicy], monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """A model folder with code of its own for config, model and tokenizer, and a file that this code writes."""
    folder, marker = tmp_path / "model", tmp_path / "marker"
    spec = tiny_spec("llama")
    save(spec.build(), spec, folder)
    (folder / "marked.py").write_text(CODE.replace("{marker}", str(marker)))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "marked"}
    config["auto_map"] = {"AutoConfig": "marked.MarkedConfig", "AutoModelForCausalLM": "marked.MarkedForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    own = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "MarkedTokenizer"}
    own["auto_map"] = {"AutoTokenizer": [None, "marked.MarkedTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # transformers would ask, and run the code after a "y"
    return folder, marker


def test_own_code_is_not_run_unless_allowed(own_code: tuple[Path, Path]) -> None:
    folder, marker = own_code
    for load in (
        PretrainedPolicy(str(folder)).load_config,
        PretrainedPolicy("x", tokenizer=str(folder)).load_tokenizer,
    ):
        with pytest.raises(UnsupportedPolicyError, match="needs Python code that comes with it, which is not run"):
            load()
    with pytest.raises(UnsupportedPolicyError, match="not run unless you allow it"):
        open_policy(str(folder))
    assert not marker.exists()
    opened = open_policy(str(folder), trust_remote_code=True)
    assert marker.exists()
    assert type(opened.policy.causal_lm).__name__ == "MarkedForCausalLM"


def test_checkpoint_cannot_allow_its_own_code(
    own_code: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, marker = own_code
    trusting = {"class_path": "lpc_lightning.policy.PretrainedPolicy"}
    trusting["init_args"] = {"path": str(folder), "trust_remote_code": True}  # type: ignore[assignment]
    settings = {"_class_path": "lpc_lightning.algorithms.DPO", "policy": trusting, "latent": None}
    file = tmp_path / "hostile.ckpt"
    torch.save({"hyper_parameters": settings, "state_dict": {}}, file)
    for open_it in (open_policy, open_module):
        with pytest.raises(UnsupportedPolicyError, match="not run unless you allow it"):
            open_it(str(file))
    flags = ["--policy=TinyPolicy", "--model=DPO", "--data=SyntheticPreferences", "--data.train_pairs=2"]
    flags += ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}", f"--data.cache_dir={tmp_path}"]
    assert run_command(capsys, "validate", f"--ckpt_path={file}", *flags).errors[0].endswith("supports.")
    assert not marker.exists()
