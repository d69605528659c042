"""Tests of benchmark runs, against `simple_evaluate`, naive log-probabilities and closed forms."""

from __future__ import annotations

import json
import logging
import os
import random
import statistics
from pathlib import Path

import lm_eval.tasks
import numpy as np
import pytest
import torch
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.benchmarks.results import read_results, scores, stderr_name, write_results
from lpc_lightning.evaluation.benchmarks.runner import run_benchmarks
from lpc_lightning.evaluation.benchmarks.shared_requests import divide_requests
from lpc_lightning.evaluation.benchmarks.tasks import PAPER_TASKS, load_tasks, local_task_manager
from tests.fixtures.processes import ForkedProcess

EXACT = {"rel": 1e-9, "abs": 1e-12}
RAISES = "def process_results(doc, results):\n    raise LookupError('no such key')\n"
SHUFFLES = """
import random
import numpy
import torch

def shuffled(doc):
    order = random.sample(range(3), 3)
    drawn = f"{numpy.random.randint(10**6)} {torch.randint(10**6, ())}"
    texts, labels = ([doc["choices"][name][place] for place in order] for name in ("text", "label"))
    return {"question": f"{doc['question']} {drawn}", "choices": {"text": texts, "label": labels}}

def process_docs(dataset):
    return dataset.map(shuffled)
"""


def evaluate_stock(lm, tasks, data_dir, **settings):
    """Return the results of lm-eval's `simple_evaluate`, for all tasks in one call."""
    loaded = [task for name in tasks for task in load_tasks(name, str(data_dir))["tasks"].values()]
    return simple_evaluate(lm, tasks=loaded, task_manager=local_task_manager(), bootstrap_iters=1000, **settings)


class RecordingLM(HFLM):
    """Stock HFLM that records its requests."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []

    def loglikelihood(self, requests, **options):
        self.calls.append([request.args for request in requests])
        return super().loglikelihood(requests, **options)

    def generate_until(self, requests, **options):
        self.calls.append([request.args for request in requests])
        return super().generate_until(requests, **options)


@pytest.fixture
def recording_lm(loud_policy):
    policy, tokenizer = loud_policy
    return RecordingLM(pretrained=policy.causal_lm, tokenizer=tokenizer, batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_fewshot": 2, "limit": 5}, {"apply_chat_template": True, "limit": 0.3}],
    ids=["own", "two shots", "chat"],
)
def test_scores_equal_simple_evaluate(settings, stock, data_dir) -> None:
    tasks = list(PAPER_TASKS) if settings else [*PAPER_TASKS, "truthfulqa_gen"]
    actual = run_benchmarks(stock, tasks, data_dir=str(data_dir), **settings)
    expected = evaluate_stock(stock, tasks, data_dir, **settings)
    assert actual.failures == {}
    assert set(actual.metrics) == set(tasks)
    for task in tasks:
        expected_metrics = {
            name.removesuffix(",none"): value for name, value in expected["results"][task].items() if "," in name
        }
        assert actual.metrics[task] == pytest.approx(expected_metrics, **EXACT)
        record = actual.record["tasks"][task]
        assert record["version"] == expected["versions"][task]
        assert record["num_fewshot"] == expected["n-shot"][task]
        assert record["higher_is_better"] == expected["higher_is_better"][task]
        assert record["items"] == expected["n-samples"][task]["effective"]
        assert record["documents"] == expected["n-samples"][task]["original"]
        assert record["limit"] == settings.get("limit")
        hashes = {sample["doc_id"]: sample["doc_hash"] for sample in expected["samples"][task]}
        assert {item["doc_id"]: item["doc_hash"] for item in actual.items if item["task"] == task} == hashes


@pytest.mark.slow
def test_num_fewshot_does_not_apply_to_truthfulqa(stock, data_dir, capsys) -> None:
    tasks = ["arc_easy", "truthfulqa_mc2", "gsm8k", "truthfulqa_mc1"]
    actual = run_benchmarks(stock, tasks, data_dir=str(data_dir), num_fewshot=3, limit=2)
    shots = {task: record["num_fewshot"] for task, record in actual.record["tasks"].items()}
    assert shots == {"arc_easy": 3, "gsm8k": 3, "truthfulqa_mc1": 0, "truthfulqa_mc2": 0}
    lines = [line for line in capsys.readouterr().err.splitlines() if "num_fewshot" in line]
    assert lines == ["num_fewshot: found 3, not used for truthfulqa_mc2, truthfulqa_mc1: their own number is 0."]
    for unused in (None, 0):
        run_benchmarks(stock, ["truthfulqa_mc1"], data_dir=str(data_dir), num_fewshot=unused, limit=1)
    assert "num_fewshot" not in capsys.readouterr().err


def test_metrics_and_errors_from_items(stock, data_dir) -> None:
    actual = run_benchmarks(stock, data_dir=str(data_dir))
    assert len(actual.items) == 12 + 12 + 12 + 11 + 11
    num_informative = 0
    for task, metrics in actual.metrics.items():
        items = [item for item in actual.items if item["task"] == task]
        assert [item["doc_id"] for item in items] == list(range(len(items)))
        for name, (value, error) in scores(metrics).items():
            values = [item["metrics"][name] for item in items]
            assert value == pytest.approx(statistics.fmean(values), **EXACT)
            assert error == pytest.approx(statistics.stdev(values) / len(values) ** 0.5, **EXACT)
            num_informative += 0 < value < 1
            if set(values) <= {0.0, 1.0}:
                assert error == pytest.approx((value * (1 - value) / (len(values) - 1)) ** 0.5, **EXACT)
    assert num_informative >= 4, "a model that is always wrong makes the test useless"


def test_response_is_logp_of_each_choice(stock, loud_policy, data_dir, documents) -> None:
    policy, tokenizer = loud_policy
    actual = run_benchmarks(stock, ["arc_easy"], data_dir=str(data_dir), limit=2)
    for item, doc in zip(
        actual.items, load_tasks("arc_easy", str(data_dir))["tasks"]["arc_easy"].eval_docs, strict=False
    ):
        prompt = tokenizer(f"Question: {doc['question']}\nAnswer:").input_ids
        expected = []
        for text in doc["choices"]["text"]:
            tokens = tokenizer(f"Question: {doc['question']}\nAnswer: {text}").input_ids
            assert tokens[: len(prompt)] == prompt
            with torch.no_grad():
                logps = policy.causal_lm(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
            positions = range(len(prompt), len(tokens))
            expected.append(sum(float(logps[position - 1, tokens[position]]) for position in positions))
        assert item["response"] == pytest.approx(expected, abs=1e-3)
        gold = doc["choices"]["label"].index(doc["answerKey"])
        assert item["metrics"]["acc"] == float(np.argmax(expected) == gold)


def test_text_answer_scored_by_every_filter(stock, data_dir) -> None:
    actual = run_benchmarks(stock, ["gsm8k"], data_dir=str(data_dir), limit=2)
    for item in actual.items:
        assert isinstance(item["response"], str)
        assert set(item["metrics"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert stderr_name("exact_match,strict-match") in actual.metrics["gsm8k"]


def test_single_item_has_no_standard_error(stock, data_dir) -> None:
    actual = run_benchmarks(stock, ["arc_easy"], data_dir=str(data_dir), limit=1)
    assert set(actual.metrics["arc_easy"]) == {"acc", "acc_norm"}
    assert scores(actual.metrics["arc_easy"])["acc"][1] is None


@pytest.mark.slow
def test_tasks_on_same_documents_run_together(recording_lm, data_dir) -> None:
    run_benchmarks(
        recording_lm, ["truthfulqa_mc1", "arc_easy", "truthfulqa_mc2", "truthfulqa_gen"], data_dir=str(data_dir)
    )
    assert [len(call) for call in recording_lm.calls] == [2 * 4 * 11, sum(3 + n % 3 for n in range(12)), 5]


def test_failing_task_does_not_stop_others(stock, data_dir, task_file, documents) -> None:
    rows = documents["arc/ARC-Easy"]["test"]
    (data_dir / "gsm8k" / "test.jsonl").write_text('{"question": "cut sh')
    unreachable = task_file("elsewhere", rows, dataset_path="example/missing-data", dataset_kwargs=None)
    broken, sound = task_file("broken", rows, RAISES), task_file("sound", rows)
    tasks = [broken, "gsm8k", "truthfulqa_mc2", unreachable, sound]
    actual = run_benchmarks(stock, tasks, data_dir=str(data_dir))
    assert set(actual.metrics) == set(actual.record["tasks"]) == {"truthfulqa_mc2", "sound"}
    assert {item["task"] for item in actual.items} == {"truthfulqa_mc2", "sound"}
    assert set(actual.failures) == {"broken", "gsm8k", unreachable}
    assert actual.failures["broken"] == "LookupError: no such key (own.py, line 2)"
    assert "JSON" in actual.failures["gsm8k"]
    assert "example/missing-data" in actual.failures[unreachable]
    alone = run_benchmarks(stock, ["truthfulqa_mc2"], data_dir=str(data_dir))
    assert actual.metrics["truthfulqa_mc2"] == alone.metrics["truthfulqa_mc2"]


def test_joint_run_loses_broken_task_only(recording_lm, task_file, documents) -> None:
    rows = documents["arc/ARC-Easy"]["test"]
    sound = task_file("sound", rows)
    data = yaml.safe_load(Path(sound).read_text())["dataset_kwargs"]
    actual = run_benchmarks(recording_lm, [task_file("broken", rows, RAISES, dataset_kwargs=data), sound])
    together, broken, alone = (len(call) for call in recording_lm.calls)
    assert together == broken + alone
    assert list(actual.failures) == ["broken"]
    assert actual.metrics == run_benchmarks(recording_lm, [sound]).metrics


def test_group_has_its_own_score(stock, task_file, documents, tmp_path) -> None:
    for size in (4, 12):
        task_file(f"part_{size}", documents["arc/ARC-Easy"]["test"][:size])
    group = {
        "group": "both",
        "task": ["part_4", "part_12"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
        "metadata": {"version": 1},
    }
    (tmp_path / "tasks" / "both.yaml").write_text(yaml.safe_dump(group))
    manager = TaskManager(include_path=tmp_path / "tasks", include_defaults=False)
    actual = run_benchmarks(stock, ["both"], manager=manager)
    assert actual.failures == {}
    four, twelve = (actual.metrics[f"part_{size}"]["acc"] for size in (4, 12))
    assert actual.metrics["both"]["acc"] == pytest.approx((4 * four + 12 * twelve) / 16)
    assert four != twelve
    assert set(actual.record["tasks"]) == {"part_4", "part_12"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupt_restores_logging_and_environment(error, stock, task_file, documents) -> None:
    code = f"def process_results(doc, results):\n    raise {error.__name__}\n"
    task = task_file("interrupted", documents["arc/ARC-Easy"]["test"], code)
    level, environment = logging.getLogger("lm_eval").level, dict(os.environ)
    with pytest.raises(error):
        run_benchmarks(stock, [task])
    assert logging.getLogger("lm_eval").level == level
    assert dict(os.environ) == environment


def test_bootstrap_does_not_fork(stock, task_file, documents, monkeypatch) -> None:
    """MCC is not a mean over items. Its error needs resamples, which lm-eval draws in forked processes by default."""
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    metric = [{"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True}]
    task = task_file("mcc", documents["arc/ARC-Easy"]["test"], metric_list=metric)
    actual = run_benchmarks(stock, [task], bootstrap_iters=200)
    assert actual.metrics["mcc"]["mcc_stderr"] > 0
    assert set(run_benchmarks(stock, [task], bootstrap_iters=0).metrics["mcc"]) == {"mcc"}


def test_fewshot_examples_depend_on_seed_only(recording_lm, data_dir) -> None:
    prompts = []
    for state, seed in enumerate((1234, 1234, 5)):
        random.seed(state)
        torch.manual_seed(state)
        actual = run_benchmarks(recording_lm, ["gsm8k"], data_dir=str(data_dir), limit=3, seed=seed)
        assert set(actual.record["seeds"].values()) == {seed}
        prompts.append([context for context, _ in recording_lm.calls[-1]])
    assert prompts[0] == prompts[1] != prompts[2]


def test_shuffled_documents_equal_simple_evaluate(stock, task_file, documents) -> None:
    """GPQA shuffles its choices while it is loaded. Each task file has an empty cache of its own."""
    rows = [{**row, "answerKey": row["choices"]["label"][0]} for row in documents["arc/ARC-Easy"]["test"]]

    def shuffling_task(name):
        path = Path(task_file(name, rows))
        path.with_name("own.py").write_text(SHUFFLES)
        path.write_text(path.read_text() + "process_docs: !function own.process_docs\n")
        return str(path)

    expected = simple_evaluate(
        stock, tasks=[shuffling_task("stock")], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    hashes = [sample["doc_hash"] for sample in expected["samples"]["stock"]]
    for state, seed in ((1, 1234), (2, 1234), (3, 5)):
        random.seed(state)
        np.random.seed(state)
        torch.manual_seed(state)
        actual = run_benchmarks(stock, [shuffling_task(f"own_{state}")], seed=seed)
        assert [item["doc_hash"] for item in actual.items] == hashes
        assert actual.record["document_seeds"] == {
            name: expected["config"][f"{'random' if name == 'python' else name}_seed"]
            for name in ("python", "numpy", "torch")
        }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "limit: found 0"),
        ({"num_fewshot": -1}, "num_fewshot: found -1"),
        ({"data_dir": "/nowhere"}, "found no file arc/ARC-Easy/train.jsonl"),
        ({"tasks": ["arc_eazy"]}, "found 'arc_eazy'"),
    ],
)
def test_run_benchmarks_rejects_settings_early(settings, message, recording_lm) -> None:
    with pytest.raises(ConfigError, match=message):
        run_benchmarks(recording_lm, **settings)
    assert recording_lm.calls == []


def test_apply_chat_template_needs_template(loud_policy, data_dir) -> None:
    policy, tokenizer = loud_policy
    lm = HFLM(pretrained=policy.causal_lm, tokenizer=tokenizer)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(ConfigError, match="no chat template"):
            run_benchmarks(lm, ["arc_easy"], data_dir=str(data_dir), apply_chat_template=True)
    finally:
        tokenizer.chat_template = template


def test_record_has_settings_and_model(stock, data_dir) -> None:
    tasks = ["truthfulqa_mc1", "truthfulqa_mc2", "gsm8k"]
    record = run_benchmarks(stock, tasks, data_dir=str(data_dir), limit=2).record
    assert json.loads(json.dumps(record)) == record
    assert record["settings"] == {
        "tasks": tasks, "data_dir": str(data_dir), "limit": 2, "num_fewshot": None,
        "apply_chat_template": False, "bootstrap_iters": 1000,
    }  # fmt: skip
    assert record["model"] == {
        "class": "HFLM", "batch_size": 4, "max_length": 1024, "mixed_precision_dtype": None, "device": "cpu",
        "dtype": "torch.float32", "chat_template_args": {},
    }  # fmt: skip
    seconds = [task_record["seconds"] for task_record in record["tasks"].values()]
    assert all(second > 0 for second in seconds)
    assert sum(seconds) < record["seconds"]


def test_divide_requests_keeps_contexts_together() -> None:
    draw = random.Random(0)
    contexts = ["".join(draw.choices("ab", k=draw.randint(1, 4))) for _ in range(60)]
    for processes in (1, 2, 3, 40):
        shares = divide_requests(contexts, processes)
        assert len(shares) == processes
        assert sorted(number for share in shares for number in share) == list(range(60))
        owners = {(contexts[number], rank) for rank, share in enumerate(shares) for number in share}
        assert len(owners) == len(set(contexts))


def score_and_write(data_dir: str, result: str) -> None:
    """Write scores of a model. On the second of several processes, text generation fails."""
    from lpc_lightning.evaluation.benchmarks.latent_lm import LatentLM
    from lpc_lightning.policy import TinyPolicy

    class FailingLM(LatentLM):
        def generate_until(self, requests, **options):
            if self.rank == 1:
                raise MemoryError("full")
            return super().generate_until(requests, **options)

    spec = TinyPolicy(width=16, layers=1, heads=2, context=1024)
    lm = FailingLM(spec.build().eval(), spec.load_tokenizer())
    folders = [Path(lm_eval.tasks.__file__).with_name(name) for name in ("arc", "truthfulqa")]
    manager = TaskManager(include_path=folders, include_defaults=False)
    tasks = ["truthfulqa_gen", "arc_easy", "truthfulqa_mc2"]
    actual = run_benchmarks(lm, tasks, data_dir=data_dir, num_fewshot=2, manager=manager)
    few = run_benchmarks(lm, ["arc_easy"], data_dir=data_dir, limit=1, manager=manager)
    write_results(Path(result), actual, {"few": few.metrics})


def one_process_of_two(rank: int, rendezvous: str, data_dir: str, result: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    score_and_write(data_dir, result)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_and_fail_together(data_dir, tmp_path) -> None:
    one, *two = (tmp_path / name for name in ("one", "first", "second"))
    processes = [
        ForkedProcess(
            one_process_of_two,
            rank,
            str(tmp_path / "rendezvous"),
            str(data_dir),
            str(result),
            log=tmp_path / f"{rank}.log",
        )
        for rank, result in enumerate(two)
    ]
    score_and_write(str(data_dir), str(one))
    codes, errors = [process.wait(240) for process in processes], [process.errors for process in processes]
    assert codes == [0, 0], errors
    expected, first, second = map(read_results, (one, *two))
    assert set(expected.metrics) == {"truthfulqa_gen", "arc_easy", "truthfulqa_mc2"}
    for actual in (first, second):
        assert set(actual.failures) == {"truthfulqa_gen"}
        assert "process 1 raised MemoryError: full" in actual.failures["truthfulqa_gen"]
        for task in ("arc_easy", "truthfulqa_mc2"):
            assert actual.metrics[task] == pytest.approx(expected.metrics[task], rel=1e-5)
        assert actual.origin["few"] == expected.origin["few"]
        scored = {(item["task"], item["doc_id"]) for item in actual.items}
        assert scored == {(item["task"], item["doc_id"]) for item in expected.items if item["task"] != "truthfulqa_gen"}
    assert first.items == second.items
    assert "Benchmark: arc_easy" in errors[0]
    assert "it/s" in errors[0]
    assert "Benchmark" not in errors[1]
    assert "it/s" not in errors[1]
