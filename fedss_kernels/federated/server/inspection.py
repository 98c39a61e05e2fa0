"""What the server asks of an update before it counts. Nothing from outside is trusted.

An update that fails is dropped whole, and the round goes on with the others.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median_low

import torch
from torch import Tensor

from ..ledger import Entry
from ..messages import Update, norm, numbers

# Of the net's norm: a shorter change does little harm, whatever the others' are. Where losses are near 0 most
# move hardly at all, and one that still learns many times as far.
HARMLESS = 0.01
LARGEST_LOSS = 1e30  # that sums of many are still numbers of
_DIVERGED = "is --client-lr, --server-lr or --scale too high, or does the net or an own loss give NaN?"
_TOO_FAR = "is --client-lr or --scale too high?"
# Of each fault what it is, and what it comes from where all clients have it.
REASONS = {
    "dtype": "not dense float32 numbers, or no update at all",
    "shape": "not the shapes of the model",
    "ids": "not the class rows that the client asked for",
    "examples": "a number of images that no client has",
    "loss": f"a loss not finite or over 1e30: {_DIVERGED}",
    "not finite": f"changes not finite: {_DIVERGED}",
    "range": f"a change outside [-8, 8], which no secure sum takes: {_TOO_FAR}",
    "norm": f"norm over --max-norm: {_TOO_FAR}",
    "shares": "keys or shares that no secure sum can be made or opened with",
}
# Where others' answers are sound: the bound is then the lower of two, and what is over it may be so too.
BESIDE_OTHERS = REASONS | {
    "norm": f"norm over --max-norm or --max-norm-ratio: {_TOO_FAR} if not, give larger bounds"
}


def explained(faults: Iterable[tuple[str, int]]) -> str:
    """Of (fault, how many answers have it) in a run that goes on, in words: "2 not the shapes of ..."."""
    return "; ".join(f"{count:,} {BESIDE_OTHERS.get(fault, fault)}" for fault, count in faults)


def reasons(entries: Sequence[Entry], late: str = "--deadline") -> str:
    """Why clients' answers did not make a round, each reason with how many, the most frequent first."""
    counts = Counter(entry.fault or entry.outcome for entry in entries)
    words = {
        "dropped": "dropped out",
        "late": f"late, after {late}",
        "discarded": "nothing wrong with, but too few in their cohorts",
    }
    faults = BESIDE_OTHERS if counts["discarded"] else REASONS
    words |= {fault: f"left out: {reason}" for fault, reason in faults.items()}
    return "; ".join(f"{count:,} {words[reason]}" for reason, count in counts.most_common())


@dataclass(frozen=True)
class Finding:
    """Of one update, before there are others to hold it against."""

    fault: str  # "" for none
    norm: float | None = None  # where there is a finite one


@dataclass(frozen=True)
class Inspection:
    num_parameters: int  # P, of the extractor
    embedding_dim: int  # D
    max_examples: int
    max_norm: float
    max_norm_ratio: float  # to the median norm of the round
    largest: float = math.inf  # that any number may be

    def faults(self, updates: Sequence[Update], asked: Sequence[Tensor], net_norm: float = 0.0) -> list[str]:
        """The first thing wrong with each update of a round; asked: the rows its client asked for, (S,).

        A norm is held against the others' where it is over HARMLESS * net_norm, that of the net they change.

        "dtype", "shape", "ids", "examples", "loss", "not finite", "norm", or "" for nothing.
        """
        findings = [self.look(u, ids) for u, ids in zip(updates, asked, strict=True)]
        return self.verdicts(findings, net_norm)

    def look(self, update: Update, asked: Tensor) -> Finding:
        """What is wrong with an update by itself, whatever the others are."""
        fault = self._fault(update, asked)
        if fault:
            return Finding(fault)
        size = norm(update)
        if not math.isfinite(size):
            return Finding("not finite")
        if size > self.largest and any((part.abs() > self.largest).any() for part in numbers(update)):
            return Finding("range", size)
        return Finding("norm" if size > self.max_norm else "", size)

    def verdicts(self, findings: Sequence[Finding], net_norm: float = 0.0) -> list[str]:
        """What is wrong with each update of a round, beside the others; net_norm: as of `faults`."""
        sizes = [finding.norm for finding in findings if finding.norm is not None]
        # Of two in the middle the lower: what is right is small, and rubbish may be of any size.
        usual = median_low(sizes) if sizes else 0.0
        bound = max(self.max_norm_ratio * usual, HARMLESS * net_norm) if usual > 0 else math.inf
        return [
            "norm" if not found.fault and found.norm is not None and found.norm > bound else found.fault
            for found in findings
        ]

    def _fault(self, update: Update, asked: Tensor) -> str:
        """But for its numbers."""
        if type(update) is not Update:
            return "dtype"
        shapes = {
            "class_ids": (torch.int64, (len(asked),)),
            "rows": (torch.float32, (len(asked), self.embedding_dim)),
            "extractor": (torch.float32, (self.num_parameters,)),
        }
        for name, (dtype, shape) in shapes.items():
            sent = getattr(update, name)
            if not _is_plain(sent) or sent.dtype != dtype:
                return "dtype"
            if sent.shape != shape:
                return "shape"
        if not torch.equal(update.class_ids, asked):  # as asked: ascending, each once
            return "ids"
        n = update.num_examples
        if type(n) is not int or not 1 <= n <= self.max_examples:
            return "examples"
        if not isinstance(update.loss, float) or not abs(update.loss) < LARGEST_LOSS:
            return "loss"
        return ""


def _is_plain(sent: object) -> bool:
    """A tensor like the server's own: in memory, dense, and nothing that does more than hold numbers."""
    return (
        type(sent) is Tensor
        and sent.device.type == "cpu"
        and sent.layout == torch.strided
        and not sent.is_nested
        and not sent.requires_grad
    )
