"""Commands that a message tells the user to paste into a shell."""

import shlex

from .plugins import noted


def to_paste(*words: object) -> str:
    """`fedss` with these words, and with the files of methods of one's own that this process has imported."""
    files = [each for file in noted() for each in ("--plugin", file)]
    return shlex.join(map(str, ("fedss", *words, *files)))
