"""Benchmarks: each times ours beside what a user would pick instead, in one run, after a check of the
results."""
