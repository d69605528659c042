"""Tests of LatentLM in lm-eval's evaluation: metrics of stock HFLM at z = 0, and two processes against one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lpc_lightning.evaluation.benchmarks.latent_lm import LatentLM
from lpc_lightning.inference.modeling_lpc import InferencePrior
from lpc_lightning.policy import CausalPolicy, PretrainedPolicy, TinyPolicy
from tests.evaluation.benchmarks.token_scores import WIDTH, make_prior
from tests.fixtures.processes import ForkedProcess
from tests.fixtures.real_data import DATA_DIR

ROOT = Path(__file__).parents[3]
MODEL, ARC = ROOT / "models/SmolLM2-135M-Instruct", DATA_DIR / "benchmarks/arc/ARC-Easy/test.jsonl"
WORDS = ["what", "does", "a", "stone", "do", "in", "the", "rain", "when", "your", "friend", "goes", "home", "cold"]
TASKS = {"arc_easy": ["train", "validation", "test"], "truthfulqa_mc2": ["validation"], "gsm8k": ["train", "test"]}


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


def document(task: str, draw: random.Random) -> dict[str, Any]:
    """Make a random document in the schema of the task's data set on the hub."""
    question = text(draw, draw.randrange(3, 9)) + "?"
    choices = [text(draw, draw.randrange(1, 6)) for _ in range(4)]
    if task == "arc_easy":
        labels = ["A", "B", "C", "D"]
        return {
            "id": question,
            "question": question,
            "choices": {"text": choices, "label": labels},
            "answerKey": draw.choice(labels),
        }
    if task == "gsm8k":
        return {"question": question, "answer": f"{choices[0]} #### {draw.randrange(10)}"}
    targets = {"choices": choices, "labels": [1, 1, 0, 0]}
    return {"question": question, "mc1_targets": targets, "mc2_targets": targets}


def write_tasks(folder: Path, documents: int = 7) -> list[dict[str, Any]]:
    """Write random documents as files, and return lm-eval's tasks on them."""
    draw, tasks = random.Random(0), []
    for task, splits in TASKS.items():
        files = {}
        for split in splits:
            rows = [json.dumps(document(task, draw)) for _ in range(documents)]
            files[split] = str(folder / f"{task}_{split}.jsonl")
            Path(files[split]).write_text("\n".join(rows))
        options = {"data_files": files, "cache_dir": str(folder / "cache")}
        tasks.append({"task": task, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": options})
    return [{"group": "local", "task": tasks}]


def build_policy() -> tuple[TinyPolicy, CausalPolicy]:
    spec = TinyPolicy(width=WIDTH, heads=2, context=1024, dtype="float32")
    policy, generator = spec.build(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return spec, policy


def evaluate(lm: HFLM, tasks: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return metrics by task, and the answers to each document."""
    stock = Path(lm_eval.__file__).parent / "tasks"
    manager = TaskManager(
        include_path=[str(stock / name) for name in ("arc", "truthfulqa", "gsm8k")], include_defaults=False
    )
    # No few-shot examples: lm-eval draws other examples if the documents are divided among processes.
    results = lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, num_fewshot=0)
    if results is None:
        return None
    metrics = {
        task: {name: value for name, value in task_results.items() if isinstance(value, float)}
        for task, task_results in results["results"].items()
        if task in TASKS
    }
    answers = {
        task: [
            sample["filtered_resps"]
            for sample in sorted(samples, key=lambda sample: (sample["doc_id"], sample["filter"]))
        ]
        for task, samples in results["samples"].items()
    }
    return {"metrics": metrics, "answers": answers}


def flat(answers: Any) -> list[Any]:
    return [leaf for part in answers for leaf in flat(part)] if isinstance(answers, list | tuple) else [answers]


def assert_results_close(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare log-probabilities and metrics to 1e-4, booleans and texts exactly."""
    assert actual["metrics"].keys() == expected["metrics"].keys() == TASKS.keys()
    for task in TASKS:
        assert actual["metrics"][task] == pytest.approx(expected["metrics"][task], abs=1e-4)
        ours, theirs = flat(actual["answers"][task]), flat(expected["answers"][task])
        assert [type(leaf) for leaf in ours] == [type(leaf) for leaf in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one == pytest.approx(other, abs=1e-4, rel=0) if isinstance(one, float) else one == other


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
def test_metrics_at_zero_z_equal_stock(tasks: list[dict[str, Any]]) -> None:
    spec, policy = build_policy()
    tokenizer = spec.load_tokenizer()
    stock = evaluate(HFLM(policy.causal_lm, tokenizer=tokenizer, batch_size=8), tasks)
    unshared = LatentLM(policy, tokenizer, make_prior(0.0, mode="sample"), prior_mode="mean", share_contexts=False)
    assert evaluate(unshared, tasks) == stock
    shared = evaluate(LatentLM(policy, tokenizer, make_prior(0.0, mode="sample"), prior_mode="mean"), tasks)
    assert shared is not None
    assert stock is not None
    assert_results_close(shared, stock)
    assert stock["metrics"].keys() == TASKS.keys()


def one_process_of_two(rank: int, rendezvous: str, data: str, result: str) -> None:
    """Evaluate a share of the documents. Rank 0 writes the results of all ranks."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    spec, policy = build_policy()
    lm = LatentLM(policy, spec.load_tokenizer(), make_prior(1.0, mode="sample"))
    assert (lm.rank, lm.world_size) == (rank, 2)
    number = torch.tensor(rank)
    assert lm.all_gather(number).tolist() == [0, 1]
    assert lm.all_gather(torch.tensor([rank, 5])).tolist() == [0, 5, 1, 5]
    assert lm.gather_object({"rank": rank}) == ([{"rank": 0}, {"rank": 1}] if rank == 0 else None)
    assert lm.gather_object(rank, dst=1) == ([0, 1] if rank == 1 else None)
    actual = evaluate(lm, json.loads(Path(data).read_text()))
    assert (actual is None) == (rank == 1)
    Path(result).write_text(json.dumps(actual))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_process(tasks: list[dict[str, Any]], tmp_path: Path) -> None:
    data = tmp_path / "tasks.json"
    data.write_text(json.dumps(tasks))
    results = [tmp_path / f"{rank}.json" for rank in range(2)]
    processes = [
        ForkedProcess(
            one_process_of_two,
            rank,
            str(tmp_path / "rendezvous"),
            str(data),
            str(result),
            log=tmp_path / f"{rank}.log",
        )
        for rank, result in enumerate(results)
    ]
    spec, policy = build_policy()
    alone = evaluate(LatentLM(policy, spec.load_tokenizer(), make_prior(1.0, mode="sample")), tasks)
    codes, errors = [process.wait() for process in processes], [process.errors for process in processes]
    assert codes == [0, 0], errors
    assert "Running loglikelihood requests" in errors[0]
    assert not any(bar in errors[1] for bar in ("Running", "Tokenizing inputs"))
    assert alone is not None
    assert_results_close(json.loads(results[0].read_text()), json.loads(json.dumps(alone)))
    assert json.loads(results[1].read_text()) is None


@pytest.mark.real
@pytest.mark.skipif(not (MODEL.is_dir() and ARC.is_file()), reason=f"{MODEL} or {ARC} does not exist")
def test_smollm2_arc_scores_equal_stock() -> None:
    spec = PretrainedPolicy(str(MODEL), dtype="float32")
    policy, tokenizer = spec.build(), spec.load_tokenizer()
    requests = []
    for line in ARC.read_text().splitlines()[:6]:
        question = json.loads(line)
        context = f"Question: {question['question']}\nAnswer:"
        requests += [Instance("loglikelihood", {}, (context, f" {text}"), 0) for text in question["choices"]["text"]]
    stock = HFLM(policy.causal_lm, tokenizer=tokenizer, batch_size=8).loglikelihood(requests)
    vector = InferencePrior.of({"kind": "vector", "prior_mode": "mean"}, {"vector": torch.zeros(policy.width)})
    actual = LatentLM(policy, tokenizer, vector).loglikelihood(requests)
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in stock]
    assert [logp for logp, _ in actual] == pytest.approx([logp for logp, _ in stock], abs=1e-3, rel=0)
