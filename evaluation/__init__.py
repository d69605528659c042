"""Turn checkpoints into tables and plots: one folder for each subject.

Imports run one way: provenance, tables, figures <- statistics <- line_panels <- benchmarks <- accuracy <- codebook <-
comparison <- adaptation <- report. `ablation` stands apart and uses `provenance` only.
"""
