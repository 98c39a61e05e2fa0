"""Stanford Online Products: 120,053 photographs of 22,634 products (Song et al., CVPR 2016).

A product is a class. The authors' test classes are none of training's, so the task is retrieval. Nobody knows
who took the photographs: as in the FedSS paper (4.3), the training images go to 596 clients of about 100
images and 20 classes. Read from what Stanford_Online_Products.zip unpacks to:

    Ebay_train.txt, Ebay_test.txt     image_id class_id super_class_id path: a header, a line for each image
    bicycle_final/111085122871_0.JPG  the paths in them
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .class_folders import ByClass
from .federated_data import FederatedData, Found
from .image_folder import from_files
from .images import OnProgress
from .partition import Partition
from .saved_text import text_of

SOURCE = "https://cvgl.stanford.edu/projects/lifted_struct/ (Stanford_Online_Products.zip)"
HEADER = ["image_id", "class_id", "super_class_id", "path"]
LISTS = ("Ebay_train.txt", "Ebay_test.txt")


def load_sop(
    *,
    data_dir: Path | None,
    seed: int,
    task: str = "retrieval",
    cache_dir: Path | None = None,
    image_size: int = 256,
    skip_damaged: bool = False,
    on_progress: OnProgress | None = None,
    how: Partition | None = None,
    on_found: Callable[[Found], None] | None = None,
) -> FederatedData:
    """Reads `data_dir` or its folder Stanford_Online_Products; `seed` draws the clients."""
    if task != "retrieval":
        raise ValueError(f"task: sop's test classes are none of training's: expected retrieval, got {task!r}")
    folder = find_folder(data_dir)
    train, test = (read_list(folder / name) for name in LISTS)
    if both := [c for c in test if c in train]:
        raise ValueError(
            f"sop: class {both[0]} is in both {' and '.join(LISTS)} of {folder}; get them again from {SOURCE}"
        )
    return from_files(
        "sop",
        train,
        test,
        task=task,
        seed=seed,
        image_size=image_size,
        cache_dir=cache_dir,
        source=SOURCE,
        skip_damaged=skip_damaged,
        on_progress=on_progress,
        how=how or Partition("classes"),
        on_found=on_found,
    )


def find_folder(data_dir: Path | None) -> Path:
    """The folder that holds both lists."""
    if data_dir is None:
        raise FileNotFoundError(
            f"sop: no folder given to look for {' and '.join(LISTS)} in; get them from {SOURCE}"
        )
    folder = Path(data_dir)
    inside = folder / "Stanford_Online_Products"
    folder = inside if inside.is_dir() else folder
    missing = [name for name in LISTS if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"sop: looked for {' and '.join(missing)} in {folder}; get them from {SOURCE}"
        )
    return folder


def read_list(path: Path) -> ByClass:
    """The images of each class, by class_id, ascending. Raises ValueError, with the line, for an odd one."""
    try:
        lines = text_of(path.read_bytes(), "surrogateescape").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"sop: {path} is damaged ({error.encoding}: {error.reason}); get it again from {SOURCE}"
        ) from None
    if not lines or lines[0].split() != HEADER:
        raise ValueError(
            f"sop: {path}, line 1: expected {' '.join(HEADER)!r}, got {''.join(lines[:1])[:80]!r}; get it "
            f"again from {SOURCE}"
        )
    found: dict[int, list[Path]] = {}
    for number, line in enumerate(lines[1:], start=2):
        words = line.split()
        if len(words) != len(HEADER) or not all(word.isdecimal() for word in words[:3]):
            raise ValueError(
                f"sop: {path}, line {number}: expected three numbers and a path, got {line[:80]!r}; get it "
                f"again from {SOURCE}"
            )
        found.setdefault(int(words[1]), []).append(path.parent / words[3])
    if not found:
        raise ValueError(f"sop: {path} lists no images; get it again from {SOURCE}")
    return {str(c): found[c] for c in sorted(found)}
