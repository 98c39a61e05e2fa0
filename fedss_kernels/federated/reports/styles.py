"""How methods are drawn: each has one colour and one mark, in every plot; its further lines have dashes."""

from collections.abc import Sequence

from ..algorithms import OURS

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)  # Okabe and Ito's, on light and dark
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", ":", "-.")
_ALL = range(len(COLOURS) * len(MARKERS))


def style(method: str) -> dict[str, str]:
    """That of a method of the package, whatever else is in the plot."""
    return _style(OURS.index(method))


def styles(methods: Sequence[str]) -> list[dict[str, str]]:
    """One for each line of a plot, no two alike while there are no more than 36.

    The first line of a method of the package has the method's own, that of another a colour that no line has,
    while there are some. Further lines of a method have marks that are free, in its colour while there are
    some, and there rather of no other method; and dashes, of which there are three.
    """
    taken, first, looks = {OURS.index(method) for method in methods if method in OURS}, dict[str, int](), []
    for nth, method in enumerate(methods):
        if method in first:
            number = _free(taken, first[method])
        else:
            number = OURS.index(method) if method in OURS else _unlike(taken)
        first.setdefault(method, number)
        taken.add(number)
        looks.append(_style(number, methods[:nth].count(method)))
    return looks


def _free(taken: set[int], number: int) -> int:
    """One that is not taken, the nearest to this; this itself where all are."""

    def apart(other: int) -> tuple[bool, bool, int]:
        return (other - number) % len(COLOURS) > 0, other < len(OURS), other

    return min((other for other in _ALL if other not in taken), key=apart, default=number)


def _unlike(taken: set[int]) -> int:
    """One that is not taken, of a colour that as few as can be have, and of such a mark."""
    of_colours, marks = [number % len(COLOURS) for number in taken], [_mark(number) for number in taken]

    def alike(other: int) -> tuple[int, int, bool, int]:
        same = of_colours.count(other % len(COLOURS)), marks.count(_mark(other))
        return *same, other < len(OURS), other

    return min((other for other in _ALL if other not in taken), key=alike, default=0)


def _style(number: int, nth: int = 0) -> dict[str, str]:
    """The number-th of 36, for the nth line of a method."""
    dashes = DASHES[nth % len(DASHES)]
    return {"color": COLOURS[number % len(COLOURS)], "marker": _mark(number), "linestyle": dashes}


def _mark(number: int) -> str:
    return MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
