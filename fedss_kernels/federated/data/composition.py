"""Names that look the same and are not: letters with accents in one piece or in two (Unicode's NFC and NFD).

What was packed on a Mac has often two, what was written elsewhere one; to most file systems these are others.
"""

import unicodedata
from collections.abc import Iterable


def in_one_piece(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def alike(names: Iterable[str], others: Iterable[str]) -> tuple[str, str] | None:
    """The first of `names` that looks as one of `others` and is not the same, and that one."""
    there = {in_one_piece(other): other for other in others}
    pairs = ((name, there.get(in_one_piece(name), name)) for name in names)
    return next((pair for pair in pairs if pair[0] != pair[1]), None)


def told_apart(name: str, other: str) -> str:
    r""" "'caf\xe9' and 'cafe\u0301' are one name, composed otherwise (Unicode's NFC and NFD)" """
    return f"{ascii(name)} and {ascii(other)} are one name, composed otherwise (Unicode's NFC and NFD)"
