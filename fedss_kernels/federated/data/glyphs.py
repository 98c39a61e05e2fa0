"""Glyphs: a many-class data set that needs no download, drawn from the DejaVu fonts inside matplotlib.

A class is a character; an alphabet is a run of them in the order of a dictionary, accented letters beside
their bare ones (A to C and its forms, a stretch of Cyrillic, of arrows, ...); a client is a writer: one
face (family, weight, slope) and one hand (slant, stroke, size, distortion, noise), who writes one alphabet
and never another. So clients are non-IID twice, in what they write and in how. The test set's writers write
nothing in training. The same bytes come on every run of a seed: each writer draws from a stream of their
own.
"""

from __future__ import annotations

import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...plotting import import_matplotlib
from .cache import Arrays, cached_arrays
from .drawings import Drawings, partition
from .federated_data import FederatedData
from .partition import Partition

VERSION = 2  # raise it whenever the same settings would give other bytes
SIZE = 28  # of a drawing, in pixels
FRAME = 64  # of the clean bitmap that a drawing is sampled from
FONT_SIZE = 48  # of the clean bitmap, in its pixels: tall capitals and most accents fit the frame
SIMILARITY = (0.8, 0.85, 0.9, 0.95, 0.99)  # limits of the cosine of two classes' clean bitmaps
REFERENCE_FACE = "DejaVuSans"
FACES = tuple(
    f"DejaVu{family}{style}"
    for family, slope in (("Sans", "Oblique"), ("Serif", "Italic"), ("SansMono", "Oblique"))
    for style in ("", "-Bold", f"-{slope}", f"-Bold{slope}")
)
# Letters, digits, signs. Left out: spaces and controls, marks that attach to a letter, and modifiers and
# brackets, which are mostly small or raised copies of others.
CATEGORIES = frozenset(("Lu", "Ll", "Lt", "Lo", "Nd", "No", "Po", "Sc", "Sm", "So"))
# Lines and blocks that differ only in where they are; the box that stands for a character that is missing.
BOXES = frozenset((*range(0x2500, 0x25A0), 0xFFFD))


@dataclass(frozen=True)
class GlyphSettings:
    """All that the drawings depend on, besides the fonts."""

    seed: int
    num_classes: int = 540
    writers: int = 800
    test_writers: int | None = None  # by default three for each alphabet
    classes_per_writer: int = 15  # one alphabet's; sizes differ by one where it doesn't divide num_classes
    drawings_per_class: int = 2  # of each class, by each of its writers

    def __post_init__(self) -> None:
        for name in ("num_classes", "writers", "classes_per_writer", "drawings_per_class"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.test_writers is None:
            object.__setattr__(self, "test_writers", 3 * self.alphabets)
        for name in ("writers", "test_writers"):
            if getattr(self, name) < self.alphabets:
                raise ValueError(
                    f"{name}: expected at least {self.alphabets}, one for each alphabet of "
                    f"{self.classes_per_writer} of the {self.num_classes} classes, got {getattr(self, name)}"
                )

    @property
    def alphabets(self) -> int:
        return max(1, round(self.num_classes / self.classes_per_writer))


def load_glyphs(
    *,
    seed: int,
    data_dir: Path | None = None,
    task: str = "classification",
    cache_dir: Path | None = None,
    holdout: float = 0.25,
    how: Partition | None = None,
    **settings: Any,
) -> FederatedData:
    """Draws the data set, or reads it from the cache; `settings` are GlyphSettings' fields.

    holdout: the share of the alphabets that a retrieval keeps for its test. 28x28 images, ink is high.
    """
    chosen = GlyphSettings(seed=seed, **settings)
    import PIL

    versions = {
        "matplotlib": import_matplotlib().__version__,
        "pillow": PIL.__version__,
        "numpy": np.__version__,
    }
    key = {"version": VERSION, **versions, **asdict(chosen)}
    return partition(
        "glyphs",
        _table(cached_arrays("glyphs", key, lambda: draw(chosen), cache_dir)),
        task,
        seed,
        holdout,
        how,
    )


def _table(arrays: Arrays) -> Drawings:
    code_points, alphabet = arrays["code_points"], arrays["alphabet"]
    first = [int(code_points[alphabet == a][0]) for a in range(int(alphabet.max()) + 1)]
    return Drawings(
        images=arrays["images"],
        character=arrays["character"],
        person=arrays["writer"],
        in_test=arrays["in_test"],
        character_names=tuple(
            f"U+{c:04X} {unicodedata.name(chr(c), '')}".strip() for c in code_points.tolist()
        ),
        alphabet=alphabet,
        alphabet_names=tuple(f"from U+{c:04X}" for c in first),
    )


def draw(settings: GlyphSettings) -> Arrays:
    """The whole data set: every writer's drawings of every character of their alphabet."""
    code_points = choose_code_points(settings.num_classes)
    alphabets = np.array_split(np.arange(settings.num_classes), settings.alphabets)
    clean = {face: soften(clean_bitmaps(face, code_points)) for face in FACES}
    places = [*range(settings.writers), *range(settings.test_writers or 0)]
    characters = [np.repeat(alphabets[p % len(alphabets)], settings.drawings_per_class) for p in places]
    images = [write(clean, character, settings.seed, w) for w, character in enumerate(characters)]
    writer = np.repeat(np.arange(len(places)), [len(character) for character in characters])
    return {
        "images": np.concatenate(images),
        "character": np.concatenate(characters).astype(np.int64),
        "writer": writer.astype(np.int64),
        "in_test": writer >= settings.writers,
        "code_points": np.array(code_points, dtype=np.int64),
        "alphabet": np.repeat(np.arange(len(alphabets)), [len(a) for a in alphabets]),
    }


# ---- characters and their clean bitmaps


def shared_code_points(faces: tuple[str, ...] = FACES) -> list[int]:
    """The code points that every one of `faces` has a glyph of, sorted."""
    import_matplotlib()
    from matplotlib.ft2font import FT2Font

    return sorted(set.intersection(*(set(FT2Font(str(_font_file(face))).get_charmap()) for face in faces)))


def choose_code_points(count: int) -> list[int]:
    """`count` characters, evenly over the code chart, as different as so many can be in the reference face.

    Of characters that look the same (A, Alpha and the Cyrillic A; or nearly, by the first limit in
    SIMILARITY that leaves enough), the first stays. They come in the order of a dictionary, by what they
    decompose to, so that those easily confused mostly share an alphabet.
    """
    candidates = [
        c for c in shared_code_points() if unicodedata.category(chr(c)) in CATEGORIES and c not in BOXES
    ]
    bitmaps = clean_bitmaps(REFERENCE_FACE, candidates)
    for limit in SIMILARITY:
        kept = distinct(bitmaps, limit)
        if len(kept) >= count:
            break
    else:
        raise ValueError(
            f"num_classes: expected at most {len(kept)}, the characters that can be told apart, got {count}"
        )
    chosen = [candidates[kept[i]] for i in np.arange(count) * len(kept) // count]
    return sorted(chosen, key=lambda c: (unicodedata.normalize("NFKD", chr(c)), c))


def distinct(bitmaps: np.ndarray, limit: float) -> list[int]:
    """The rows of bitmaps (n, FRAME, FRAME) neither blank nor nearly one kept before (cosine > `limit`)."""
    coarse = bitmaps.reshape(len(bitmaps), FRAME // 4, 4, FRAME // 4, 4).astype(np.int64).sum((2, 4)) // 16
    # Whole numbers below 2^53, so exact in float64: in whatever order they are added, the choice is the same.
    flat = coarse.reshape(len(bitmaps), -1).astype(np.float64)
    product = flat @ flat.T
    norm = np.sqrt(np.diag(product))
    alike = product > limit * np.outer(norm, norm)
    kept: list[int] = []
    for i in np.flatnonzero(norm > 0).tolist():
        if not alike[i, kept].any():
            kept.append(i)
    return kept


def clean_bitmaps(face: str, code_points: list[int]) -> np.ndarray:
    """Undistorted glyphs, centred in their frames: (n, FRAME, FRAME) uint8; a space is blank."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(_font_file(face)), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    bitmaps = np.zeros((len(code_points), FRAME, FRAME), dtype=np.uint8)
    for bitmap, code_point in zip(bitmaps, code_points, strict=True):
        left, top, right, bottom = font.getbbox(chr(code_point))
        if right > left and bottom > top:
            page = Image.new("L", (FRAME, FRAME))
            corner = ((FRAME - left - right) // 2, (FRAME - top - bottom) // 2)
            ImageDraw.Draw(page).text(corner, chr(code_point), fill=255, font=font)
            bitmap[:] = np.asarray(page)
    return bitmaps


def soften(bitmaps: np.ndarray) -> np.ndarray:
    """Blurs (n, FRAME, FRAME) uint8 by 1.4 pixels: cut at a height, strokes are then thinner or thicker.

    Each is scaled to a highest value of 255.
    """
    soft = bitmaps.astype(np.uint16)
    for axis in (1, 2, 1, 2):
        edge = [(0, 0), (0, 0), (0, 0)]
        edge[axis] = (2, 2)
        padded = np.pad(soft, edge)
        near = [padded.take(range(i, i + FRAME), axis) for i in range(5)]
        soft = (near[0] + 4 * near[1] + 6 * near[2] + 4 * near[3] + near[4] + 8) // 16
    peak = np.maximum(
        soft.max((1, 2), keepdims=True), 1
    )  # of a hair line it is low: it would not survive the cut
    return (soft.astype(np.uint32) * 255 // peak).astype(np.uint8)


def _font_file(face: str) -> Path:
    path = Path(import_matplotlib().get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    if not path.is_file():
        raise FileNotFoundError(
            f"glyphs: no font {path}; it ships with matplotlib: reinstall that (pip install matplotlib)"
        )
    return path


# ---- a writer's hand


def write(clean: dict[str, np.ndarray], character: np.ndarray, seed: int, writer: int) -> np.ndarray:
    """One writer's drawings of `character` (n,): (n, SIZE, SIZE) uint8, a function of its arguments."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 0x3417E, writer])))
    source = clean[FACES[rng.integers(len(FACES))]]
    n = len(character)
    threshold = rng.uniform(70, 160)  # of 255: low is a thick stroke
    noise = rng.uniform(0, 30)
    rows, columns = _where_to_look(rng, n)
    ink = (_sample(source, character, rows, columns) - np.float32(threshold)) * np.float32(
        255 / 70
    ) + np.float32(127)
    ink += rng.standard_normal((n, SIZE, SIZE), dtype=np.float32) * np.float32(noise)
    return np.clip(ink, 0, 255).astype(np.uint8)


def _where_to_look(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The point of the clean frame that each pixel of n drawings shows: two (n, SIZE, SIZE), in its pixels.

    Size, proportion, slant, rotation and the large bends are the writer's own; each drawing departs a
    little from them.
    """

    def hand(own: float, each: float) -> np.ndarray:
        return (rng.normal(0, own) + rng.normal(0, each, n)).astype(np.float32)[:, None, None]

    size, proportion, slant, turn = hand(0.08, 0.04), hand(0.08, 0.04), hand(0.15, 0.05), hand(0.08, 0.05)
    right, down = hand(0.5, 1.5), hand(0.5, 1.5)
    bend = rng.normal(0, 1.2, (2, 1, 4, 4)) + rng.normal(0, 1.2, (2, n, 4, 4))
    bend_rows, bend_columns = _smooth(bend[0].astype(np.float32)), _smooth(bend[1].astype(np.float32))
    step = FRAME / SIZE
    y, x = np.meshgrid(
        *[(np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2) * np.float32(step)] * 2, indexing="ij"
    )
    rows = (y * (1 + size) + x * turn + down + bend_rows) + np.float32((FRAME - 1) / 2)
    columns = (x * (1 + size + proportion) + y * (slant - turn) + right + bend_columns) + np.float32(
        (FRAME - 1) / 2
    )
    return rows, columns


def _smooth(knots: np.ndarray) -> np.ndarray:
    """(n, 4, 4) values to (n, SIZE, SIZE), by a smooth curve through each row and column of them."""
    at = np.linspace(0, 3, SIZE, dtype=np.float32)[:, None] - np.arange(4, dtype=np.float32)
    hat = np.clip(1 - np.abs(at), 0, 1)
    weight = hat * hat * (3 - 2 * hat)  # (SIZE, 4); each row sums to 1
    wide = sum(knots[:, :, k, None] * weight[:, k] for k in range(4))
    return sum(wide[:, k, None, :] * weight[:, k, None] for k in range(4))


def _sample(source: np.ndarray, which: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """`source` (C, FRAME, FRAME) at [which, rows, columns] (n, SIZE, SIZE): bilinear, the edge repeated."""
    rows = np.clip(rows, 0, FRAME - 1.001)
    columns = np.clip(columns, 0, FRAME - 1.001)
    r, c = rows.astype(np.int64), columns.astype(np.int64)
    down, right = rows - r, columns - c
    corner = which[:, None, None] * (FRAME * FRAME) + r * FRAME + c
    flat = source.reshape(-1)
    upper = flat[corner] * (1 - right) + flat[corner + 1] * right
    lower = flat[corner + FRAME] * (1 - right) + flat[corner + FRAME + 1] * right
    return upper * (1 - down) + lower * down
