"""Tests of AnswerSamples in real runs: against generation with z in a stock model's head, and against a run without."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lpc_lightning.algorithms import DPO
from lpc_lightning.callbacks import AnswerSamples
from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.samples import read_samples, write_samples
from lpc_lightning.latent import MarginalSpace
from lpc_lightning.policy import LoRA
from lpc_lightning.seeding import derive
from tests.fixtures.training_runs import FitRun, Run

SHORT: dict[str, Any] = {"count": 2, "max_new_tokens": 4}
TRAINER: dict[str, Any] = {"max_steps": 4, "val_check_interval": 2}


@pytest.fixture
def train(fit_run: FitRun, small_policy: Callable[..., Any], tmp_path: Path) -> Callable[..., Run]:
    """Function that trains LPC-DPO for four steps, with a validation after two and four of them."""

    def run(*callbacks: Callback, latent: bool = True, reference: Any = "cached", **settings: Any) -> Run:
        space = MarginalSpace(num_codes=3, init_logit_std=1.5) if latent else None
        policy = small_policy(**settings.pop("policy", {}))
        optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)  # noqa: E731
        module = DPO(policy=policy, latent=space, reference=reference, optimizer=optimizer, latent_lr=0.05)
        return fit_run(module, callbacks=list(callbacks), **({"default_root_dir": tmp_path} | TRAINER | settings))

    return run


def greedy(model: Any, ids: list[int], tokenizer: Any, ends: list[int], z: Tensor | None = None) -> str:
    """Answer with the stock `generate`, with W z as the bias of the head."""
    model = copy.deepcopy(model).eval()
    if z is not None:
        head = model.get_output_embeddings()
        biased = nn.Linear(head.in_features, head.out_features)
        biased.weight = head.weight
        with torch.no_grad():
            biased.bias.copy_(z @ head.weight.T)
        model.set_output_embeddings(biased)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": ends, "pad_token_id": 0, "max_new_tokens": 4}
    with torch.no_grad():
        found = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)
    return str(tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)).strip()


def texts(record: dict[str, Any], decoding: str) -> dict[str, str]:
    return {each["under"]: each["text"] for each in record["answers"] if each["decoding"] == decoding}


@pytest.mark.slow
def test_samples_against_stock_generate(train: Callable[..., Run], tmp_path: Path) -> None:
    run = train(AnswerSamples(codes=[2], count=2, max_new_tokens=np.int64(4)))  # type: ignore[arg-type]
    module: Any = run.module
    records = read_samples(tmp_path)
    assert [record["step"] for record in records] == [2, 2, 4, 4]

    torch.manual_seed(derive("weights", 1))
    published = module.policy_spec.build().causal_lm
    data: Any = run.trainer.datamodule  # type: ignore[attr-defined]
    template = make_template(module.tokenizer, *data.template_settings)
    ends = sorted({template.end_id, module.tokenizer.eos_token_id})
    seen = []
    for record in records[2:]:
        ids = template.prompt_ids(record["prompt"])
        state = module.policy.causal_lm.get_decoder()(torch.tensor([ids])).last_hidden_state[:, -1].detach()
        prior = module.latent.log_prior(state).exp()[0].detach()
        codes = module.latent.codebook.weight.detach()
        assert record["prior"] == pytest.approx(prior.tolist(), abs=1e-5)
        assert texts(record, "greedy") == {
            "prior": greedy(module.policy.causal_lm, ids, module.tokenizer, ends, prior @ codes),
            "code 2": greedy(module.policy.causal_lm, ids, module.tokenizer, ends, codes[2]),
            "before training": greedy(published, ids, module.tokenizer, ends),
        }
        seen.append(record["prompt"])
    examples = data.generator.examples(6, "validation")
    assert seen == [[dict(message) for message in example.prompt] for example in examples[:2]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
@pytest.mark.parametrize("first", [True, False])
def test_samples_of_averaged_weights(first: bool, train: Callable[..., Run], tmp_path: Path) -> None:
    """A checkpoint holds the average of the weights, with which stock generation must answer the same."""
    average, samples = EMAWeightAveraging(decay=0.99), AnswerSamples(temperature=0, **SHORT)
    run = train(*([average, samples] if first else [samples, average]), Save(tmp_path), latent=False)
    module: Any = run.module
    data: Any = run.trainer.datamodule  # type: ignore[attr-defined]
    template = make_template(module.tokenizer, *data.template_settings)
    ends = sorted({template.end_id, module.tokenizer.eos_token_id})
    stored = torch.load(tmp_path / "2.ckpt", weights_only=True)
    expected = {}
    for name in ("state_dict", "current_model_state"):
        module.load_state_dict(stored[name], strict=False)
        prompts = [template.prompt_ids(record["prompt"]) for record in read_samples(tmp_path)[:2]]
        expected[name] = [greedy(module.policy.causal_lm, ids, module.tokenizer, ends) for ids in prompts]
    assert expected["state_dict"] != expected["current_model_state"]
    assert [texts(record, "greedy")["policy"] for record in read_samples(tmp_path)[:2]] == expected["state_dict"]


def test_read_samples_with_line_separators(tmp_path: Path) -> None:
    """Texts may contain every character at which Python splits lines."""
    text = "".join(chr(code) for code in range(0x3000) if len(f"a{chr(code)}b".splitlines()) > 1)
    assert len(text) > 8
    answers = [{"under": "prior", "decoding": "greedy", "text": text, "finished": True}]
    records = [{"step": 0, "prompt": [{"role": "user", "content": text}], "prior": None, "answers": answers}]
    write_samples(tmp_path, records)
    assert read_samples(tmp_path) == records


@pytest.mark.slow
def test_samples_are_logged_with_their_cost(
    train: Callable[..., Run], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        run = train(AnswerSamples(prompts=["Hello?"], **SHORT))
    records = read_samples(tmp_path)
    now = [answer for answer in records[-1]["answers"] if answer["under"] != "before training"]
    assert len({answer["under"] for answer in now}) == 3
    assert {answer["decoding"] for answer in now} == {"greedy", "drawn at temperature 1"}
    logged = run.log.with_prefix("resources/samples")
    assert sorted(logged) == [0, 2, 4]
    assert logged[4]["resources/samples_tokens"] == sum(answer["tokens"] for answer in now)
    total = sum(values["resources/samples_tokens"] for values in logged.values())
    assert f"Samples before training and at each validation (2): {total:,} tokens in" in caplog.text
    text = (tmp_path / "samples.md").read_text()
    assert text.index("## Step 4") < text.index("## Step 2")
    assert "> Hello?" in text


@pytest.mark.slow
def test_samples_in_tensorboard(train: Callable[..., Run], tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="", version="run")

    class UseBoard(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            trainer.loggers.append(board)

    train(UseBoard(), AnswerSamples(**SHORT), latent=False, max_steps=2)
    board.finalize("success")
    (events,) = (tmp_path / "run").glob("events*")
    read = EventAccumulator(str(events))
    read.Reload()
    (text,) = read.Tensors("samples/text_summary")
    assert text.step == 2
    shown = text.tensor_proto.string_val[0].decode()
    assert shown in (tmp_path / "samples.md").read_text()
    assert "| before training |" in shown


CASES: dict[str, dict[str, Any]] = {
    "marginal": {},
    "plain": {"latent": False},
    "lora": {"policy": {"lora": LoRA(rank=2, dropout=0.2)}, "reference": "live", "accumulate_grad_batches": 2},
    "mixed": {"precision": "bf16-mixed", "policy": {"gradient_checkpointing": True}},
    "compiled": {"latent": False, "max_steps": 3},  # a validation after two steps, and a step after it
}


class Compiled(Callback):
    """Compiles the layers, each shape of a batch as one program, but without code generation."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.policy.compile_layers(backend="eager", few_shapes=False)


def random_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's compiler
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the same
@pytest.mark.parametrize("case", CASES)
def test_samples_do_not_change_training(train: Callable[..., Run], case: str) -> None:
    before = [Compiled()] if case == "compiled" else []
    settings = CASES[case]
    plain = train(*before, **settings)
    states = random_states()
    watched = train(*before, AnswerSamples(**SHORT), **settings)
    torch._dynamo.reset()
    assert random_states() == states
    assert watched.losses == plain.losses
    assert all(torch.equal(plain.weights[name], value) for name, value in watched.weights.items())
    assert watched.weights.keys() == plain.weights.keys()


class Save(Checkpoint):
    """Writes a checkpoint at every validation. Lightning calls checkpoints after all other callbacks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.slow
def test_samples_of_a_resumed_run(train: Callable[..., Run], tmp_path: Path) -> None:
    train(Save(tmp_path), AnswerSamples(**SHORT))
    whole = (tmp_path / "samples.jsonl").read_bytes()
    middle = tmp_path / "2.ckpt"
    for folder in (tmp_path, tmp_path / "elsewhere"):
        train(Save(tmp_path), AnswerSamples(**SHORT), ckpt_path=middle, default_root_dir=folder)
        assert (folder / "samples.jsonl").read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "kept"),
    [({}, False), ({"reference": "live"}, True), ({"policy": {"trainable": False}}, True)],
    ids=["cached", "live", "frozen"],
)
def test_samples_of_other_prompts_after_a_resume(
    train: Callable[..., Run], tmp_path: Path, settings: dict[str, Any], kept: bool
) -> None:
    train(Save(tmp_path), AnswerSamples(**SHORT), **settings)
    first = read_samples(tmp_path)[0]
    resumed = {**settings, "ckpt_path": tmp_path / "2.ckpt"}
    text = first["prompt"][-1]["content"]
    others = AnswerSamples(prompts=[text], codes=[0], temperature=0, **SHORT)
    if kept:
        train(Save(tmp_path), others, **resumed)
    else:
        with pytest.warns(UserWarning, match="no answers to these prompts from before training"):
            train(Save(tmp_path), others, **resumed)
    (record,) = [each for each in read_samples(tmp_path) if each["step"] == 4]
    known = texts(first, "greedy")["before training"]
    assert texts(record, "greedy").get("before training") == (known if kept else None)


def test_samples_under_an_unknown_code(train: Callable[..., Run]) -> None:
    with pytest.raises(ConfigError, match=r"codes: found 3, but the latent of policy has the codes 0 to 2\."):
        train(AnswerSamples(codes=[3], **SHORT))


def test_samples_refuse_settings() -> None:
    with pytest.raises(ConfigError, match=r"AnswerSamples\.count: found 0, expected at least 1"):
        AnswerSamples(count=0)
    with pytest.raises(ConfigError, match=r"AnswerSamples\.prompts: found an empty list"):
        AnswerSamples(prompts=[])
    with pytest.raises(ConfigError, match="temperature: found -1"):
        AnswerSamples(temperature=-1)


@pytest.mark.slow
def test_samples_of_a_prompt_file(train: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("One?\nTwo?\nThree?\n")
    with pytest.warns(UserWarning, match="this run had no validation"):
        train(AnswerSamples(prompts=str(tmp_path / "prompts.txt"), **SHORT), max_steps=1, limit_val_batches=0)
    callback = AnswerSamples(prompts=str(tmp_path / "prompts.txt"), temperature=0, **SHORT)
    train(callback, latent=False, max_steps=2)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["prompt"][0]["content"] for line in lines] == ["One?", "Two?"]
    assert [answer["under"] for answer in lines[0]["answers"]] == ["policy", "before training"]
