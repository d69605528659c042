import pytest

from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.rows import BadRow


def filled_report() -> DataReport:
    report = DataReport(read=12, kept=4)
    for line in range(4):
        report.count_bad(f"x line {line}", BadRow("empty answer", "the chosen answer is ''"))
    report.count_bad("x line 9", BadRow("invalid UTF-8", "at byte 3"))
    report.count_dropped("pair longer than max_length")
    report.count_cut("prompt")
    report.count_other_split("test")
    report.name_unread_splits(["eval", "extra"])
    return report


def test_report_metrics():
    assert filled_report().metrics() == {
        "data/read": 12.0,
        "data/kept": 4.0,
        "data/held_apart": 0.0,
        "data/other_splits/test": 1.0,
        "data/bad/empty_answer": 4.0,
        "data/bad/invalid_utf_8": 1.0,
        "data/dropped/pair_longer_than_max_length": 1.0,
        "data/cut/prompt": 1.0,
    }


def test_report_metrics_of_similar_names():
    """Every row of a split is counted, although metrics have no punctuation. A name has at least one character."""
    report = DataReport(read=9, kept=2)
    for split, rows in {"en-GB": 1, "en_gb": 2, "?": 4}.items():
        for _ in range(rows):
            report.count_other_split(split)
    splits = {name: count for name, count in report.metrics().items() if "split" in name}
    assert splits == {"data/other_splits/en_gb": 3.0, "data/other_splits/_": 4.0}
    assert report.read == report.kept + sum(splits.values())


def test_report_text_first_three_places():
    text = str(filled_report())
    assert text.splitlines()[0] == "12 rows read, 4 pairs kept"
    assert "4 bad: empty answer: x line 0 (the chosen answer is ''); x line 1" in text
    assert "x line 2" in text
    assert "x line 3" not in text
    assert "; ..." in text
    assert "1 dropped: pair longer than max_length" in text
    assert "1 kept with a cut prompt" in text
    assert "1 left to split 'test'" in text
    assert "  splits that are not read here: eval, extra" in text


def test_report_json_round_trip():
    report = filled_report()
    assert DataReport.from_json(report.to_json()) == report
    with pytest.raises(ValueError, match="not a data report"):
        DataReport.from_json('{"read": 1}')


def test_report_merged():
    one, other = filled_report(), filled_report()
    other.count_dropped("answers equal after the cut")
    both = one.merged(other)
    assert (both.read, both.kept, both.bad["empty answer"]) == (24, 8, 8)
    assert both.dropped == {"pair longer than max_length": 2, "answers equal after the cut": 1}
    assert len(both.bad_places["empty answer"]) == 3
    assert both.unread_splits == ["eval", "extra"]
    assert one == filled_report()


def test_report_counting_and_unread():
    report = DataReport()
    assert list(report.counting("abc")) == ["a", "b", "c"]
    report.count_unread("x line 4", BadRow("invalid JSON", "..."))
    assert report.read == 4
    assert report.bad == {"invalid JSON": 1}
