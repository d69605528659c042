"""Significance tests, estimates over seeds, and values that are dependent within clusters."""
