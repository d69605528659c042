"""Significance tests, and estimates over seeds."""
