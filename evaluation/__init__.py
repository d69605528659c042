"""Turn checkpoints into tables and plots: one folder for each subject.

Imports run one way. tests/test_package.py has the order and checks it.
"""
