"""The text of a list, as its authors, an editor or a spreadsheet saved it."""

from __future__ import annotations

import codecs


def text_of(content: bytes, errors: str = "strict") -> str:
    """In UTF-8, with a byte order mark or without, or in UTF-16 with one; without blank lines at the end.

    Raises UnicodeDecodeError, of UTF-16 also with "surrogateescape", as where it ends within a character.
    """
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if marked else "utf-8-sig", errors).rstrip()
