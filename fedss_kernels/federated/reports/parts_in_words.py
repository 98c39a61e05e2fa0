"""Where the parts of a model stand in a method, and what follows from it, in words."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..algorithms import METHODS, Method
from ..algorithms.parts import Part


@dataclass(frozen=True)
class Place:
    """Of one method, or of several that are alike in this."""

    net: str
    rows: str  # the class rows
    moves: str  # between a client and the server
    in_a_round: str  # what happens in the {rounds} of {cohort}, which are so many clients, {size}, in words
    held: str  # what |S_k| counts
    matrix: str  # who has the class matrix


HEADER = ("method", "the net", "class rows", "what moves")
PERSONALISED = {"head": "the class rows", "body": "the net", "full": "the net and the class rows"}
_POOLED = Place(
    net="trained in one place",
    rows="trained in one place",
    moves="nothing, once the images are there",
    in_a_round="Here all the images are in one place: in each of {rounds} rounds the model takes as many "
    "steps as a client would, each on as many images as those of {size} clients together.",
    held="class rows in the loss",
    matrix="All the class rows, C of them.",
)
_POOLED_WITHOUT_ROWS = replace(
    _POOLED, rows="none", held="class rows: there are none", matrix="There is none."
)
_ALONE = Place(
    net="each client's own",
    rows="each client's own",
    moves="nothing",
    in_a_round="In each of {rounds} rounds {cohort} train models of their own, each on its own images. "
    "Nothing is shared and nothing moves.",
    held="class rows that a client trains, on average",
    matrix="All the class rows, C of them. Each client has its own.",
)
_SPLIT = Place(
    net="its first blocks averaged, the rest at the server",
    rows="none",
    moves="what the first blocks make of images, its gradients, and the first blocks",
    in_a_round="In each of {rounds} rounds {cohort} and the server train a net together, step by step: the "
    "clients have its first blocks and send what these make of their images, the server has the rest and "
    "sends gradients back; now and then the clients' blocks are averaged.",
    held="class rows, which are not used",
    matrix="There is none.",
)
_BY_ROWS = {
    Part.TRAINED: Place(
        net="averaged",
        rows="averaged",
        moves="the net and class rows",
        in_a_round="In each of {rounds} rounds {cohort} download the net and some class rows, train on their "
        "own images, and upload what changed; the server averages.",
        held="class rows that a client gets, on average",
        matrix="All the class rows, C of them. The server keeps it.",
    ),
    Part.KNOWN: Place(
        net="averaged",
        rows="random, the same for all, never trained",
        moves="the net, and a seed for the class rows",
        in_a_round="In each of {rounds} rounds {cohort} download the net, train it on their own images "
        "against class rows that each draws from a seed, the same for all, and upload what changed of the "
        "net; the server averages.",
        held="class rows that a client draws from the seed, on average",
        matrix="All the class rows, C of them, a function of the seed.",
    ),
    Part.HOME: Place(
        net="averaged",
        rows="each client's own",
        moves="the net",
        in_a_round="In each of {rounds} rounds {cohort} download the net, train it and class rows of their "
        "own on their own images, and upload what changed of the net; the server averages.",
        held="class rows that a client keeps and trains, on average",
        matrix="All the class rows, C of them. Each client has its own.",
    ),
    Part.ABSENT: Place(
        net="averaged",
        rows="none",
        moves="the net, and a projection head",
        in_a_round="In each of {rounds} rounds {cohort} download the net and a small head on top of it, "
        "train both on their own images without a label, and upload what changed; the server averages.",
        held="class rows: there are none",
        matrix="There is none.",
    ),
}
_MIXED = (
    "In each of {rounds} rounds {cohort} train. The methods differ in what of the model clients share, and "
    "so in what moves."
)


def place(method: Method) -> Place:
    if method.pooled:
        return _POOLED_WITHOUT_ROWS if method.rowless else _POOLED
    if method.split:
        return _SPLIT
    return _ALONE if method.alone else _BY_ROWS[method.rows]


def in_a_round(names: Sequence[str]) -> str:
    """What happens in these methods, with {rounds}, {cohort} and {size} to be filled in."""
    found = dict.fromkeys(place(METHODS[name]).in_a_round for name in names)
    return next(iter(found)) if len(found) == 1 else _MIXED


def matrix(names: Sequence[str]) -> str:
    """What the class matrix is in all of these methods."""
    found = dict.fromkeys(place(METHODS[name]).matrix for name in names)
    return next(iter(found)) if len(found) == 1 else _POOLED.matrix


def cells(method: Method) -> list[str]:
    """Under HEADER."""
    found = place(method)
    return [method.label, found.net, found.rows, found.moves]
