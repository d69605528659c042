"""Readers for the folders that `fit`, `ablate` and `evaluate` write."""
