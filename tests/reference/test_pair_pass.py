"""How pairs are batched for a pass without gradient."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lpc_lightning.reference.pair_pass import batches_by_length


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), budget=st.integers(1, 60), data=st.data())
def test_each_pair_is_in_one_batch_and_batches_are_as_full_as_they_can_be(
    lengths: list[int], budget: int, data: st.DataObject
) -> None:
    places = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, min_size=1))
    batches = batches_by_length(lengths, places, budget)
    assert sorted(place for batch in batches for place in batch) == sorted(places)
    in_order = [lengths[place] for batch in batches for place in batch]
    assert in_order == sorted(in_order, reverse=True)
    totals = [sum(lengths[place] for place in batch) for batch in batches]
    assert all(total <= budget or len(batch) == 1 for total, batch in zip(totals, batches, strict=True))
    nexts = [lengths[batch[0]] for batch in batches[1:]]
    assert all(total + following > budget for total, following in zip(totals, nexts, strict=False))
