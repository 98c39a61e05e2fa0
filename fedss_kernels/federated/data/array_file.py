"""Images as one .npy file that is mapped, not read, and can be filled bit by bit:

    header | (N, 3, size, size) uint8 | N digests of 16 bytes, of what each image was made from

A digest of zeros: the image is not there yet. As it is written after its image, the file can be gone on with
wherever its writer was stopped. What is mapped takes memory only where it is looked at, so that it may be
larger than memory.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import time
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

DIGEST = np.dtype("V16")
KEPT_EVERY = 1.0  # seconds; what was put since is lost where the process is killed
Shape = tuple[int, ...]


class ArrayFile:
    """Such a file, open. With `shape` it is made one of this shape, if it isn't, and can be filled.

    Raises ValueError where it should be one and is not.
    """

    def __init__(self, path: Path, shape: Shape | None = None):
        self.file = open(path, "r+b" if shape else "rb")
        try:
            self.shape = shape or read_header(self.file)
            if shape and not _has_header(self.file, shape):
                self.file.truncate(0)
                self.file.seek(0)
                write_header(self.file, shape)
            self.start = self.file.tell()
            self._read_digests(fill=shape is not None)
        except BaseException:
            self.file.close()
            raise
        self.pending: list[int] = []  # images that are there, but not their digests
        self.kept = time.monotonic()

    def _read_digests(self, fill: bool) -> None:
        size = file_size(self.shape, self.start)
        if fill:
            self.file.truncate(size)  # a hole, but for what is there
        if len(self.shape) != 4 or os.fstat(self.file.fileno()).st_size != size:
            raise ValueError(f"{self.file.name} is no whole file of images")
        self.image_bytes = math.prod(self.shape[1:])
        self.tail = size - DIGEST.itemsize * self.shape[0]
        self.file.seek(self.tail)
        self.digests = np.frombuffer(bytearray(self.file.read()), DIGEST)

    def image(self, i: int) -> bytes:
        self.file.seek(self.start + i * self.image_bytes)
        return self.file.read(self.image_bytes)

    def put(self, i: int, image: bytes, digest: bytes) -> None:
        self.file.seek(self.start + i * self.image_bytes)
        self.file.write(image)
        self.digests[i] = np.void(digest)
        self.pending.append(i)
        if time.monotonic() - self.kept > KEPT_EVERY:
            self._keep()

    def _keep(self) -> None:
        """What was put is there from now on, even where the power fails."""
        self.file.flush()
        os.fsync(self.file.fileno())
        for i in self.pending:
            self.file.seek(self.tail + i * DIGEST.itemsize)
            self.file.write(self.digests[i].tobytes())
        self.file.flush()
        self.pending.clear()
        self.kept = time.monotonic()

    def close(self) -> None:
        try:
            if self.pending:
                self._keep()
        finally:
            self.file.close()


def file_size(shape: Shape, start: int) -> int:
    return start + math.prod(shape) + DIGEST.itemsize * (shape[0] if shape else 0)


def is_whole(path: Path, shape: Shape) -> bool:
    try:
        with open(path, "rb") as file:
            return read_header(file) == shape and path.stat().st_size == file_size(shape, file.tell())
    except (OSError, ValueError):  # not there, or damaged: it is made again
        return False


def _has_header(file: BinaryIO, shape: Shape) -> bool:
    try:
        return read_header(file) == shape
    except ValueError:  # a new file, or nonsense
        return False


def write_header(file: BinaryIO, shape: Shape) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def read_header(file: BinaryIO) -> Shape:
    np.lib.format.read_magic(file)
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    return shape if dtype == np.uint8 and not fortran_order else ()


def map_images(path: Path, shape: Shape) -> Tensor:
    """The images of a whole file. What is written to them stays in this process.

    As a private mapping must be backed by memory in case it is written to, the system would refuse one that
    is larger than memory, were it not told that nothing need be kept for it (MAP_NORESERVE).
    """
    with open(path, "rb") as file:
        read_header(file)
        start = file.tell()
        if sys.platform == "linux":
            unreserved = getattr(mmap, "MAP_NORESERVE", 0x4000)
            mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | unreserved)
        else:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    pixels = np.frombuffer(mapping, np.uint8, count=math.prod(shape), offset=start).reshape(shape)
    images = torch.from_numpy(pixels)
    vars(images)["mapped_from"] = Path(path)
    return images


def mapped_from(images: Tensor) -> Path | None:
    """The file that `map_images` mapped them from."""
    return vars(images).get("mapped_from")
