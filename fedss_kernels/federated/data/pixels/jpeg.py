"""JPEG files without their end."""

from __future__ import annotations

import io
import re

JPEG_END = b"\xff\xd9"


def _other_bits(bits: int, first: int) -> bytes:
    """Bits, and restart markers from the number `first` on, each with bits after it.

    A decoder that waits for a marker skips the bits before it, and resumes with those after the one that it
    waits for, unless it meets one of the two after that first: not both times, from 0 on and from 4 on.
    """
    some = bytes([bits]) * 64
    return some + b"".join(bytes([0xFF, 0xD0 + (first + i) % 8]) + some for i in range(8))


CONTINUATIONS = (b"", _other_bits(0x55, 0), _other_bits(0xAA, 4))


def only_unterminated(content: bytes) -> bool:
    """Whether every pixel of a JPEG file is there, and only its end marker is not.

    libjpeg fills in what is missing and does not tell through Pillow. But then the pixels depend on what is
    put in its place.
    """
    from PIL import Image

    content = content.removesuffix(b"\xff")
    found = set()
    for continuation in CONTINUATIONS:
        try:
            with Image.open(io.BytesIO(content + continuation + JPEG_END)) as image:
                if image.info.get("progressive") and not _all_scans(content):
                    return False
                found.add(image.tobytes())
        except OSError:
            return False
    return len(found) == 1


def _all_scans(content: bytes) -> bool:
    """Whether a progressive JPEG has each coefficient of each component to its last bit.

    A scan's header says which components, coefficients and bits it has: after FF DA and its own length, the
    number of components, two bytes for each, the first and last coefficient, the bits (high, low).
    """
    at = 2
    while content[at + 1 : at + 2] != b"\xda" and at < len(content):  # the segments before the first scan
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    lowest: dict[tuple[int, int], int] = {}
    for scan in re.finditer(rb"\xff\xda\x00.([\x01-\x04])", content[at:], re.DOTALL):
        count, header = scan[1][0], content[at + scan.end() :]
        if len(header) < 2 * count + 3:
            return False
        first, last, bits = header[2 * count : 2 * count + 3]
        for component in header[: 2 * count : 2]:
            lowest |= dict.fromkeys(((component, i) for i in range(first, last + 1)), bits & 15)
    components = {component for component, _ in lowest}
    return bool(components) and all(lowest.get((c, i)) == 0 for c in components for i in range(64))
