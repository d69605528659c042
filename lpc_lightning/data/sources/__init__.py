"""Rows of files and hub data sets, as preference examples."""
