"""Grids of runs: each cell a fit in a folder and a process of its own."""
