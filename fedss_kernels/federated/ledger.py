"""The byte ledger: what moves between the server and each client, by direction and kind.

Of a method whose class rows travel, per client and round, with P numbers in the extractor phi, S class rows
of D numbers, and 4 bytes a number, or 2 where they travel as bfloat16:

    down: phi (4 P) and the class rows (4 S D)
    up:   the ids asked for (8 S), phi and the class rows again, unless it never answers

The rows come and go in the order of the ids, so the ids travel once. FullSoftmax needs none. Rows that are
known from a seed cost the seed (8, down), rows that stay with the client nothing. Where there are no rows a
projection head goes with phi.

A direction and a kind are a flow, a column of the ledger: down_rows. A run has the flows of its method.

Where clients learn without labels the ledger says what they compute too, by a model of one client (Work).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

ID_BYTES = 8
SEED_BYTES = 8
WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def over_the_wire(numbers: Tensor, dtype: str) -> Tensor:
    """float32 numbers as they arrive where they travel as `dtype`."""
    return numbers.to(WIRE_DTYPES[dtype]).to(torch.float32)


@dataclass(frozen=True)
class Kind:
    """Of what moves."""

    name: str
    label: str  # in a report
    directions: tuple[str, ...]  # of down, to the client, and up
    by_class: bool  # whether it grows with the number of classes

    @property
    def flows(self) -> list[str]:
        return [f"{direction}_{self.name}" for direction in self.directions]


KINDS: dict[str, Kind] = {}


def declare(kind: Kind) -> Kind:
    """Raises ValueError where there is another of its name."""
    if KINDS.setdefault(kind.name, kind) != kind:
        raise ValueError(f"there is a kind {kind.name} already")
    return kind


def is_flow(name: str) -> bool:
    direction, _, kind = name.partition("_")
    return kind in KINDS and direction in KINDS[kind].directions


declare(Kind("extractor", "the net", ("down", "up"), by_class=False))
declare(Kind("rows", "class rows", ("down", "up"), by_class=True))
declare(Kind("ids", "ids of the classes asked for", ("up",), by_class=True))
declare(Kind("seed", "the seed of the class rows", ("down",), by_class=False))
declare(Kind("projection", "the projection head", ("down", "up"), by_class=False))
declare(Kind("frozen", "blocks of the net that are not trained", ("down",), by_class=False))
# Where a client has its class rows from -> what moves for it and the net.
FLOWS = {
    "travel": ("down_extractor", "down_rows", "up_ids", "up_extractor", "up_rows"),
    "seed": ("down_extractor", "down_seed", "up_extractor"),
    "home": ("down_extractor", "up_extractor"),
    "none": ("down_extractor", "down_projection", "up_extractor", "up_projection"),
}


@dataclass(frozen=True)
class Traffic:
    """Bytes moved, by flow; nothing by one that is not there. Sums with +.

    Raises ValueError for what is no flow of any of KINDS.
    """

    bytes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for flow in self.bytes:
            if not is_flow(flow):
                raise ValueError(f"no such flow: {flow}; a direction and one of {', '.join(KINDS)}")

    @classmethod
    def none(cls, flows: Iterable[str]) -> Traffic:
        return cls(dict.fromkeys(flows, 0))

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic({flow: self[flow] + other[flow] for flow in {**self.bytes, **other.bytes}})

    def __getitem__(self, flow: str) -> int:
        return self.bytes.get(flow, 0)

    def times(self, n: int) -> Traffic:
        return Traffic({flow: n * count for flow, count in self.bytes.items()})

    def of(self, kind: str) -> int:
        """Down and up."""
        return sum(self[flow] for flow in KINDS[kind].flows)

    @property
    def kinds(self) -> list[Kind]:
        """Those that are in it, in their own order."""
        return [kind for kind in KINDS.values() if not self.bytes.keys().isdisjoint(kind.flows)]

    @property
    def classification(self) -> int:
        """What the number of classes costs: as a rule class rows and ids."""
        return sum(self.of(kind.name) for kind in self.kinds if kind.by_class)

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Work:
    """What a client has and does in a round, by a model of one client: in a step, and in all of them."""

    step_held: int  # bytes of the parameters that it has
    step_saved: int  # bytes that it keeps from forward to backward
    step_peak: int  # bytes that it takes at a time beside the parameters
    step_multiply_adds: int
    multiply_adds: int  # of all its steps


WORK = tuple(each.name for each in fields(Work))  # columns of the ledger
OUTCOMES = ("accepted", "dropped", "late", "rejected", "discarded")


@dataclass(frozen=True)
class Entry:
    """One client's line in the ledger of one round."""

    round: int
    attempt: int  # from 0: rounds in which too few answer are tried again
    client: int
    num_rows: int  # |S_k|
    outcome: str  # one of OUTCOMES
    fault: str  # why it was rejected, or ""
    traffic: Traffic
    work: Work | None = None  # None: not counted, or there is no answer to know it by


def client_traffic(
    num_parameters: int,
    num_rows: int,
    embedding_dim: int,
    *,
    rows: str = "travel",
    frozen: int = 0,
    projection: int = 0,
    sends_ids: bool = True,
    answers: bool = True,
    dtype: str = "float32",
) -> Traffic:
    """What one client moves in one round, in bytes, where its `rows` travel, are of a seed, at home, or none.

    >>> client_traffic(1000, 10, 64).bytes
    {'down_extractor': 4000, 'down_rows': 2560, 'up_ids': 80, 'up_extractor': 4000, 'up_rows': 2560}
    >>> client_traffic(1000, 10, 64, rows="seed").bytes
    {'down_extractor': 4000, 'down_seed': 8, 'up_extractor': 4000}

    A client that never `answers` asks and is sent its part like any other, and sends nothing back. Of a net
    that stays at home num_parameters is 0. `frozen` numbers of the net are sent beside it and not back, and
    `projection` both ways where there are no rows.
    Raises ValueError for other `rows`.
    """
    if rows not in FLOWS:
        raise ValueError(f"rows: expected one of {', '.join(FLOWS)}, got {rows!r}")
    number_bytes = WIRE_DTYPES[dtype].itemsize
    extractor, each_way = number_bytes * num_parameters, number_bytes * num_rows * embedding_dim
    head = number_bytes * projection
    moved = {
        "down_extractor": extractor,
        "down_rows": each_way,
        "down_seed": SEED_BYTES,
        "down_projection": head,
        "up_ids": ID_BYTES * num_rows * sends_ids,
        "up_extractor": extractor * answers,
        "up_rows": each_way * answers,
        "up_projection": head * answers,
    }
    not_trained = {"down_frozen": number_bytes * frozen} if frozen else {}
    return Traffic({flow: moved[flow] for flow in FLOWS[rows]} | not_trained)
