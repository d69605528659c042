"""A benchmark for a short GPU lease: one command, one process, no hub and no pretrained weights.

python -m benchmarks.gpu --output runs/bench-gpu
"""
