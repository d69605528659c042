import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpc_lightning.data.sources.columns import Columns
from lpc_lightning.data.sources.formats import to_example
from lpc_lightning.data.sources.rows import BadRow


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def chatml(*contents: str) -> str:
    """Render turns of user and assistant in turn."""
    roles = ("user", "assistant") * len(contents)
    return "".join(f"<|im_start|>{r}\n{c}<|im_end|>\n" for r, c in zip(roles, contents, strict=False))


SYSTEM = {"role": "system", "content": "Be kind."}
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: An egg?\n\nAssistant:"
HH_PROMPT = (user("Hi"), assistant("Hello"), user("An egg?"))


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "expected"),
    [
        ("Hi", "yes", "no", (user("Hi"),)),
        (" Hi\n", "yes", "no", (user(" Hi\n"),)),
        ([SYSTEM, user("Hi")], "yes", "no", (SYSTEM, user("Hi"))),
        ([user("Hi")], [assistant("yes")], [assistant("no")], (user("Hi"),)),
        ("Hi", [assistant("yes")], "no", (user("Hi"),)),
        ("Hi", assistant("yes"), assistant("no"), (user("Hi"),)),
        (None, [user("Hi"), assistant("yes")], [user("Hi"), assistant("no")], (user("Hi"),)),
        ("Hi", [user("Hi"), assistant("yes")], [user("Hi"), assistant("no")], (user("Hi"),)),
        ([user("Hi")], [user("Hi"), assistant("yes")], [user("Hi"), assistant("no")], (user("Hi"),)),
        (HH, [*HH_PROMPT, assistant("yes")], [*HH_PROMPT, assistant("no")], HH_PROMPT),
        ("An egg?\n", [*HH_PROMPT, assistant("yes")], [*HH_PROMPT, assistant("no")], HH_PROMPT),
        ("Hi\n\nHello\nAn egg?", [*HH_PROMPT, assistant("yes")], [*HH_PROMPT, assistant("no")], HH_PROMPT),
        ("Hi", chatml("Hi", "yes"), chatml("Hi", "no"), (user("Hi"),)),
        ([user("Hi")], chatml("Hi", "yes"), chatml("Hi", "no"), (user("Hi"),)),
        (chatml("Hi"), chatml("Hi", "yes"), chatml("Hi", "no"), (user("Hi"),)),
        (chatml("Hi")[:-1], [user("Hi"), assistant("yes")], [user("Hi"), assistant("no")], (user("Hi"),)),
        (HH, "yes", "no", HH_PROMPT),
        (HH, " yes", " no", HH_PROMPT),
        (HH.removesuffix("\n\nAssistant:"), "yes", "no", HH_PROMPT),
        (HH.lstrip() + " ", "yes", [assistant("no")], HH_PROMPT),
        (None, HH + " yes", HH + " no", HH_PROMPT),
        ("", HH.lstrip() + " yes ", HH.lstrip() + "no", HH_PROMPT),
        (HH, HH + " yes", HH + " no", HH_PROMPT),
        ("Human: or machine?", "yes", "no", (user("Human: or machine?"),)),
        (
            None,
            [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "yes"}],
            [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "no"}],
            (user("Hi"),),
        ),
    ],
)
def test_to_example_supported_formats(prompt, chosen, rejected, expected):
    row = {"chosen": chosen, "rejected": rejected} | ({} if prompt is None else {"prompt": prompt})
    example = to_example(row, "x line 1")
    assert (example.prompt, example.chosen, example.rejected) == (expected, "yes", "no")


@pytest.mark.parametrize(
    "rejected", ["Human: no", "Human: Hi\n\nAssistant: Go", "Human: Hi\n\nAssistant: Go\n\nHuman: a"]
)
@pytest.mark.parametrize("prompt", ["Write a dialogue.", [user("Hi"), assistant("Hello"), user("Write a dialogue.")]])
def test_to_example_dialogue_as_answer(prompt, rejected):
    dialogue = "Human: Hi\n\nAssistant: Hello"
    example = to_example({"prompt": prompt, "chosen": dialogue, "rejected": rejected}, "x")
    assert example.prompt == ((user(prompt),) if isinstance(prompt, str) else tuple(prompt))
    assert (example.chosen, example.rejected) == (dialogue, rejected)


@pytest.mark.parametrize("begin", ["\n\n", ""])
@pytest.mark.parametrize(
    "prompt",
    [
        "An  egg?\n",
        "Human: An egg?\n\nAssistant:",
        "Hi\n\nHello\n\nAn egg?",
        HH,
        HH.lstrip(),
        HH.replace("\n\n", "\n"),
        HH.removesuffix("\n\nAssistant:"),
        HH.lstrip() + " ",
        [user("Hi "), assistant("Hello"), user("An egg?\n")],
        json.dumps(HH_PROMPT),
    ],
)
def test_to_example_dialogues_beside_a_prompt(prompt, begin):
    """Their common turns have the prompt, so that they are whole conversations."""
    chosen, rejected = (f"{begin}{HH.lstrip()} {answer}" for answer in ("yes", "no"))
    example = to_example({"prompt": prompt, "chosen": chosen, "rejected": rejected}, "x")
    assert (example.prompt, example.chosen, example.rejected) == (HH_PROMPT, "yes", "no")


@pytest.mark.parametrize(
    "prompt", [[SYSTEM, *HH_PROMPT], [user("An egg?")], "User: Well?\n\nAssistant: So.\n\nUser: Hi"]
)
def test_to_example_dialogues_lack_a_part(prompt):
    """The last turn of the prompt is in the dialogues, and another one is not, or they have more turns."""
    with pytest.raises(BadRow, match="prompt differs from the conversations"):
        to_example({"prompt": prompt, "chosen": HH + " yes", "rejected": HH + " no"}, "x")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": "a"}, "missing answer"),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, "missing answer"),
        ({"prompt": "p", "chosen": " \n", "rejected": "b"}, "empty answer"),
        ({"prompt": "p", "chosen": "a", "rejected": [assistant("")]}, "empty answer"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "equal answers"),
        ({"chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("a")]}, "equal answers"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "no prompt"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "no prompt"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"prompt": [SYSTEM, user("  ")], "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"prompt": [user("p"), assistant("q")], "chosen": "a", "rejected": "b"}, "prompt does not end in a user turn"),
        ({"prompt": [SYSTEM], "chosen": "a", "rejected": "b"}, "prompt does not end in a user turn"),
        (
            {"prompt": [user("q")], "chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]},
            "prompt differs from the conversations",
        ),
        (
            {"prompt": "Context + p", "chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]},
            "prompt differs from the conversations",
        ),
        (
            {"prompt": ["p"], "chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]},
            "prompt differs from the conversations",
        ),
        (
            {"prompt": HH, "chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")]},
            "prompt differs from the conversations",
        ),
        (
            {"prompt": "Context. Hi", "chosen": chatml("Hi", "a"), "rejected": chatml("Hi", "b")},
            "prompt differs from the conversations",
        ),
        (
            {"prompt": [SYSTEM, user("Hi")], "chosen": chatml("Hi", "a"), "rejected": chatml("Hi", "b")},
            "prompt differs from the conversations",
        ),
        (
            {"chosen": [user("p"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            "conversations differ before the last turn",
        ),
        (
            {"chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("a"), user("q"), assistant("b")]},
            "conversations differ before the last turn",
        ),
        ({"chosen": HH + " a", "rejected": HH + " a\n\nHuman: b"}, "conversations differ before the last turn"),
        (
            {"prompt": "An egg?", "chosen": HH + " a", "rejected": HH + " a\n\nHuman: b"},
            "conversations differ before the last turn",
        ),
        (
            {"chosen": [user("p"), user("a")], "rejected": [user("p"), user("b")]},
            "conversation does not end in an answer",
        ),
        (
            {"prompt": "p", "chosen": [user("a")], "rejected": [assistant("b")]},
            "conversation does not end in an answer",
        ),
        ({"prompt": [{"role": "tool", "content": "p"}], "chosen": "a", "rejected": "b"}, "unknown role"),
        ({"prompt": [{"content": "p"}], "chosen": "a", "rejected": "b"}, "unknown role"),
        ({"prompt": [{"role": ["user"], "content": "p"}], "chosen": "a", "rejected": "b"}, "unknown role"),
        ({"prompt": [{"role": "user", "content": None}], "chosen": "a", "rejected": "b"}, "wrong type"),
        ({"prompt": "p", "chosen": 7, "rejected": "b"}, "wrong type"),
        ({"prompt": "p", "chosen": [], "rejected": "b"}, "wrong type"),
        ({"prompt": "p", "chosen": ["a"], "rejected": "b"}, "wrong type"),
        ({"prompt": "p", "chosen": [user("p"), assistant("a")], "rejected": "b"}, "wrong type"),
        ({"prompt": 7, "chosen": "a", "rejected": "b"}, "unknown form"),
        ({"prompt": {"text": "p"}, "chosen": "a", "rejected": "b"}, "unknown form"),
        ({"prompt": "p\ud800", "chosen": "a", "rejected": "b"}, "invalid text"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "source": "\udc00"}, "invalid text"),
    ],
)
def test_to_example_bad_rows(row, reason):
    with pytest.raises(BadRow) as caught:
        to_example(row, "x line 1")
    assert caught.value.reason == reason
    assert caught.value.detail


def test_to_example_missing_answer_lists_columns():
    with pytest.raises(BadRow, match=r"no 'chosen'; the row has \['answer_a', 'prompt'\]"):
        to_example({"prompt": "p", "answer_a": "x"}, "x")


def test_to_example_columns_and_meta():
    row = {"q": "p", "good": "a", "bad": "b", "who": 3, "id": "other", "score": [1, 2], "factor": None}
    columns = Columns(prompt="q", chosen="good", rejected="bad", annotator="who", id="number")
    example = to_example(row, "x line 4", columns)
    assert (example.id, example.annotator, example.source, example.factor) == ("x line 4", "3", "", "")
    assert example.meta == {"id": "other", "score": [1, 2]}
    assert to_example({**row, "number": 0}, "x line 4", columns).id == "0"


def test_columns_repeated_name():
    with pytest.raises(ValueError, match=r"columns: found \['answer'\] for more than one purpose"):
        Columns(chosen="answer", rejected="answer")


text = st.text(st.characters(codec="utf-8"))
cells = st.recursive(
    st.none() | st.booleans() | st.integers() | text,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)


def test_columns_factor_as_annotator() -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "domain": "law", "note": 1}
    example = to_example(row, "row 1", Columns(factor="domain", annotator="domain"))
    assert (example.source, example.factor, example.annotator) == ("", "law", "law")
    assert example.meta == {"note": 1}
    with pytest.raises(ValueError, match=r"columns: found \['domain'\] for more than one purpose"):
        Columns(id="domain", annotator="domain")


@given(st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "id", "source"]), cells))
def test_to_example_arbitrary_row(row):
    try:
        example = to_example(row, "x")
    except BadRow:
        return
    assert example.prompt[-1]["role"] == "user"
    assert example.chosen.strip()
    assert example.rejected.strip()


@given(st.lists(text, min_size=1, max_size=5), text, text)
def test_to_example_equal_for_all_formats(turns, chosen, rejected):
    """Check that one conversation gives the same example as text, messages, whole conversations and JSON."""
    messages = [user(turn) if i % 2 == 0 else assistant(turn) for i, turn in enumerate([*turns, "q"][-len(turns) :])]
    messages = messages if messages[-1]["role"] == "user" else messages[:-1]
    rows = [
        {"prompt": messages, "chosen": chosen, "rejected": rejected},
        {"prompt": messages, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]},
        {"chosen": [*messages, assistant(chosen)], "rejected": [*messages, assistant(rejected)]},
    ]
    rows.append(json.loads(json.dumps(rows[2])))
    results = []
    for row in rows:
        try:
            results.append(to_example(row, "x"))
        except BadRow as fault:
            results.append(fault.reason)
    assert all(result == results[0] for result in results)
