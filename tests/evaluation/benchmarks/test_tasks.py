"""Tests of tasks from local files, against lm-eval's own tasks, and of errors for missing tasks and data."""

from __future__ import annotations

import os
import random
import socket

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.benchmarks.checks import check_tasks
from lpc_lightning.evaluation.benchmarks.tasks import (
    LOCAL_DATA,
    PAPER_TASKS,
    DataUnreachableError,
    load_tasks,
    local_task_manager,
    no_network,
    task_manager,
)
from tests.fixtures.real_data import DATA_DIR

REAL = DATA_DIR / "benchmarks"


@pytest.fixture
def stock_task(monkeypatch, documents):
    """Function that loads lm-eval's own task. The hub, which tests cannot reach, is replaced by a table of rows."""
    hub = {data.hub: documents[data.folder] for data in LOCAL_DATA.values()}

    def load(path, name, **options):
        assert not options
        splits = hub[f"{path}, {name}"]
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

    def make(name):
        with monkeypatch.context() as patch:
            patch.setattr(datasets, "load_dataset", load)
            return task_manager().load([name])["tasks"][name]

    return make


@pytest.fixture
def calls(monkeypatch):
    """Host names that were looked up. New names are appended during the test."""
    hosts = []

    def refuse(host, *_, **__):
        hosts.append(host)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return hosts


def requests(task, fewshot):
    task.set_config("num_fewshot", fewshot)
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    return [(instance.request_type, instance.doc_id, instance.idx, instance.args) for instance in task.instances]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LOCAL_DATA))
def test_local_task_equals_stock_task(name, stock_task, data_dir) -> None:
    actual, expected = load_tasks(name, str(data_dir))["tasks"][name], stock_task(name)
    assert actual.VERSION == expected.VERSION
    settings, stock_settings = actual.dump_config(), expected.dump_config()
    for key in ("dataset_path", "dataset_name", "dataset_kwargs"):
        settings.pop(key, None)
        stock_settings.pop(key, None)
    assert settings == stock_settings
    assert list(actual.eval_docs) == list(expected.eval_docs)
    own = expected.get_config("num_fewshot") or 0
    for fewshot in {0, own, 3}:
        assert requests(actual, fewshot) == requests(expected, fewshot)
    for doc in expected.eval_docs:
        assert actual.doc_to_target(doc) == expected.doc_to_target(doc)
    # Filters that extract an answer from a text, and scores.
    text = expected.OUTPUT_TYPE == "generate_until"
    for task in (actual, expected):
        for instance in task.instances:
            instance.resps = [f"#### {instance.doc_id}"] if text else [(-float(len(instance.args[1])), False)]
        task.apply_filters()
    scores = [
        [
            task.process_results(
                doc, [instance.filtered_resps[key] for instance in task.instances if instance.doc_id == number]
            )
            for key in task.instances[0].filtered_resps
            for number, doc in enumerate(task.eval_docs)
        ]
        for task in (actual, expected)
    ]
    assert scores[0] == scores[1]
    assert actual.higher_is_better() == expected.higher_is_better()


def test_load_tasks_keeps_random_state(data_dir) -> None:
    draws = []
    for names in (), ("arc_easy",):
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)
        for name in names:
            load_tasks(name, str(data_dir))
        draws.append((random.random(), np.random.random(), float(torch.rand(()))))
    assert draws[0] == draws[1]


def test_index_of_tasks_is_built_once() -> None:
    assert task_manager() is task_manager(index=True) is task_manager(True)
    assert local_task_manager() is local_task_manager()


def test_local_index_has_all_local_tasks() -> None:
    assert set(LOCAL_DATA) <= set(local_task_manager().all_tasks)


def test_prompt_text_of_arc_easy(data_dir, documents) -> None:
    task = load_tasks("arc_easy", str(data_dir))["tasks"]["arc_easy"]
    first = documents["arc/ARC-Easy"]["test"][0]
    all_requests = requests(task, 1)
    prompts = {args[0] for _, doc_id, _, args in all_requests if doc_id == 0}
    shots = []
    for row in documents["arc/ARC-Easy"]["train"]:
        answer = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))[row["answerKey"]]
        shots.append(f"Question: {row['question']}\nAnswer: {answer}")
    assert len(prompts) == 1
    assert prompts.pop() in {f"{shot}\n\nQuestion: {first['question']}\nAnswer:" for shot in shots}
    assert [args[1] for _, doc_id, _, args in all_requests if doc_id == 0] == [
        f" {text}" for text in first["choices"]["text"]
    ]


def test_versions_and_fewshot_are_published_ones(data_dir) -> None:
    expected = {
        "arc_easy": (1.0, None), "arc_challenge": (1.0, None), "gsm8k": (3.0, 5),
        "truthfulqa_mc1": (2.0, 0), "truthfulqa_mc2": (3.0, 0),
    }  # fmt: skip
    tasks = {name: load_tasks(name, str(data_dir))["tasks"][name] for name in PAPER_TASKS}
    assert {name: (task.VERSION, task.get_config("num_fewshot")) for name, task in tasks.items()} == expected


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="no $LPC_DATA_DIR/benchmarks")
def test_real_files_have_published_sizes() -> None:
    check_tasks(list(LOCAL_DATA), str(REAL))
    sizes = {name: len(load_tasks(name, str(REAL))["tasks"][name].eval_docs) for name in PAPER_TASKS}
    assert sizes == {
        "arc_easy": 2376, "arc_challenge": 1172, "gsm8k": 1319, "truthfulqa_mc1": 817, "truthfulqa_mc2": 817,
    }  # fmt: skip


@pytest.mark.parametrize("name", list(LOCAL_DATA))
def test_check_tasks_names_missing_file(name, data_dir) -> None:
    check_tasks([name], str(data_dir))
    for file in LOCAL_DATA[name].files(data_dir).values():
        text = file.read_bytes()
        file.unlink()
        with pytest.raises(ConfigError) as error:
            check_tasks(["arc_easy", name], str(data_dir))
        assert f"found no file {file.relative_to(data_dir)} for task" in str(error.value)
        assert f"in {data_dir}" in str(error.value)
        assert LOCAL_DATA[name].hub in str(error.value)
        file.write_bytes(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tasks", "local", "error"),
    [
        ([], False, "tasks: found none"),
        (["arc_eazy"], False, "found 'arc_eazy', which is not an lm-eval task, expected arc_easy"),
        (["qqqqqqqq"], False, "expected a task name such as arc_easy, arc_challenge"),
        (["gsm8k", "truthfulqa_mc3"], True, "found 'truthfulqa_mc3' with data_dir, expected truthfulqa_mc"),
        (["hellaswag"], True, "found 'hellaswag' with data_dir"),
        (["nowhere.yaml"], True, "found 'nowhere.yaml'"),
    ],
)
def test_check_tasks_suggests_similar_names(tasks, local, error, data_dir) -> None:
    with pytest.raises(ConfigError, match=error):
        check_tasks(tasks, str(data_dir) if local else None)


@pytest.mark.slow
def test_check_tasks_accepts_groups_tags_files(task_file, documents) -> None:
    check_tasks(["mmlu", "ai2_arc", "hellaswag", task_file("mine", documents["arc/ARC-Easy"]["test"])])


@pytest.mark.slow
def test_changed_file_with_same_time_is_reread(data_dir) -> None:
    file = data_dir / "gsm8k" / "test.jsonl"
    before = file.stat()
    first = list(load_tasks("gsm8k", str(data_dir))["tasks"]["gsm8k"].eval_docs)
    file.write_text(file.read_text().replace("what is", "how much"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = list(load_tasks("gsm8k", str(data_dir))["tasks"]["gsm8k"].eval_docs)
    assert [doc["question"] for doc in second] == [doc["question"].replace("what is", "how much") for doc in first]
    assert second != first


def test_local_tasks_use_no_network_and_no_cache(calls, data_dir, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in LOCAL_DATA:
        load_tasks(name, str(data_dir))
    assert calls == []
    assert not (tmp_path / "cache").exists()
    # `datasets` itself does use both, so the two assertions above can fail.
    datasets.load_dataset("json", data_files={"test": str(data_dir / "gsm8k" / "test.jsonl")})
    assert calls
    assert (tmp_path / "cache").exists()


def test_unreachable_hub_error_names_files(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataUnreachableError) as error:
        load_tasks("gsm8k")
    assert "data of gsm8k (openai/gsm8k, main)" in str(error.value)
    assert "--data_dir FOLDER, where FOLDER contains gsm8k/train.jsonl, gsm8k/test.jsonl" in str(error.value)
    # `datasets` did not retry for half a minute.
    assert "OfflineModeIsEnabled" in str(error.value)
    with pytest.raises(DataUnreachableError, match="Copy the Hugging Face cache"):
        load_tasks("hellaswag")


def test_no_network_ends_with_block() -> None:
    modules = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]

    def fail():
        with no_network():
            raise KeyError(*(module.HF_HUB_OFFLINE for module in modules))

    with pytest.raises(KeyError, match="True, True"):
        fail()
    assert [module.HF_HUB_OFFLINE for module in modules] == before


def test_progress_bar_setting_is_restored(data_dir) -> None:
    assert not datasets.are_progress_bars_disabled()
    load_tasks("gsm8k", str(data_dir))
    assert not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        load_tasks("gsm8k", str(data_dir))
        assert datasets.are_progress_bars_disabled()
    finally:
        datasets.enable_progress_bars()
