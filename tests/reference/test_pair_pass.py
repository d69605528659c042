"""Tests of the batches of a pass without gradient."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lpc_lightning.reference.pair_pass import batches_by_length


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), budget=st.integers(1, 60), data=st.data())
def test_batches_by_length_are_full(lengths: list[int], budget: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, min_size=1))
    batches = batches_by_length(lengths, indices, budget)
    assert sorted(index for batch in batches for index in batch) == sorted(indices)
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(in_order, reverse=True)
    totals = [sum(lengths[index] for index in batch) for batch in batches]
    assert all(total <= budget or len(batch) == 1 for total, batch in zip(totals, batches, strict=True))
    nexts = [lengths[batch[0]] for batch in batches[1:]]
    assert all(total + following > budget for total, following in zip(totals, nexts, strict=False))
