"""A grid of cells: its file, its axes, its tuned axis, and settings that would replace an axis."""
