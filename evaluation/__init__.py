"""From checkpoints to tables and plots."""
