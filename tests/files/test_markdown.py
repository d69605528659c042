"""Text in Markdown, read again by a Markdown parser."""

from __future__ import annotations

import html
import re

import pytest
from markdown_it import MarkdownIt

from lpc_lightning.files.markdown import code_span, escape_markdown, markdown_table

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</td><script>",
    "<!-- x",
    "[x](http://t/x)",
    "![x](http://t/p.png)",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_escaped_text_has_no_html_and_no_links(text: str) -> None:
    assert re.search("<(img|/td|!--|a )", MarkdownIt("commonmark").render(text))
    page = MarkdownIt("commonmark").render(escape_markdown(f"{text}\n# heading"))
    assert re.findall("<[^>]*>", page) == ["<p>", "</p>"]


@pytest.mark.parametrize("text", ["<0.001", "a < b", "R&D", "[0.1, 0.2]", "latent=none, a|b", "5 $"])
def test_escaped_text_keeps_ordinary_characters(text: str) -> None:
    assert escape_markdown(text) == text


@pytest.mark.parametrize("text", ["plain", "a `b`` c", "`<b>`\n", "<script>", "`"])
def test_code_span_shows_the_text(text: str) -> None:
    shown = MarkdownIt("commonmark").render(f"before `x` {code_span(text)} after `y`")
    assert html.unescape(shown) == f"<p>before <code>x</code> <code>{text.strip()}</code> after <code>y</code></p>\n"


def test_markdown_table_is_padded() -> None:
    text = markdown_table(["task", "base", "a longer name"], [["arc_easy", "0.4321", "0.5"], ["gsm8k", "0.01", "0.25"]])
    assert text == (
        "| task     |   base | a longer name |\n"
        "| -------- | -----: | ------------: |\n"
        "| arc_easy | 0.4321 |           0.5 |\n"
        "| gsm8k    |   0.01 |          0.25 |"
    )


def test_markdown_table_escapes_cells() -> None:
    text = markdown_table(["x"], [["a|b"], ["two\nlines"]])
    assert text == "| x         |\n| --------- |\n| a\\|b      |\n| two lines |"


def test_markdown_table_of_markdown_cells() -> None:
    text = markdown_table(["x"], [[code_span("a|<b>")]], escape=str)
    assert text.splitlines()[2] == r"| `a\|<b>` |"


def test_markdown_table_without_rows() -> None:
    assert markdown_table(["a", "b"], []) == "| a   |   b |\n| --- | --: |"
