"""Benchmarks: ours beside what a user would pick instead, in one run, once the results were checked.

bench_<stem>.py    what is measured: the problem, the contenders, the check of their results
row_operation.py   what those of the aggregator have in common
measure.py         the one timing helper: pytest-benchmark (timed_call.py is what it runs)
peak_memory.py     peak memory of a call, in a process of its own
machine.py         the machine and its own limits, measured in the same run
results.py         the figures, and the tables made of them; plot.py draws them
report.py          what is asked for, and the files that answer it
loss.py            the loss' table; aggregator.py: the aggregator's
run.py             `fedss bench`
margins.py         what sampling costs in accuracy, with margins and without
gpu.py             the loss on a GPU, a script of its own; device.py times on it and measures its limits
"""
