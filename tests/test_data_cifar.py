"""CIFAR-10 and CIFAR-100 in each form that they are distributed in, and what can be wrong with one."""

import errno
import io
import os
import pickle
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import each_once, encoded, shown

from fedss_kernels.federated.data import Partition, cifar, load
from fedss_kernels.federated.data.images import decode

DATA = Path(os.environ.get("FEDSS_TEST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "cifar10"
NAMES10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
NAMES100 = [f"fine{c}" for c in range(100)]
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
EACH = 12  # images in a batch
FOUR = Partition("iid", num_clients=4)


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its str, as are all texts and the pixels in the authors' files."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_str(self, text):
        self.write(pickle.BINSTRING + struct.pack("<i", len(text)) + text)
        self.memoize(text)

    dispatch[bytes] = save_str


def pickled(value) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core", b"numpy.core")


def batch(number: int, classes: int) -> tuple[np.ndarray, list[int]]:
    """(EACH, 3072) uint8, EACH classes."""
    rng = np.random.default_rng([number, classes])
    return rng.integers(0, 256, (EACH, 3072), dtype=np.uint8), rng.integers(0, classes, EACH).tolist()


def as_binary(pixels, labels, coarse: bool) -> bytes:
    before = [bytes([label // 5] * coarse + [label]) for label in labels]
    return b"".join(label + image.tobytes() for label, image in zip(before, pixels, strict=True))


def files10(form: str) -> dict[str, bytes]:
    if form == "binary":
        files = {f"{n}.bin": as_binary(*batch(i, 10), coarse=False) for i, n in enumerate(BATCHES)}
        return files | {"batches.meta.txt": "\n".join([*NAMES10, "", ""]).encode()}
    files = {
        n: pickled(
            {
                b"batch_label": b"a batch",
                b"labels": batch(i, 10)[1],
                b"data": batch(i, 10)[0],
                b"filenames": [b"x.png"] * EACH,
            }
        )
        for i, n in enumerate(BATCHES)
    }
    return files | {
        "batches.meta": pickled({b"num_vis": 3072, b"label_names": [n.encode() for n in NAMES10]})
    }


def files100(form: str) -> dict[str, bytes]:
    if form == "binary":
        files = {f"{n}.bin": as_binary(*batch(i, 100), coarse=True) for i, n in enumerate(["train", "test"])}
        return files | {"fine_label_names.txt": "\n".join([*NAMES100, ""]).encode()}
    files = {}
    for i, name in enumerate(["train", "test"]):
        pixels, labels = batch(i, 100)
        coarse = [label // 5 for label in labels]
        files[name] = pickled({b"data": pixels, b"fine_labels": labels, b"coarse_labels": coarse})
    return files | {"meta": pickled({b"fine_label_names": [n.encode() for n in NAMES100]})}


INSIDE = {
    ("cifar10", "binary"): ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", files10),
    ("cifar10", "python"): ("cifar-10-batches-py", "cifar-10-python.tar.gz", files10),
    ("cifar100", "binary"): ("cifar-100-binary", "cifar-100-binary.tar.gz", files100),
    ("cifar100", "python"): ("cifar-100-python", "cifar-100-python.tar.gz", files100),
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:" + path.suffix[1:]) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def read(name: str, folder: Path | None, how: Partition = FOUR, **options):
    cache = folder / "cache" if folder else None
    return load(name, data_dir=folder, seed=0, cache_dir=cache, how=how, **options)


@pytest.mark.parametrize("place", ["folder", "inside", "archive"])
@pytest.mark.parametrize("name, form", INSIDE)
def test_every_form_gives_the_authors_images(name, form, place, tmp_path):
    inside, archive, files_of = INSIDE[name, form]
    files = files_of(form)
    if place == "archive":
        write_tar(tmp_path / archive, {f"{inside}/{n}": content for n, content in files.items()})
    else:
        write(tmp_path / inside if place == "folder" else tmp_path, files)
    data = read(name, tmp_path)
    classes, train = (10, 5) if name == "cifar10" else (100, 1)
    pixels, labels = zip(*(batch(i, classes) for i in range(train + 1)), strict=True)
    assert data.num_classes == classes
    assert data.class_names == tuple(NAMES10 if classes == 10 else NAMES100)
    assert data.images.numpy().tobytes() == b"".join(part.tobytes() for part in pixels[:-1])
    assert data.labels.tolist() == sum(labels[:-1], [])
    assert data.images.shape == (EACH * train, 3, 32, 32)
    assert data.test_images.numpy().tobytes() == pixels[-1].tobytes()
    assert data.test_labels.tolist() == labels[-1]
    assert len(data.clients) == 4 and each_once(data.clients, EACH * train)


def jpegs() -> dict[str, bytes]:
    return {
        f"{split}/{name}/{i:04d}.jpg": encoded(40 * c + i + (0 if split == "train" else 30))
        for split, count in (("train", 3), ("test", 2))
        for c, name in enumerate(NAMES10)
        for i in range(count)
    }


@pytest.mark.parametrize("form", ["binary", "python"])
def test_names_of_classes_in_latin_1(form, tmp_path):
    """A byte that is not UTF-8 is shown as it is, as in the names of files."""
    files = files10(form)
    names = "batches.meta.txt" if form == "binary" else "batches.meta"
    write(tmp_path, files | {names: files[names].replace(b"airplane", b"a\xe9roplan")})
    assert read("cifar10", tmp_path).class_names == (r"a\xe9roplan", *NAMES10[1:])


@pytest.mark.parametrize("form", ["binary", "jpeg"])
def test_an_archive_whose_names_begin_with_a_dot(form, tmp_path):
    """As `tar czf` of ./cifar-10-batches-bin makes it."""
    if form == "jpeg":
        write_tar(tmp_path / "cifar10_jpeg.tar.xz", {f"./{n}": content for n, content in jpegs().items()})
    else:
        files = {f"./cifar-10-batches-bin/{n}": content for n, content in files10(form).items()}
        write_tar(tmp_path / "cifar-10-binary.tar.gz", files)
    assert read("cifar10", tmp_path).class_names == tuple(NAMES10)


@pytest.mark.parametrize("place", ["folder", "archive"])
def test_jpeg_files(place, tmp_path, monkeypatch):
    if place == "archive":
        write_tar(tmp_path / "cifar10_jpeg.tar.xz", jpegs())
    else:
        write(tmp_path, jpegs())
    data = read("cifar10", tmp_path)
    assert data.class_names == tuple(NAMES10)
    assert shown(data.images) == [40 * c + i for c in range(10) for i in range(3)]
    assert data.labels.tolist() == [c for c in range(10) for _ in range(3)]
    assert shown(data.test_images) == [40 * c + i + 30 for c in range(10) for i in range(2)]
    monkeypatch.setattr(cifar, "decode", None)
    assert torch.equal(read("cifar10", tmp_path).images, data.images), "the second time from the cache"


def test_by_default_a_hundred_clients_by_dirichlet(tmp_path):
    files = files10("binary")
    for name in files:
        if name.endswith(".bin"):
            files[name] = files[name] * 10
    write(tmp_path, files)
    data = read("cifar10", tmp_path, how=None)
    assert len(data.clients) == 100 and {len(held) for held in data.clients} == {6}


def test_clients_are_tested_on_images_of_their_own_classes(tmp_path):
    data = read("cifar10", write(tmp_path, files10("binary")))
    assert torch.cat(data.test_clients).sort().values.tolist() == list(range(len(data.test_images)))
    for held, tested in zip(data.clients, data.test_clients, strict=True):
        assert set(data.test_labels[tested].tolist()) <= set(data.labels[held].tolist())


def test_nothing_there(tmp_path):
    for name, archive in (("cifar10", "cifar-10-binary"), ("cifar100", "cifar-100-binary")):
        message = rf"{name}: looked for {archive}\.tar\.gz or .* in .*www\.cs\.toronto\.edu/~kriz/cifar"
        with pytest.raises(FileNotFoundError, match=message):
            read(name, tmp_path)
        with pytest.raises(FileNotFoundError, match=f"{name}: no folder given"):
            read(name, None)
    with pytest.raises(FileNotFoundError, match="which is not a folder"):
        read("cifar10", tmp_path / "nowhere")


def test_a_part_that_is_missing_is_named(tmp_path):
    files = files10("binary")
    del files["data_batch_3.bin"]
    write(tmp_path / "cifar-10-batches-bin", files)
    with pytest.raises(
        FileNotFoundError, match=r"looked for data_batch_3\.bin in .*cifar-10-batches-bin, where"
    ):
        read("cifar10", tmp_path)


@pytest.mark.parametrize(("name", "form"), INSIDE)
def test_whichever_part_is_missing_in_the_folder_of_the_batches(name, form, tmp_path):
    files = INSIDE[name, form][2](form)
    for lost in files:
        there = {n: content for n, content in files.items() if n != lost}
        folder = write(tmp_path / f"without {lost}", there)
        with pytest.raises(FileNotFoundError, match=f"looked for {re.escape(lost)} in .*, where of its"):
            read(name, folder)


def test_a_file_of_a_common_name_beside_an_archive_is_no_part(tmp_path):
    inside, archive, files_of = INSIDE["cifar100", "python"]
    write_tar(tmp_path / archive, {f"{inside}/{n}": content for n, content in files_of("python").items()})
    assert read("cifar100", write(tmp_path, {"test": b"mine"})).num_classes == 100


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
def test_names_that_an_editor_saved(coding, tmp_path):
    files = files10("binary")
    files["batches.meta.txt"] = files["batches.meta.txt"].decode().encode(coding)
    assert read("cifar10", write(tmp_path, files)).class_names == tuple(NAMES10)


@pytest.mark.parametrize("empty", ["train", "test"])
def test_half_a_split_of_jpeg_files(empty, tmp_path):
    files = {n: content for n, content in jpegs().items() if not n.startswith(empty)}
    (write(tmp_path / "folder", files) / empty).mkdir()
    with pytest.raises(ValueError, match=f"^cifar10: no images in .*folder/{empty}$"):
        read("cifar10", tmp_path / "folder")
    write_tar(tmp_path / "cifar10_jpeg.tar.xz", files)
    with pytest.raises(ValueError, match=rf"^cifar10: no images in .*\.tar\.xz/{empty}$"):
        read("cifar10", tmp_path)


@pytest.mark.parametrize("there, absent", [("train", "test"), ("test", "train")])
def test_a_folder_of_jpeg_files_without_a_half(there, absent, tmp_path):
    write(tmp_path, {name: content for name, content in jpegs().items() if name.startswith(there)})
    with pytest.raises(FileNotFoundError, match=f"has {there} alone: expected {absent} too, as train/"):
        read("cifar10", tmp_path)


def changed(change) -> bytes:
    content = pickle.loads(files10("python")["data_batch_2"], encoding="bytes")
    change(content)
    return pickled(content)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("data_batch_2.bin", b"", "data_batch_2.bin: expected records of 3073 bytes, got 0"),
        ("data_batch_2.bin", bytes(3072), "expected records of 3073 bytes, got 3072"),
        ("data_batch_2.bin", bytes(3073), "expected batches of equal size, got .12, 1, 12"),
        ("data_batch_2.bin", bytes([10] + [0] * 3072) * EACH, r"expected classes in \[0, 10\), got 10"),
        ("batches.meta.txt", b"cat\ndog\n", "expected 10 names of classes in batches.meta.txt, got 2"),
        ("data_batch_2", b"nonsense", "data_batch_2 is not as its authors wrote it"),
        ("data_batch_2", pickled([1]), "data_batch_2: expected a dictionary, got list"),
        ("data_batch_2", changed(lambda d: d.pop(b"labels")), "data_batch_2: expected b'data'"),
        ("data_batch_2", changed(lambda d: d[b"labels"].append(3)), "data_batch_2: expected b'data'"),
        ("data_batch_2", changed(lambda d: d[b"labels"].__setitem__(0, 10)), "n classes below 10"),
        ("data_batch_2", changed(lambda d: d.update({b"data": np.zeros((EACH, 3072))})), "expected b'data'"),
        ("batches.meta", pickled({b"label_names": 3}), "batches.meta: expected a list of names"),
    ],
)
def test_what_is_wrong_is_named(name, content, message, tmp_path):
    form = "binary" if name.endswith((".bin", ".txt")) else "python"
    write(tmp_path, files10(form) | {name: content})
    with pytest.raises(ValueError, match=message):
        read("cifar10", tmp_path)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("value", [Harmful(), {b"data": Harmful()}, {b"labels": [np.float64(3)]}])
def test_a_pickle_that_calls_anything_is_refused(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, files10("python") | {"data_batch_1": pickled(value)})
    with pytest.raises(ValueError, match=r"data_batch_1 is not as its authors wrote it \(it asks for "):
        read("cifar10", tmp_path)
    assert not (tmp_path / "harm").exists()


def test_damage_anywhere_in_a_pickle_is_told_in_words(tmp_path):
    """A byte changed in each of many places: read as before, or a ValueError of ours."""
    files = files10("python")
    whole, refused = files["data_batch_1"], 0
    write(tmp_path, files)
    places = [*range(150), *range(len(whole) - 250, len(whole))]
    for place in places:
        damaged = whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :]
        try:
            cifar._from_pickle(cifar.CIFAR10, damaged, "data_batch_1")
        except ValueError as error:
            assert str(error).startswith("cifar10: data_batch_1")
            refused += 1
    assert refused > 50


def test_a_damaged_archive(tmp_path):
    path = write_tar(tmp_path / "cifar-10-binary.tar.gz", files10("binary"))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz is damaged"):
        read("cifar10", tmp_path)


def test_an_archive_that_cannot_be_read_is_not_damaged(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "cifar10_jpeg.tar.xz", jpegs())

    def fail(*arguments, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tarfile.TarFile, "extractfile", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        read("cifar10", tmp_path)
    assert caught.value.filename == str(path)


def test_a_damaged_jpeg_file(tmp_path):
    write_tar(tmp_path / "cifar10_jpeg.tar.xz", jpegs() | {"train/cat/0001.jpg": b"nonsense"})
    with pytest.raises(ValueError, match=r"cifar10_jpeg\.tar\.xz: train/cat/0001\.jpg is damaged"):
        read("cifar10", tmp_path)


@pytest.mark.parametrize("place", ["archive", "folder"])
def test_damaged_jpeg_files_are_all_listed_and_left_out(tmp_path, place, caplog):
    damaged = {"train/cat/0001.jpg": b"nonsense", "test/cat/0000.jpg": encoded(3)[:-100]}
    if place == "archive":
        write_tar(tmp_path / "cifar10_jpeg.tar.xz", jpegs() | damaged)
    else:
        write(tmp_path, jpegs() | damaged)
        os.mkfifo(tmp_path / "train/dog/pipe.jpg")
        damaged["train/dog/pipe.jpg"] = b""
    more = f"and {len(damaged) - 1} more of "
    with pytest.raises(
        ValueError, match=f"is damaged .*{more}.*--skip-damaged; all of them are listed in "
    ) as caught:
        read("cifar10", tmp_path)
    listed = caught.value.listing.read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in listed) == sorted(damaged)
    said = []
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        data = read("cifar10", tmp_path, skip_damaged=True, on_progress=lambda *news: said.append(news))
        assert f"cifar10: left out {len(damaged)} images that could not be read: cat 2" in caplog.text
        cat = NAMES10.index("cat")
        assert shown(data.images) == [40 * c + i for c in range(10) for i in range(3) if (c, i) != (cat, 1)]
        assert shown(data.test_images) == [
            40 * c + i + 30 for c in range(10) for i in range(2) if (c, i) != (cat, 0)
        ]
    total = 50 + (place == "folder")
    assert said == [("cifar10: decoding images", i + 1, total) for i in range(total)]


def test_a_class_that_lost_its_training_images_is_left_out_of_the_test(tmp_path, caplog):
    """No miss that nobody could help."""
    write(tmp_path, jpegs() | {f"train/cat/{i:04d}.jpg": b"nonsense" for i in range(3)})
    rest = [c for c in range(10) if NAMES10[c] != "cat"]
    for _ in range(2):  # the second time from the cache
        data = read("cifar10", tmp_path, skip_damaged=True)
        assert data.notes[-1] == "classes without a training image now, left out of the test too: cat"
        assert data.class_names == tuple(NAMES10[c] for c in rest) and data.num_classes == 9
        assert shown(data.test_images) == [40 * c + i + 30 for c in rest for i in range(2)]
        assert data.labels.tolist() == [c for c in range(9) for _ in range(3)]
        assert data.test_labels.tolist() == [c for c in range(9) for _ in range(2)]
    assert f"cifar10: {data.notes[-1]}" in caplog.text


@pytest.mark.parametrize("lost", ["train", "test"])
def test_a_class_in_one_half_alone(lost, tmp_path):
    write(tmp_path, {name: of for name, of in jpegs().items() if not name.startswith(f"{lost}/cat/")})
    if lost == "train":
        with pytest.raises(ValueError, match="cifar10: no training image of 'cat', a class of the test"):
            read("cifar10", tmp_path)
    else:
        data = read("cifar10", tmp_path)
        assert data.num_classes == 10 and data.notes == ("classes without a test image: 1",)


def test_what_is_left_of_the_test_has_to_be_of_a_class_that_is_left(tmp_path):
    whole = {f"test/cat/{i:04d}.jpg" for i in range(2)} | {n for n in jpegs() if n.startswith("train/dog/")}
    write(tmp_path, {name: of if name in whole else b"nonsense" for name, of in jpegs().items()})
    with pytest.raises(ValueError, match="is damaged .*more of 50 images"):
        read("cifar10", tmp_path, skip_damaged=True)


@pytest.mark.parametrize("place", ["archive", "folder"])
def test_files_that_are_no_jpeg_images_are_counted(tmp_path, place):
    """Not those that are hidden, as a Mac leaves them."""
    others = {"train/cat/note.txt": b"?", "test/cat/0.lnk": b"?", "train/cat/._0000.jpg": b"?"}
    if place == "archive":
        others["val/cat/0000.jpg"] = encoded(0)
        write_tar(tmp_path / "cifar10_jpeg.tar.xz", jpegs() | others)
    else:
        write(tmp_path, jpegs() | others)
    for _ in range(2):  # the second time from the cache
        data = read("cifar10", tmp_path)
        (note,) = data.notes
        assert note.startswith(f"left out: {len(others) - 1} files (")
        assert ".txt 1" in note and ".lnk 1" in note
        assert ("neither in train nor in test 1" in note) == (place == "archive")
        assert len(data.images) == 30 and len(data.test_images) == 20


def test_other_classes_of_jpeg_files(tmp_path):
    write(tmp_path, {"train/cat/0.jpg": encoded(0), "test/cat/0.jpg": encoded(0)})
    with pytest.raises(ValueError, match=r"of 10 classes in .*, got cat"):
        read("cifar10", tmp_path)


def test_no_retrieval(tmp_path):
    with pytest.raises(ValueError, match="task: expected classification for cifar100, got 'retrieval'"):
        read("cifar100", tmp_path, task="retrieval")


@pytest.mark.exhaustive
@pytest.mark.skipif(
    not (DATA / "cifar10_jpeg.tar.xz").is_file(),
    reason=f"cifar10_jpeg.tar.xz is not in {DATA}; FEDSS_TEST_DATA names the folder above it",
)
def test_the_real_file(tmp_path, monkeypatch):
    """All of its structure; of the images one in 25 is decoded, for the sake of time."""
    contents = iter(range(60_000))
    monkeypatch.setattr(
        cifar, "decode", lambda content, size: bytes(3072) if next(contents) % 25 else decode(content, size)
    )
    data = load("cifar10", data_dir=DATA, seed=0, cache_dir=tmp_path)
    assert data.images.shape == (50_000, 3, 32, 32) and data.test_images.shape == (10_000, 3, 32, 32)
    assert data.class_names == tuple(NAMES10)
    assert torch.bincount(data.labels).tolist() == [5000] * 10
    assert torch.bincount(data.test_labels).tolist() == [1000] * 10
    assert len(data.clients) == 100 and {len(held) for held in data.clients} == {500}
    # The mean colours of CIFAR-10's training images, known to everyone who normalises by them. An image's has
    # a standard deviation of 0.13 or so, 2,000 images' one of 0.003.
    means = data.images[::25].double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(means, torch.tensor([0.4914, 0.4822, 0.4465]).double(), atol=0.015, rtol=0)
