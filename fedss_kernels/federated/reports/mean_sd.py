"""Mean and standard deviation of a few repetitions."""

import math
import statistics
from collections.abc import Sequence


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the sample standard deviation, None for that of one value.

    NaN where a value is not finite: of such the standard library raises, or gives an infinite mean.
    """
    finite = all(map(math.isfinite, values))
    sd = (statistics.stdev(values) if finite else math.nan) if len(values) > 1 else None
    return statistics.fmean(values) if finite else math.nan, sd
