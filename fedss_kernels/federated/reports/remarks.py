"""What has to be said of a run beside its figures, as they do not say it themselves."""

from ..files.round_metrics import RoundMetrics
from ..files.summary import Summary


def remarks(run: RoundMetrics | Summary) -> list[str]:
    """A line each, for people: of a round, or of the whole run at its end. None where all is well."""
    found = []
    if run.not_finite_since is not None:
        found.append(
            f"after round {run.not_finite_since} the model has numbers that are not finite, so nothing is "
            "measured: is --client-lr, --server-lr or --scale too high, or did --trust-updates let them in?"
        )
    elif run.not_finite:
        found.append(
            f"test images whose embedding is not finite: {run.not_finite:,}; they are misses (if they are "
            "most, is --client-lr, --server-lr or --scale too high? if few, does the net divide by 0, as for "
            "an image of one colour?)"
        )
    if run.personal_not_finite:
        found.append(
            f"fine-tuning left numbers that are not finite for {run.personal_not_finite:,} clients, for whom "
            "nothing is right then: is --personalise-rate too high?"
        )
    return found
