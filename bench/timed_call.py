"""What pytest-benchmark runs for measure.py, which supplies the other fixtures: one call, many times."""

import time


def bench_call(benchmark, call, seconds, enough, rounds):
    begun = time.perf_counter()
    call()
    if time.perf_counter() - begun < enough / rounds:
        benchmark(call)
    else:  # a long one: warm by now, and the calibration would cost as many calls again
        benchmark.pedantic(call, rounds=rounds)
    seconds.extend(benchmark.stats.stats.data)
