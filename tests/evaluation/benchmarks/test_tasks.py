"""Tasks from local files against lm-eval's own, and what is said of tasks and data that are not there."""

from __future__ import annotations

import os
import socket

import datasets
import huggingface_hub
import pytest

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.benchmarks.checks import check_tasks
from lpc_lightning.evaluation.benchmarks.tasks import (
    LOCAL_DATA,
    PAPER_TASKS,
    DataUnreachableError,
    load_tasks,
    no_network,
    task_manager,
)
from tests.fixtures.real_data import DATA_DIR

REAL = DATA_DIR / "benchmarks"


@pytest.fixture
def stock_task(monkeypatch, documents):
    """lm-eval's task as `TaskManager` gives it, except that the hub (which no test can reach) is a table of rows."""
    hub = {each.hub: documents[each.folder] for each in LOCAL_DATA.values()}

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
    """Attempts to look up a host."""
    made = []

    def refuse(host, *_, **__):
        made.append(host)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return made


def requests(task, fewshot):
    task.set_config("num_fewshot", fewshot)
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    return [(each.request_type, each.doc_id, each.idx, each.args) for each in task.instances]


@pytest.mark.parametrize("name", list(LOCAL_DATA))
def test_a_task_from_files_is_the_stock_task_but_for_its_data(name, stock_task, data_dir) -> None:
    found, expected = load_tasks(name, str(data_dir))["tasks"][name], stock_task(name)
    assert found.VERSION == expected.VERSION
    settings, stock_settings = found.dump_config(), expected.dump_config()
    for key in ("dataset_path", "dataset_name", "dataset_kwargs"):
        settings.pop(key, None)
        stock_settings.pop(key, None)
    assert settings == stock_settings
    assert list(found.eval_docs) == list(expected.eval_docs)
    own = expected.get_config("num_fewshot") or 0
    for fewshot in {0, own, 3}:
        assert requests(found, fewshot) == requests(expected, fewshot)
    for doc in expected.eval_docs:
        assert found.doc_to_target(doc) == expected.doc_to_target(doc)
    # The filters that read an answer out of a text, and the scores.
    text = expected.OUTPUT_TYPE == "generate_until"
    for task in (found, expected):
        for instance in task.instances:
            instance.resps = [f"#### {instance.doc_id}"] if text else [(-float(len(instance.args[1])), False)]
        task.apply_filters()
    scores = [
        [
            task.process_results(doc, [one.filtered_resps[key] for one in task.instances if one.doc_id == number])
            for key in task.instances[0].filtered_resps
            for number, doc in enumerate(task.eval_docs)
        ]
        for task in (found, expected)
    ]
    assert scores[0] == scores[1]
    assert found.higher_is_better() == expected.higher_is_better()


def test_a_prompt_word_for_word(data_dir, documents) -> None:
    task = load_tasks("arc_easy", str(data_dir))["tasks"]["arc_easy"]
    first = documents["arc/ARC-Easy"]["test"][0]
    made = requests(task, 1)
    prompts = {args[0] for _, doc_id, _, args in made if doc_id == 0}
    shots = []
    for row in documents["arc/ARC-Easy"]["train"]:
        answer = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))[row["answerKey"]]
        shots.append(f"Question: {row['question']}\nAnswer: {answer}")
    assert len(prompts) == 1
    assert prompts.pop() in {f"{shot}\n\nQuestion: {first['question']}\nAnswer:" for shot in shots}
    assert [args[1] for _, doc_id, _, args in made if doc_id == 0] == [f" {text}" for text in first["choices"]["text"]]


def test_versions_and_examples_are_the_published_ones(data_dir) -> None:
    expected = {
        "arc_easy": (1.0, None), "arc_challenge": (1.0, None), "gsm8k": (3.0, 5),
        "truthfulqa_mc1": (2.0, 0), "truthfulqa_mc2": (3.0, 0),
    }  # fmt: skip
    tasks = {name: load_tasks(name, str(data_dir))["tasks"][name] for name in PAPER_TASKS}
    assert {name: (task.VERSION, task.get_config("num_fewshot")) for name, task in tasks.items()} == expected


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="no $LPC_DATA_DIR/benchmarks")
def test_the_real_files_hold_the_published_number_of_documents() -> None:
    check_tasks(list(LOCAL_DATA), str(REAL))
    sizes = {name: len(load_tasks(name, str(REAL))["tasks"][name].eval_docs) for name in PAPER_TASKS}
    assert sizes == {
        "arc_easy": 2376, "arc_challenge": 1172, "gsm8k": 1319, "truthfulqa_mc1": 817, "truthfulqa_mc2": 817,
    }  # fmt: skip


@pytest.mark.parametrize("name", list(LOCAL_DATA))
def test_a_missing_file_is_named_with_what_is_expected(name, data_dir) -> None:
    check_tasks([name], str(data_dir))
    for file in LOCAL_DATA[name].files(data_dir).values():
        text = file.read_bytes()
        file.unlink()
        with pytest.raises(ConfigError) as said:
            check_tasks(["arc_easy", name], str(data_dir))
        assert f"found no file {file.relative_to(data_dir)} for task" in str(said.value)
        assert f"in {data_dir}" in str(said.value)
        assert LOCAL_DATA[name].hub in str(said.value)
        file.write_bytes(text)


@pytest.mark.parametrize(
    ("tasks", "local", "said"),
    [
        ([], False, "tasks: found none"),
        (["arc_eazy"], False, "found 'arc_eazy', which lm-eval does not know, expected arc_easy"),
        (["qqqqqqqq"], False, "expected a task name such as arc_easy, arc_challenge"),
        (["gsm8k", "truthfulqa_mc3"], True, "found 'truthfulqa_mc3' with data_dir, expected truthfulqa_mc"),
        (["hellaswag"], True, "found 'hellaswag' with data_dir"),
        (["nowhere.yaml"], True, "found 'nowhere.yaml'"),
    ],
)
def test_an_unknown_task_is_refused_with_names_like_it(tasks, local, said, data_dir) -> None:
    with pytest.raises(ConfigError, match=said):
        check_tasks(tasks, str(data_dir) if local else None)


def test_names_of_groups_and_tags_and_task_files_are_known(task_file, documents) -> None:
    check_tasks(["mmlu", "ai2_arc", "hellaswag", task_file("mine", documents["arc/ARC-Easy"]["test"])])


def test_a_file_that_changes_under_the_same_name_and_time_is_read_again(data_dir) -> None:
    file = data_dir / "gsm8k" / "test.jsonl"
    before = file.stat()
    first = list(load_tasks("gsm8k", str(data_dir))["tasks"]["gsm8k"].eval_docs)
    file.write_text(file.read_text().replace("what is", "how much"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = list(load_tasks("gsm8k", str(data_dir))["tasks"]["gsm8k"].eval_docs)
    assert [doc["question"] for doc in second] == [doc["question"].replace("what is", "how much") for doc in first]
    assert second != first


def test_local_files_touch_neither_the_network_nor_the_cache(calls, data_dir, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in LOCAL_DATA:
        load_tasks(name, str(data_dir))
    assert calls == []
    assert not (tmp_path / "cache").exists()
    # As `datasets` does it by itself, so that the two lines above can fail.
    datasets.load_dataset("json", data_files={"test": str(data_dir / "gsm8k" / "test.jsonl")})
    assert calls
    assert (tmp_path / "cache").exists()


def test_data_on_a_hub_out_of_reach_is_told_with_the_files_to_give(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataUnreachableError) as said:
        load_tasks("gsm8k")
    assert "gsm8k (openai/gsm8k, main)" in str(said.value)
    assert "--data-dir FOLDER, where FOLDER holds gsm8k/train.jsonl, gsm8k/test.jsonl" in str(said.value)
    # The hub was not tried again and again for half a minute.
    assert "OfflineModeIsEnabled" in str(said.value)
    with pytest.raises(DataUnreachableError, match="copy the Hugging Face cache"):
        load_tasks("hellaswag")


def test_no_network_ends_with_its_block() -> None:
    modules = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]

    def fail():
        with no_network():
            raise KeyError(*(module.HF_HUB_OFFLINE for module in modules))

    with pytest.raises(KeyError, match="True, True"):
        fail()
    assert [module.HF_HUB_OFFLINE for module in modules] == before


def test_progress_bars_are_as_before(data_dir) -> None:
    assert not datasets.are_progress_bars_disabled()
    load_tasks("gsm8k", str(data_dir))
    assert not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        load_tasks("gsm8k", str(data_dir))
        assert datasets.are_progress_bars_disabled()
    finally:
        datasets.enable_progress_bars()
