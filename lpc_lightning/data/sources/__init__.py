"""Preference examples from files and hub data sets."""
