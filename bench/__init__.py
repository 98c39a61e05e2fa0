"""Benchmarks: ours beside what a user would pick instead, in one run, once the results were checked."""
