"""Log-probabilities under the reference: computed at every step, or cached before training."""
