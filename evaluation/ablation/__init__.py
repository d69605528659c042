"""Grids of runs, where each cell is a separate fit in its own folder and process."""
