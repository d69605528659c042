"""lm-evaluation-harness tasks on a policy with its latent."""
