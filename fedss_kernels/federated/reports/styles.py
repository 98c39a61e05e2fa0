"""How methods are drawn: each has one colour and one mark, in every plot."""

from collections.abc import Sequence

from ..algorithms import METHODS

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)  # Okabe and Ito's, on light and dark
MARKERS = ("o", "s", "^", "D", "v", "P")
_ALL = range(len(COLOURS) * len(MARKERS))


def style(method: str) -> dict[str, str]:
    """A method's own, whatever else is in the plot."""
    return _style(list(METHODS).index(method))


def styles(methods: Sequence[str]) -> list[dict[str, str]]:
    """One for each line of a plot, no two alike while there are no more than 36.

    A method's first line has the method's own. Its further ones have marks that are free, in its colour while
    there are some, and there rather of no other method. So have the lines of what is no method.
    """
    names = list(METHODS)
    own = [names.index(method) if method in names else None for method in methods]
    numbers, taken = list[int](), {number for number in own if number is not None}
    for i, number in enumerate(own):
        if number is None or number in own[:i]:
            number = _free(taken, number or 0)
            taken.add(number)
        numbers.append(number)
    return [_style(number) for number in numbers]


def _free(taken: set[int], number: int) -> int:
    """One that is not taken, the nearest to this; this itself where all are."""

    def apart(other: int) -> tuple[bool, bool, int]:
        return (other - number) % len(COLOURS) > 0, other < len(METHODS), other

    return min((other for other in _ALL if other not in taken), key=apart, default=number)


def _style(number: int) -> dict[str, str]:
    """The number-th of 36."""
    marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
    return {"color": COLOURS[number % len(COLOURS)], "marker": marker}
