"""lm-evaluation-harness tasks on a policy with a latent."""
