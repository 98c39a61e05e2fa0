"""Image files as one array in the cache: decoded and resized once, then mapped, not read.

The array is a .npy file of (N, 3, size, size) uint8. What is mapped takes memory only where it is looked at,
so that it may be larger than memory. Pillow decodes, extra `sim`.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from .cache import default_cache_dir

VERSION = 1  # raise it whenever the same files would give another array
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff")
BATCH = 1024  # images decoded at a time
NAMED = 5  # files that an error names
log = logging.getLogger(__name__)


def cached_images(
    name: str,  # of the data set
    parts: Sequence[Sequence[Path]],
    image_size: int,
    cache_dir: Path | None,
    source: str,  # where the files come from
) -> list[Tensor]:  # of each part (N, 3, image_size, image_size) uint8, mapped
    """Every file's image, resized to image_size x image_size; decoded once for the same files and size.

    Raises FileNotFoundError for files that are missing, ValueError for images that can't be read, OSError
    where the cache has no room: each says which, and the first two where to get them. What is missing, or has
    no room, is said before anything is decoded.
    """
    if image_size < 1:
        raise ValueError(f"image_size: expected at least 1, got {image_size}")
    if not all(parts):
        raise ValueError(f"{name}: no images; get them from {source}")
    keys = _fingerprints(name, parts, image_size, source)
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    paths = [folder / f"{name}-{image_size}-{key}.npy" for key in keys]
    shapes = [(len(files), 3, image_size, image_size) for files in parts]
    missing = [i for i, path in enumerate(paths) if not _is_whole(path, shapes[i])]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        _check_room(folder, sum(math.prod(shapes[i]) for i in missing), name)
    for i in missing:
        _make(name, parts[i], shapes[i], paths[i], source)
    return [map_images(path, shape) for path, shape in zip(paths, shapes, strict=True)]


def _fingerprints(name: str, parts: Sequence[Sequence[Path]], image_size: int, source: str) -> list[str]:
    """Of all that each array depends on: each file's name, size and time of change among it."""
    import PIL

    found, missing = [], []
    for files in parts:
        digest = hashlib.sha256(json.dumps([VERSION, PIL.__version__, image_size]).encode())
        for file in files:
            try:
                stat = file.stat()
            except FileNotFoundError:
                missing.append(str(file))
            else:
                digest.update(f"{file.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        found.append(digest.hexdigest()[:16])
    if missing:
        raise FileNotFoundError(
            f"{name}: {len(missing)} of {sum(map(len, parts))} images are missing: {_some(missing)}; "
            f"get them from {source}"
        )
    return found


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


# ---- making it


def _make(name: str, files: Sequence[Path], shape: tuple[int, ...], path: Path, source: str) -> None:
    """Under another name first, so that no reader sees half of it, whoever else writes the same file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            _write_header(file, shape)
            damaged = []
            for done, image in enumerate(_decoded(files, shape[-1]), start=1):
                if isinstance(image, str):
                    damaged.append(image)
                elif not damaged:
                    file.write(image)
                if done % 10_000 == 0:
                    log.info("%s: %d of %d images decoded", name, done, len(files))
        if damaged:
            raise ValueError(
                f"{name}: {len(damaged)} of {len(files)} images are damaged: {_some(damaged)}; get them "
                f"again from {source}"
            )
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _check_room(folder: Path, needed: int, name: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{name}: the resized images need {needed / 1e9:,.1f} GB in {folder}, which has "
            f"{free / 1e9:,.1f} GB free: set cache_dir to another folder, or image_size to fewer pixels"
        )


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _decoded(files: Sequence[Path], size: int) -> Iterator[bytes | str]:
    """Of each file in turn its pixels, or what is wrong with it."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow lets others work meanwhile
        for first in range(0, len(files), BATCH):
            yield from pool.map(lambda file: _decoded_or_damage(file, size), files[first : first + BATCH])


def _decoded_or_damage(file: Path, size: int) -> bytes | str:
    try:
        return decode(file.read_bytes(), size)
    except Exception as error:  # a damaged image may raise anything
        return f"{file} ({error})"


def decode(content: bytes, size: int) -> bytes:
    """An image file's content as the 3 * size * size bytes of its channels, red first.

    The whole image is resized, whatever its proportions, each pixel an average of those that it covers.
    """
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        more_bits = image.mode[0] in "IF"
        narrow = Image.fromarray(_of_8_bits(np.asarray(image))) if more_bits else image
        colour = narrow.convert("RGB")
    if colour.size != (size, size):
        colour = colour.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(colour).transpose(2, 0, 1).tobytes()


def _of_8_bits(grey: np.ndarray) -> np.ndarray:
    """A grey image of 16 bits, which `convert` would clip. Raises ValueError for other numbers."""
    if grey.dtype.kind == "f" or grey.min() < 0 or grey.max() > 0xFFFF:
        raise ValueError(f"expected 8 or 16 bits a channel, got {grey.dtype}, {grey.min()} to {grey.max()}")
    return (grey / 257).round().astype(np.uint8)


# ---- reading it


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        with open(path, "rb") as file:
            return _header(file) == shape and path.stat().st_size == file.tell() + math.prod(shape)
    except (OSError, ValueError):  # not there, or damaged: it is made again
        return False


def _header(file: BinaryIO) -> tuple[int, ...]:
    np.lib.format.read_magic(file)
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    return shape if dtype == np.uint8 and not fortran_order else ()


def map_images(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The array in a file of `cached_images`. What is written to it stays in this process.

    As a private mapping must be backed by memory in case it is written to, the system would refuse one that
    is larger than memory, were it not told that nothing need be kept for it (MAP_NORESERVE).
    """
    with open(path, "rb") as file:
        _header(file)
        start = file.tell()
        if sys.platform == "linux":
            unreserved = getattr(mmap, "MAP_NORESERVE", 0x4000)
            mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | unreserved)
        else:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    pixels = np.frombuffer(mapping, np.uint8, offset=start).reshape(shape)
    images = torch.from_numpy(pixels)
    vars(images)["mapped_from"] = Path(path)
    return images


def mapped_from(images: Tensor) -> Path | None:
    """The file that `map_images` mapped them from."""
    return vars(images).get("mapped_from")
