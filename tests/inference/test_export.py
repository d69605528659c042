"""From a checkpoint to a folder that stock transformers opens, in a process that does not know this project."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lpc_lightning.algorithms import DPO
from lpc_lightning.distributed.checkpoint_io import CheckpointWriteError
from lpc_lightning.errors import CheckpointError, ConfigError
from lpc_lightning.inference.export import export
from lpc_lightning.inference.modeling_lpc import LatentCausalLM
from lpc_lightning.inference.opening import open_module, open_policy
from lpc_lightning.policy import PretrainedPolicy, UnsupportedPolicyError

pytestmark = pytest.mark.slow

CODED = ["--latent=MarginalSpace", "--latent.num_codes=5", "--latent.hidden=8", "--latent.init_logit_std=1.0"]
GEMMA = '{"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0}'
CASES: dict[str, list[str]] = {
    "codes": CODED,
    "adapter": [*CODED, "--policy.lora.rank=2"],
    "tied": [*CODED, "--policy.family=gpt2", "--latent.prior_mode=argmax"],
    "soft-cap": [*CODED, "--policy.family=gemma2", f"--policy.options={GEMMA}"],
    "gaussian": ["--latent=GaussianSpace", "--latent.num_codes=5", "--latent.init_logit_std=1.0", "--model=SimPO"],
    "bf16": [*CODED, "--trainer.precision=bf16-true"],
    "plain": [],
}
PROMPT = "Which plant needs little water?"
LATENT_FILES = {"latent.safetensors", "modeling_lpc.py", "digests.json"}
FILES = {"config.json", "generation_config.json", "model.safetensors", "README.md", "training.json", "tokenizer.json"}
FILES |= {"tokenizer_config.json", "chat_template.jinja", "digests.json"}


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(3, 1024, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.fixture(scope="module")
def exported(fitted: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each case."""
    root = tmp_path_factory.mktemp("exports")
    return {name: export(str(fitted(*flags)), str(root / name)) for name, flags in CASES.items()}


@pytest.fixture(scope="module")
def elsewhere(exported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh process without the project finds; one of the cases as a repository of the hub's cache, too."""
    root = tmp_path_factory.mktemp("elsewhere")
    snapshot = root / "hub" / "models--somebody--tiny-lpc" / "snapshots" / ("0" * 40)
    shutil.copytree(exported["codes"], snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    requested = {
        "cases": {name: name for name in exported} | {"hub": "somebody/tiny-lpc"},
        "prompt": PROMPT,
        "tokens": batch()["input_ids"].tolist(),
        "mask": batch()["attention_mask"].tolist(),
    }
    (root / "requested.json").write_text(json.dumps(requested))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HOME": str(root),
        "HF_HUB_CACHE": str(root / "hub"),
        "HF_MODULES_CACHE": str(root / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("elsewhere.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(root / "requested.json"), str(root / "outputs.pt")],
        cwd=exported["codes"].parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {"stderr": done.stderr, **torch.load(root / "outputs.pt")}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_fit_from_an_export_starts_without_its_latent(exported: dict[str, Path], fit_run: Any) -> None:
    """The policy is the stock model in the folder. The latent is lost, and the run warns."""
    policy = PretrainedPolicy(str(exported["codes"]))
    with pytest.warns(UserWarning, match="found an export with a latent in .* The latent in the export is not used"):
        run = fit_run(DPO(policy=policy), max_steps=1)
    stock = AutoModelForCausalLM.from_pretrained(exported["codes"])
    start = PretrainedPolicy(str(exported["codes"])).build().causal_lm
    assert all(torch.equal(value, start.state_dict()[name]) for name, value in stock.state_dict().items())
    assert run.trainer.global_step == 1


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_elsewhere_it_is_the_policy_with_its_latent(
    case: str, elsewhere: dict[str, Any], fitted: Callable[..., Path]
) -> None:
    """The same logits and the same text, batched and sampled too, as the checkpoint in this project."""
    found = elsewhere[case]["latent"]
    opened = open_policy(str(fitted(*CASES[case])))
    tokens, mine = batch(), opened.causal_lm
    close(found["logits"], mine(**tokens).logits)
    close(found["again"], mine(**tokens).logits)
    assert torch.equal(found["batch"], mine.generate(**tokens, max_new_tokens=6, do_sample=False))
    torch.manual_seed(7)
    assert torch.equal(found["sampled"], mine.generate(**tokens, max_new_tokens=6, do_sample=True))
    text = opened.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = mine.generate(**text, max_new_tokens=8, do_sample=False)
    assert found["text"] == opened.tokenizer.decode(answer[0, text["input_ids"].shape[1] :])
    name = type(opened.policy.causal_lm).__name__
    assert found["class"] == elsewhere[case]["half"] == (name if case == "plain" else f"Latent{name}")
    assert found["dtype"] == ("torch.bfloat16" if case == "bf16" else "torch.float32")


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_stock_transformers_opens_the_plain_policy(
    case: str, elsewhere: dict[str, Any], fitted: Callable[..., Path]
) -> None:
    found = elsewhere[case]["stock"]
    plain = open_policy(str(fitted(*CASES[case]))).policy.causal_lm
    assert found["class"] == type(plain).__name__
    close(found["logits"], plain(**batch()).logits)
    close(found["again"], plain(**batch()).logits)
    if case != "plain":
        assert (found["logits"] - elsewhere[case]["latent"]["logits"]).abs().max() > 1e-3


def test_from_the_hub_as_from_a_folder(elsewhere: dict[str, Any]) -> None:
    for way in ("stock", "latent"):
        assert torch.equal(elsewhere["hub"][way]["logits"], elsewhere["codes"][way]["logits"])


def test_elsewhere_is_elsewhere_and_quiet(elsewhere: dict[str, Any]) -> None:
    assert elsewhere["imported"] == []
    # Stock transformers finds no weight too many or too few, and nothing else to complain about.
    lines = [line for line in elsewhere["stderr"].splitlines() if line.strip()]
    assert [line for line in lines if "offline" not in line.lower()] == []


@pytest.mark.parametrize("case", CASES)
def test_model_card_code_runs(case: str, elsewhere: dict[str, Any]) -> None:
    steered = {"answer", "plain", "steer"}
    expected = {"plain": {"answer"}, "soft-cap": {"answer"}, "gaussian": steered}
    assert set(elsewhere[case]["card"]) == expected.get(case, {*steered, "table"})


def test_saving_again_writes_the_same_files(elsewhere: dict[str, Any]) -> None:
    kept = {"config.json", "generation_config.json", "model.safetensors"}
    for case in CASES:
        assert set(elsewhere[case]["files again"]) == (kept if case == "plain" else kept | LATENT_FILES)


@pytest.mark.filterwarnings("ignore:policy.path. found an export with a latent")
def test_fit_without_the_latent_of_an_export(
    exported: dict[str, Path], fitted: Callable[..., Path], tmp_path: Path
) -> None:
    """The export of such a fit is a plain model, whichever way the fit takes the policy from the first export."""
    for policy in (["TrainedPolicy", "--policy.keep_latent=false"], ["PretrainedPolicy"]):
        kind, *settings = policy
        checkpoint = fitted(f"--policy={kind}", f"--policy.path={exported['codes']}", *settings)
        folder = export(str(checkpoint), str(tmp_path / kind))
        assert not {"lpc", "auto_map"} & set(json.loads((folder / "config.json").read_text()))
        assert open_policy(str(folder)).kind == "model"


def test_plain_model_of_an_export_is_saved_alone(exported: dict[str, Path], tmp_path: Path) -> None:
    latent = LatentCausalLM.from_pretrained(exported["codes"])
    latent.config.auto_map |= {"AutoConfig": "name/of_base--configuration_base.Config"}
    latent.plain_causal_lm().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "lpc" not in config
    assert config["auto_map"] == {"AutoConfig": "name/of_base--configuration_base.Config"}
    assert latent.config.lpc == {"kind": "discrete", "num_codes": 5, "prior_mode": "mean"}


# What is in the folder


def test_files(exported: dict[str, Path]) -> None:
    for case, folder in exported.items():
        assert {file.name for file in folder.iterdir()} == (FILES if case == "plain" else FILES | LATENT_FILES)
        assert {oct(file.stat().st_mode) for file in folder.iterdir()} == {oct((folder / "config.json").stat().st_mode)}
    assert {each.name for each in exported["codes"].parent.iterdir()} == set(CASES)  # nothing is left beside them


def test_config(exported: dict[str, Path]) -> None:
    config = json.loads((exported["codes"] / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_lpc.LatentCausalLM"}
    assert config["lpc"] == {"kind": "discrete", "num_codes": 5, "prior_mode": "mean"}
    plain = json.loads((exported["plain"] / "config.json").read_text())
    assert not {"lpc", "auto_map"} & set(plain)


def test_export_holds_the_checkpoint_weights(exported: dict[str, Path], checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    weights = load_file(exported["codes"] / "model.safetensors")
    assert {f"policy.model.{name}" for name in weights} == {name for name in state if name.startswith("policy.")}
    assert all(torch.equal(state[f"policy.model.{name}"], value) for name, value in weights.items())
    latent = load_file(exported["codes"] / "latent.safetensors")
    assert torch.equal(latent.pop("codebook"), state["latent.codebook.weight"])
    assert latent.keys() == {f"prior.{layer}.{what}" for layer in ("first", "second") for what in ("weight", "bias")}
    assert state["latent.prior.moments.pairs"] > 0
    deviation = open_module(str(checkpoint)).latent.prior.moments.deviation  # type: ignore[union-attr, operator]
    weight = state["latent.prior.first.weight"] / deviation
    bias = state["latent.prior.first.bias"] - weight @ state["latent.prior.moments.mean"]
    assert torch.equal(latent.pop("prior.first.weight"), weight)
    assert torch.equal(latent.pop("prior.first.bias"), bias)
    assert all(torch.equal(state[f"latent.{name}"], value) for name, value in latent.items())


def test_an_adapter_is_merged(exported: dict[str, Path], fitted: Callable[..., Path]) -> None:
    state = torch.load(fitted(*CASES["adapter"]), weights_only=True)["state_dict"]
    weights = load_file(exported["adapter"] / "model.safetensors")
    assert not [name for name in weights if "lora" in name or "base_layer" in name]
    place = "layers.0.self_attn.q_proj"
    down, up = (next(value for name, value in state.items() if f"{place}.lora_{side}" in name) for side in ("A", "B"))
    base = open_policy(str(fitted(*CASES["adapter"]))).policy.causal_lm.get_parameter(
        f"model.{place}.base_layer.weight"
    )
    expected = base + 32 / 2 * up @ down  # alpha / rank
    torch.testing.assert_close(weights[f"model.{place}.weight"], expected, rtol=1e-6, atol=1e-7)
    assert (expected - base).abs().max() > 1e-4


def test_tied_weights_are_stored_once(exported: dict[str, Path]) -> None:
    assert json.loads((exported["tied"] / "config.json").read_text())["tie_word_embeddings"]
    assert "lm_head.weight" not in load_file(exported["tied"] / "model.safetensors")


def test_half_precision(
    checkpoint: Path, fitted: Callable[..., Path], exported: dict[str, Path], tmp_path: Path
) -> None:
    folder = export(str(checkpoint), str(tmp_path / "half"), dtype="bfloat16")
    full, half = (load_file(place / "model.safetensors") for place in (exported["codes"], folder))
    assert all(torch.equal(half[name], value.bfloat16()) for name, value in full.items())
    assert {value.dtype for value in load_file(folder / "latent.safetensors").values()} == {torch.float32}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    merged = load_file(export(str(fitted(*CASES["adapter"])), str(tmp_path / "lora"), "bfloat16") / "model.safetensors")
    # Merged first and rounded then.
    assert all(
        torch.equal(merged[name], value.bfloat16())
        for name, value in load_file(exported["adapter"] / "model.safetensors").items()
    )


def test_dropout_is_as_published(fitted: Callable[..., Path], tmp_path: Path) -> None:
    path = fitted(*CODED, '--policy.options={"attention_dropout": 0.25}')
    assert open_policy(str(path)).policy.causal_lm.config.attention_dropout == 0
    folder = export(str(path), str(tmp_path / "out"))
    assert json.loads((folder / "config.json").read_text())["attention_dropout"] == 0.25


def test_answers_end_where_training_ended_them(fitted: Callable[..., Path], tmp_path: Path) -> None:
    """A base model's own end token is another one than its chat template's."""
    base = export(str(fitted()), str(tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    end, other = tokenizer.eos_token_id, tokenizer.bos_token_id
    tokenizer.eos_token = tokenizer.bos_token
    tokenizer.save_pretrained(base)
    config = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": other}))
    (base / "digests.json").unlink()
    pretrained = ["--policy=PretrainedPolicy", f"--policy.path={base}"]
    folder = export(str(fitted(*CODED, *pretrained)), str(tmp_path / "out"))
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [other, end]
    assert json.loads((base / "generation_config.json").read_text())["eos_token_id"] == other


def test_prior_mode_is_a_setting(checkpoint: Path, tmp_path: Path, exported: dict[str, Path]) -> None:
    folder = export(str(checkpoint), str(tmp_path / "out"), prior_mode=3)
    assert json.loads((folder / "config.json").read_text())["lpc"]["prior_mode"] == 3
    fixed, free = open_policy(str(folder)), open_policy(str(exported["codes"]))
    with torch.no_grad():
        assert torch.equal(fixed.causal_lm(**batch()).logits, free.causal_lm(**batch(), prior_mode=3).logits)


def test_a_table_of_codes_on_request(checkpoint: Path, tmp_path: Path) -> None:
    folder = export(str(checkpoint), str(tmp_path / "out"), code_biases=True)
    table = load_file(folder / "code_biases.safetensors")["code_biases"]
    opened = open_policy(str(checkpoint))
    torch.testing.assert_close(table, opened.prior.codebook @ opened.policy.head.weight.T)
    assert "`code_biases.safetensors` holds that table" in (folder / "README.md").read_text()


@torch.no_grad()
def test_the_suite_opens_its_own_exports(checkpoint: Path, exported: dict[str, Path]) -> None:
    trained, opened = open_policy(str(checkpoint)), open_policy(str(exported["codes"]))
    assert (opened.kind, opened.name) == ("export", "codes")
    assert opened.prior.settings == trained.prior.settings
    assert torch.equal(opened.causal_lm(**batch()).logits, trained.causal_lm(**batch()).logits)
    assert opened.origin["latent"] == {"kind": "discrete", "num_codes": 5, "prior_mode": "mean"}
    assert opened.origin["training"]["algorithm"] == "DPO"
    assert opened.origin["training"]["step"] == 2
    assert json.loads(json.dumps(opened.origin)) == opened.origin
    assert open_policy(str(exported["plain"])).kind == "model"


# Refused, and left whole


def test_settings_that_the_checkpoint_cannot_have(fitted: Callable[..., Path], tmp_path: Path) -> None:
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("codes", {"prior_mode": 5}, "prior_mode: found 5, expected one of mean, sample, argmax, or .* 0 to 4"),
        ("plain", {"prior_mode": "mean"}, "prior_mode: found 'mean' for a policy that was trained without a latent"),
        ("plain", {"code_biases": True}, "code_biases: the policy was trained without a latent"),
        ("gaussian", {"code_biases": True}, "code_biases: a latent of kind gaussian has no codes"),
        ("soft-cap", {"code_biases": True}, "found a head that is not linear"),
    ]
    for case, requested, outcome in refused:
        with pytest.raises(ConfigError, match=outcome):
            export(str(fitted(*CASES[case])), str(tmp_path / "out"), **requested)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="found no file"):
        export("none.ckpt", str(tmp_path / "out"))


def test_a_folder_that_is_not_free(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"output: .*/file is a file, expected a folder"):
        export(str(checkpoint), str(tmp_path / "file"))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    (mine / "config.json").write_text("{}")
    (mine / "training.json").write_text('{"policy": "mine"}')  # a common name is no sign of an export
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"output: .*/mine is not empty and no earlier export"):
            export(str(checkpoint), str(mine), overwrite=overwrite)
    assert (mine / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert (export(str(checkpoint), str(tmp_path / "empty")) / "config.json").is_file()


def test_export_replaces_only_on_request(checkpoint: Path, fitted: Callable[..., Path], tmp_path: Path) -> None:
    folder = export(str(checkpoint), str(tmp_path / "out"))
    with pytest.raises(
        ConfigError, match=r"output: .*/out holds an earlier export. Expected another folder, or --over"
    ):
        export(str(fitted()), str(folder))
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"output: found notes\.txt in .*/out, which export has not written"):
        export(str(fitted()), str(folder), overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    export(str(fitted()), str(folder), overwrite=True)
    assert {file.name for file in folder.iterdir()} == FILES
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_export_through_a_link_keeps_the_link(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    export(str(checkpoint), str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_no_local_path_is_published(exported: dict[str, Path], fitted: Callable[..., Path]) -> None:
    roots = [str(folder) for folder in (exported["codes"].parent, fitted(*CASES["codes"]).parents[2])]
    for folder in exported.values():
        for file in folder.iterdir():
            assert not [root for root in roots if root.encode() in file.read_bytes()]
    origin = json.loads((exported["codes"] / "training.json").read_text())
    assert origin["path"] == "version_0/checkpoints/best.ckpt"


@pytest.fixture
def copied(exported: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of an export that may be damaged."""
    return Path(shutil.copytree(exported["codes"], tmp_path / "copied"))


def flip(file: Path, share: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(share * (len(content) - 1))] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_in_an_export_is_refused(copied: Path) -> None:
    for name in ("latent.safetensors", "model.safetensors", "tokenizer.json", "modeling_lpc.py"):
        for share in (0.1, 0.9):
            flip(copied / name, share)
            with pytest.raises(UnsupportedPolicyError, match=rf"^{copied / name} does not have the SHA-256 in"):
                open_policy(str(copied))
            flip(copied / name, share)
    flip(copied / "README.md", 0.5)  # people write a licence into it
    assert open_policy(str(copied)).prior is not None
    flip(copied / "tokenizer.json", 0.5)
    with pytest.raises(UnsupportedPolicyError, match=r"policy.tokenizer: .*tokenizer.json does not have the SHA-256"):
        PretrainedPolicy("any", tokenizer=str(copied)).load_tokenizer()


def test_an_edited_config_of_an_export_is_reported(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.warns(UserWarning, match=r"policy.path: config.json in .*copied changed after the folder was written"):
        assert open_policy(str(copied)).policy.causal_lm.config.rms_norm_eps == 0.5


def test_an_export_without_digests_opens(copied: Path) -> None:
    (copied / "digests.json").unlink()
    assert open_policy(str(copied)).prior is not None
    assert LatentCausalLM.from_pretrained(copied).latent_prior is not None


def test_the_model_of_an_export_checks_its_weights(copied: Path, tmp_path: Path) -> None:
    """Without this project, and for a folder that the model has saved itself. The stock model is not checked."""
    LatentCausalLM.from_pretrained(copied).save_pretrained(tmp_path / "again")
    for folder in (copied, tmp_path / "again"):
        for name in ("latent.safetensors", "model.safetensors"):
            flip(folder / name, 0.9)
            with pytest.raises(ValueError, match=rf"{name} does not have the SHA-256 in digests.json"):
                LatentCausalLM.from_pretrained(folder)
            flip(folder / name, 0.9)
        assert LatentCausalLM.from_pretrained(folder).latent_prior is not None


def test_a_full_disk_leaves_the_earlier_export_whole(checkpoint: Path, tmp_path: Path) -> None:
    folder = export(str(checkpoint), str(tmp_path / "out"))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        with pytest.raises(
            CheckpointWriteError, match=r"output: could not write .*/out: .*Expected a folder with enough space"
        ):
            export(str(checkpoint), str(folder), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_the_model_refuses_to_be_saved_by_halves(fitted: Callable[..., Path], tmp_path: Path, llama: Any) -> None:
    adapted = open_policy(str(fitted(*CASES["adapter"]))).causal_lm
    with pytest.raises(ValueError, match="save_pretrained: found an adapter in the model, expected it merged"):
        adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="save_pretrained: found push_to_hub, expected a local save"):
        llama.model.save_pretrained(tmp_path, push_to_hub=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_its_latent_is_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported["codes"], tmp_path / "out")
    (folder / "latent.safetensors").unlink()
    with pytest.raises(UnsupportedPolicyError, match=r"out is incomplete .*latent\.safetensors"):
        open_policy(str(folder))
    assert AutoModelForCausalLM.from_pretrained(folder) is not None
    (folder / "digests.json").unlink()
    with pytest.raises(UnsupportedPolicyError, match=r"out: found the settings of a latent .* remove `lpc` and `auto_"):
        open_policy(str(folder))


@pytest.mark.parametrize("content", ["", "[]", '{"algorithm": "DPO"'])
def test_export_record_that_is_no_object_is_refused(content: str, copied: Path) -> None:
    (copied / "digests.json").unlink()
    (copied / "training.json").write_text(content)
    with pytest.raises(UnsupportedPolicyError, match=r"training\.json: found .* Export the checkpoint again"):
        open_policy(str(copied))


# Results of the run


@pytest.fixture
def run(fitted: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a run folder without a latent, whose files may be changed."""
    return Path(shutil.copytree(fitted().parents[1], tmp_path / "runs" / "version_0"))


def card(checkpoint: Path) -> str:
    return (export(str(checkpoint), str(checkpoint.parent / "exported")) / "README.md").read_text()


@pytest.mark.parametrize("content", ["", '{"steps": 1, "validation_after"', "[]"])
def test_export_of_a_run_with_damaged_summary(content: str, run: Path) -> None:
    (run / "summary.json").write_text(content)
    with pytest.warns(UserWarning, match=r"version_0/summary\.json: found .* The model card is without it"):
        text = card(run / "checkpoints" / "best.ckpt")
    assert "None lay in the run's folder when this was exported." in text


def test_export_shows_benchmarks_of_its_run_only(run: Path) -> None:
    """Other runs lie beside a checkpoint outside a run folder. The results of a cell have another form."""
    checkpoint = run / "checkpoints" / "best.ckpt"
    for folder, metrics in ((run / "of_run", {"copa": {"acc": 0.625}}), (run / "cell", {"val/loss": 0.5})):
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps({"metrics": metrics}))
    assert "| copa | acc | 0.625 |" in card(checkpoint)
    (run / "summary.json").unlink()
    alone = run.parent / "mine.ckpt"
    shutil.copy(checkpoint, alone)
    assert "None lay in the run's folder when this was exported." in card(alone)
