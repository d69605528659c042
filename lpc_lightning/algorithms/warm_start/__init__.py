"""The latent space is trained before the first step, on a sketch of the policy.

From random codes and a uniform prior there is hardly a force that parts the codes: a code gains by what the prior knows
of it, and the prior by what the codes have become. In the sketch, log pi(y|x, z) is known in closed form once a
gradient of each answer is, for which one pass will do. A step of the latent space then needs no backbone, and codes can
be found by looking at some thousand pairs at once.

- `sketch`: pairs under that policy.
- `clusters`: what the prompts (or the annotators) let expect of the pairs' gradients, clustered.
- `fit`: codes and networks from these clusters, and then the algorithm's own loss.
- `rows`: the pass over the data, shared between runs.
- `warm_start_pairs`: the whole.
"""
