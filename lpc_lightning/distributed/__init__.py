"""Sharded strategies, and checkpoints that are written and read by several processes."""
