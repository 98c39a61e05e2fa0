"""A process that decodes."""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

from . import decode, unlimited
from .failures import failure, read_file

LENGTH = struct.Struct("<cQ")  # before an answer: PIXELS or a Fault, its bytes
PIXELS = b"="


def serve(size: int, questions: BinaryIO, answers: BinaryIO) -> None:
    """Of each file whose path comes, in a line of hexadecimal digits, the pixels or a Failure's reason."""
    with unlimited:
        for line in questions:
            path = os.fsdecode(bytes.fromhex(line.decode()))
            try:
                kind, answer = PIXELS, decode(read_file(path), size)
            except Exception as error:
                found = failure(error)
                kind, answer = found.fault.value, found.reason.encode("utf-8", "replace")
            answers.write(LENGTH.pack(kind, len(answer)) + answer)
            answers.flush()
