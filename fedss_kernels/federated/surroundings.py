"""What a simulation meets on this machine: where prepared data go, locks, kinds of images."""

import importlib.util
import shutil
import tempfile
import warnings
from pathlib import Path

from .data.cache import default_cache_dir
from .data.class_folders import OF_PICTURES, image_endings
from .lock import Lock


def surroundings() -> dict[str, str]:
    """What -> how it is, in words. Leaves nothing behind."""
    folder = default_cache_dir()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    try:
        with tempfile.NamedTemporaryFile(dir=there) as file:
            locks = _locks(Path(file.name))
    except OSError as error:
        return {"cache": f"{folder}, which cannot be written: {error.strerror}", "images": _images()}
    free = shutil.disk_usage(there).free / 1e9
    return {"cache": f"{folder}, {free:,.0f} GB free", "locks": locks, "images": _images()}


def _locks(file: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lock = Lock(file)
        held = lock.held
        lock.release()
    return "kept there" if held else "none there: nothing keeps two runs out of one folder"


def _images() -> str:
    if importlib.util.find_spec("PIL") is None:
        return "none: pillow is not installed"
    endings = image_endings()
    missing = [ending for ending in OF_PICTURES if ending not in endings]
    return f"{len(endings)} endings" + f", not {', '.join(missing)}" * bool(missing)
