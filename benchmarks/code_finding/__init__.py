"""What finds the codes: gradients of the log-ratio at the head, or mean states of the answers at a lower layer.

The policy is frozen and linearized, as in the warm start. `python -m benchmarks.code_finding extract` makes one pass
over the pairs of a file. `python -m benchmarks.code_finding analyse` reads its values in seconds and writes tables.

- `extraction`: the pass, whose values are cached.
- `pairs`: labelled pairs as arrays.
- `ridge`: ridge regression whose penalty is chosen by cross-validation over prompts.
- `mixture`: codes of annotators who are not known, by expectation maximization.
- `known`, `unknown`, `assignment`: the three experiments.
- `scores`: accuracies with intervals over prompts and seeds.
"""
