import hashlib
import itertools
import shutil
import unicodedata

import numpy as np
import pytest
import torch

from fedss_kernels.federated.data import FederatedData, Partition, cache, glyphs, load
from fedss_kernels.federated.data.cache import cached_arrays, default_cache_dir
from fedss_kernels.federated.data.glyphs import GlyphSettings

SMALL = {
    "num_classes": 40,
    "writers": 24,
    "test_writers": 8,
    "classes_per_writer": 10,
    "drawings_per_class": 2,
}


def small(cache_dir, seed: int = 0, task: str = "classification", **options) -> FederatedData:
    return load("glyphs", data_dir=None, seed=seed, task=task, cache_dir=cache_dir, **{**SMALL, **options})


def digest(data: FederatedData) -> str:
    tensors = (data.images, data.labels, data.test_images, data.test_labels, *data.clients)
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


def test_shapes_and_who_writes_what(tmp_path):
    data = small(tmp_path)
    assert data.num_classes == 40 and len(data.clients) == 24
    assert data.images.shape == (24 * 10 * 2, 1, 28, 28) and data.test_images.shape == (8 * 10 * 2, 1, 28, 28)
    for rows in data.clients:
        assert torch.bincount(data.labels[rows], minlength=40).unique(return_counts=True)[1].tolist() == [
            30,
            10,
        ]
    # 24 writers and 8 test writers over 4 alphabets: 6 and 2 of them write each class, twice
    assert torch.bincount(data.labels).tolist() == [12] * 40
    assert torch.bincount(data.test_labels).tolist() == [4] * 40
    assert torch.cat(data.clients).sort().values.equal(torch.arange(len(data.images)))


@pytest.mark.parametrize("kind, clients", [("iid", 30), ("dirichlet", 30), ("classes", 30)])
def test_the_same_drawings_otherwise_divided(kind, clients, tmp_path):
    natural = small(tmp_path)
    data = small(tmp_path, how=Partition(kind, num_clients=clients, classes_per_client=3))
    assert torch.equal(data.images, natural.images) and torch.equal(data.test_images, natural.test_images)
    assert len(data.clients) == clients == len(data.client_names)
    assert torch.cat(data.clients).sort().values.equal(torch.arange(len(data.images)))


def test_no_drawing_is_blank_or_comes_twice(tmp_path):
    data = small(tmp_path)
    images = torch.cat([data.images, data.test_images])
    assert int(images.flatten(1).amax(1).min()) > 100
    assert len({image.numpy().tobytes() for image in images}) == len(images)


def test_the_same_bytes_on_every_run_of_a_seed(tmp_path):
    first = digest(small(tmp_path / "a"))
    assert digest(small(tmp_path / "a")) == first, "read from the cache"
    assert digest(small(tmp_path / "b")) == first, "drawn again"
    assert digest(small(tmp_path / "a", seed=1)) != first


def test_a_writer_does_not_depend_on_how_many_others_there_are(tmp_path):
    few, more = small(tmp_path), small(tmp_path, writers=32)
    assert few.images[few.clients[0]].equal(more.images[more.clients[0]])


def test_retrieval_holds_out_classes(tmp_path):
    data = small(tmp_path, task="retrieval")
    assert data.num_classes == 30 and len(data.clients) == 3 * (6 + 2)
    assert torch.bincount(data.labels).tolist() == [16] * 30
    assert torch.bincount(data.test_labels).tolist() == [16] * 10
    everything = small(tmp_path)
    assert set(data.class_names) < set(everything.class_names)


def test_classes_look_different_and_are_characters():
    chosen = glyphs.choose_code_points(500)
    assert len(set(chosen)) == len(chosen) == 500
    bases = [unicodedata.normalize("NFKD", chr(c))[0] for c in chosen]
    assert len(list(itertools.groupby(bases))) == len(set(bases)) < 500, "accented forms stand together"
    assert chosen == glyphs.choose_code_points(500)
    flat = glyphs.clean_bitmaps("DejaVuSans", chosen).reshape(500, 16, 4, 16, 4).mean((2, 4)).reshape(500, -1)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    # rounding the coarse bitmaps to whole numbers moves a cosine by less than 0.005
    assert np.triu(flat @ flat.T, 1).max() <= 0.805
    assert not any(unicodedata.category(chr(c)).startswith(("Z", "C", "M")) for c in chosen)


def test_coinciding_and_blank_glyphs_are_dropped():
    latin, greek, cyrillic, space, other = ord("A"), 0x391, 0x410, ord(" "), ord("B")
    bitmaps = glyphs.clean_bitmaps("DejaVuSans", [space, latin, greek, cyrillic, other])
    assert not bitmaps[0].any()
    assert np.array_equal(bitmaps[1], bitmaps[2]) and np.array_equal(bitmaps[1], bitmaps[3])
    assert glyphs.distinct(bitmaps, 0.95) == [1, 4]


def test_thousands_of_code_points_are_shared():
    regular = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono")
    assert set(glyphs.shared_code_points()) <= set(glyphs.shared_code_points(regular))
    assert len(glyphs.shared_code_points()) > 2000


def test_more_classes_for_less_difference():
    assert len(set(glyphs.choose_code_points(1500))) == 1500


def test_softening():
    dot = np.zeros((1, glyphs.FRAME, glyphs.FRAME), dtype=np.uint8)
    dot[0, 20:24, 30:34] = 255
    soft = glyphs.soften(dot).astype(float)
    assert soft.max() == 255 and soft[0, 18, 31] > 0
    down, right = (soft[0].sum(axis) @ np.arange(glyphs.FRAME) / soft.sum() for axis in (1, 0))
    assert (down, right) == (pytest.approx(21.5), pytest.approx(31.5)), "the middle stays"


@pytest.mark.exhaustive
@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04nonsense", None])
def test_a_corrupt_cache_is_made_again(tmp_path, damage):
    first = digest(small(tmp_path))
    (path,) = tmp_path.glob("glyphs-*.npz")
    whole = path.read_bytes()
    if damage is None:  # one bit, in the middle of the images: only the archive's checksum sees it
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    else:
        path.write_bytes(damage)
    assert digest(small(tmp_path)) == first
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "no temporary file stays"


def test_a_cache_that_lost_an_array_is_made_again(tmp_path):
    def make():
        return {"v": np.array(1), "w": np.array(2)}

    cached_arrays("x", {"a": 1}, make, tmp_path)
    (path,) = tmp_path.iterdir()
    with np.load(path) as archive:
        np.savez(path, key=archive["key"], v=archive["v"])
    assert sorted(cached_arrays("x", {"a": 1}, make, tmp_path)) == ["v", "w"]


def test_a_cache_in_an_archive_that_nobody_can_read_is_made_again(tmp_path):
    """A compression method that does not exist, 99, in the archive's directory: NotImplementedError."""
    cached_arrays("x", {"a": 1}, lambda: {"v": np.array(1)}, tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 10] = 99
    path.write_bytes(content)
    assert cached_arrays("x", {"a": 1}, lambda: {"v": np.array(5)}, tmp_path)["v"] == 5


def test_a_cache_of_another_key_is_not_believed(tmp_path):
    cached_arrays("x", {"a": 1}, lambda: {"v": np.array(1)}, tmp_path)
    (one,) = tmp_path.iterdir()
    cached_arrays("x", {"a": 2}, lambda: {"v": np.array(2)}, tmp_path)
    (two,) = set(tmp_path.iterdir()) - {one}
    shutil.copy(one, two)
    assert cached_arrays("x", {"a": 2}, lambda: {"v": np.array(3)}, tmp_path)["v"] == 3


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSS_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("FEDSS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "fedss-kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "fedss-kernels"


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="x is not cached: it is a file, not a folder: .*FEDSS_CACHE"):
        assert cached_arrays("x", {}, lambda: {"v": np.array(5)}, tmp_path / "file")["v"] == 5


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(cache.np, "savez", full_disk)
    with pytest.warns(UserWarning, match="no space left"):
        cached_arrays("x", {}, lambda: {"v": np.array(5)}, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
        (
            {"num_classes": 5000, "writers": 600, "test_writers": 600},
            r"num_classes: expected at most \d+.*got 5000",
        ),
        ({"writers": 3}, "writers: expected at least 4, one for each alphabet"),
        ({"test_writers": 1}, "test_writers: expected at least 4"),
        ({"task": "retrieval", "holdout": 1.0}, "holdout: expected a share"),
        ({"task": "detection"}, "task: expected one of classification, retrieval, got 'detection'"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **options)


def test_unknown_data_set_names_the_choices():
    with pytest.raises(ValueError, match="expected one of glyphs, omniglot, .*, got 'mnist'"):
        load("mnist", data_dir=None, seed=0)


def test_default_settings_are_many_classes_and_few_for_each_writer():
    settings = GlyphSettings(seed=0)
    assert settings.num_classes >= 500 and 15 <= settings.classes_per_writer <= 30
    assert settings.writers // settings.alphabets >= 4 and settings.test_writers // settings.alphabets >= 2


def test_every_alphabet_has_test_writers_by_default(tmp_path):
    data = small(tmp_path, test_writers=None)
    assert torch.bincount(data.test_labels).tolist() == [3 * 2] * 40


def fields(**changes) -> dict:
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    good = {
        "name": "own",
        "images": images,
        "labels": torch.tensor([0, 1, 2, 0]),
        "clients": (torch.tensor([0, 3]), torch.tensor([1, 2])),
        "client_names": ("a", "b"),
        "test_images": images,
        "test_labels": torch.tensor([0, 1, 2, 2]),
        "num_classes": 3,
        "class_names": ("x", "y", "z"),
        "task": "classification",
    }
    return {**good, **changes}


def test_federated_data_of_ones_own():
    FederatedData(**fields())
    FederatedData(**fields(task="retrieval", test_labels=torch.tensor([7, 7, 9, 9])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "other"}, "task: expected one of"),
        ({"num_classes": 0}, "num_classes: expected at least 1"),
        ({"class_names": ("x",)}, "class_names: expected 3 of them, got 1"),
        (
            {"images": torch.zeros(4, 1, 2, 2)},
            r"^images: expected .* uint8 tensor, got \(4, 1, 2, 2\) torch.float32",
        ),
        ({"images": torch.zeros(4, 2, 2, dtype=torch.uint8)}, r"^images: .*got \(4, 2, 2\)"),
        ({"labels": torch.tensor([0, 1, 2])}, r"^labels: expected \(4,\) int64"),
        (
            {"labels": torch.tensor([0, 1, 2, 3])},
            r"^labels: expected classes in \[0, 3\), got values from 0 to 3",
        ),
        ({"labels": torch.tensor([0, 1, 2, -1])}, "^labels: expected classes"),
        ({"test_labels": torch.tensor([0, 1, 2, 3])}, "^test_labels: expected classes in"),
        (
            {"test_images": torch.zeros(4, 3, 2, 2, dtype=torch.uint8)},
            r"^test_images: expected images of \(1, 2, 2\)",
        ),
        ({"clients": ()}, "clients: expected at least one"),
        ({"client_names": ("a",)}, "client_names: expected one for each of the 2 clients, got 1"),
        ({"clients": (torch.tensor([0]), torch.tensor([4]))}, r"clients\[1\]: expected rows in \[0, 4\)"),
        ({"clients": (torch.tensor([0]), torch.tensor([1.0]))}, r"clients\[1\]: expected a non-empty"),
        (
            {"clients": (torch.tensor([], dtype=torch.int64), torch.tensor([1]))},
            r"clients\[0\]: expected a non-empty",
        ),
    ],
)
def test_federated_data_names_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        FederatedData(**fields(**changes))
