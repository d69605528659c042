"""Orders of the training pairs, which decide the pairs that share a batch."""
