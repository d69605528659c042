"""Tests of tables of numbers and texts by pair."""

from __future__ import annotations

import torch

from lpc_lightning.evaluation.accuracy.pair_table import PairTable


def test_pair_table_round_trip() -> None:
    table = PairTable()
    assert table.read() == ({}, [])
    table.update({"a": torch.tensor([1.5, 2.0]), "b": torch.tensor([1, 2])}, [{"id": "x\n"}, {"id": "\u2028 é"}])
    table.update({"a": torch.tensor([3.25]), "b": torch.tensor([3])}, [{"id": '"', "flag": True}])
    numbers, rows = table.read()
    assert {name: values.tolist() for name, values in numbers.items()} == {"a": [1.5, 2.0, 3.25], "b": [1, 2, 3]}
    assert rows == [{"id": "x\n"}, {"id": "\u2028 é"}, {"id": '"', "flag": True}]


def test_pair_table_of_one_number() -> None:
    table = PairTable()
    table.update({"a": torch.tensor([1.5])}, [{"id": "x"}])
    assert table.read() == ({"a": torch.tensor([1.5])}, [{"id": "x"}])
