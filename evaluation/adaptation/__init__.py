"""Annotators with few labels: their codes, and accuracy on their other pairs."""
