"""What a latent costs, measured on a tiny policy, and what the table makes of the numbers."""

from __future__ import annotations

import pytest

from benchmarks.latent_cost import LATENTS, PLAIN, main, table


def rows_of(text: str) -> dict[str, list[str]]:
    """The cells of each row by its first one."""
    _, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]
    return {name: cells for name, *cells in lines}


@pytest.mark.slow
def test_a_row_for_each_latent(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["latent_cost.py", *arguments, "--steps", "3"])
    main()
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == list(LATENTS)
    assert rows[PLAIN][1] == "1.000"
    assert rows[PLAIN][3] == "1.0000"
    for name, (_, time, _, memory) in rows.items():
        assert float(time) > 0, name
        assert (float(memory) > 1) == (name != PLAIN), name
    # Four times the codes, and the logits of each.
    assert float(rows["marginal, K = 128"][3]) > float(rows["marginal, K = 32"][3])


def test_medians_leave_out_the_first_steps() -> None:
    """The last step stalled, both sides alike, and the side without a latent once more."""
    seconds = {PLAIN: [9.0, 1.0, 2.0, 4.0, 1.0, 50.0], "other": [99.0, 1.1, 2.4, 4.4, 3.0, 50.0]}
    gib = 2**30
    text = table(seconds, {PLAIN: gib, "other": 2 * gib}, {PLAIN: 3 * gib, "other": 3 * gib})
    # Ratios 1.1, 1.2, 1.1, 3 and 1. Medians alone are 3 and 2, which would say 1.5.
    assert rows_of(text) == {
        PLAIN: ["2.00", "1.000", "4.000", "1.0000"],
        "other": ["3.00", "1.100", "5.000", "1.2500"],
    }


def test_too_few_pairs_are_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["latent_cost.py", *arguments, "--steps", "4"])
    with pytest.raises(
        SystemExit, match=r"pairs\.jsonl: found 12 pairs to train on, expected 5 batches of 3\. Take fe"
    ):
        main()
