"""Warm start: the latent space is fitted before the first training step, under a linearized policy.

With random codes and a uniform prior, the training loss barely separates the codes. A code improves only if the prior
predicts it, and the prior improves only if the codes differ. A linearized policy gives log pi(y|x, z) in closed form
from one gradient of each answer, for which a single pass over the data is enough. A step of the latent space then needs
no backbone, and codes are fitted to thousands of pairs at once.

- `linearized_policy`: pairs under the linearized policy.
- `pair_gradients`: the pass over the data, whose values are shared between runs.
- `held_out`: the pairs that are held out.
- `clusters`: clusters of the gradients that prompts or annotators predict.
- `fit`: codes and networks from these clusters, then training by the algorithm's own loss.
- `decision`: whether pairs that nothing has read are likelier under the fitted space.
- `warm_start`: all steps together.
"""
