"""Evaluation of several models, and their comparison."""
