"""What is chosen to fit the data that are found, and what is said where settings do not fit."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from later import later
from PIL import Image
from tiny_federation import tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import Config, ConfigError, cli, loading, run
from fedss_kernels.federated.data import Found, Partition
from fedss_kernels.federated.data.partition import divide
from fedss_kernels.federated.defaults import PRESETS
from fedss_kernels.federated.loading import choices, fitted, load_data

FITTED = ("cohort", "images_per_client", "classes_per_client", "model", "image_size", "crop_size")
PACE = ("client_lr", "scale", "warmup_rounds")  # chosen for the net


@pytest.fixture(autouse=True)
def without_torchvision(monkeypatch):
    monkeypatch.setattr(loading, "unavailable", lambda name: f"model: {name} needs torchvision: a long story")


def write_noise(folder: Path, classes: int, each: int, mode: str = "RGB") -> Path:
    """Files of several sizes, PNG."""
    for c in range(classes):
        (folder / f"class{c:03d}").mkdir(parents=True)
        for i in range(each):
            shape = (8 + i % 3, 10 + i % 2, *([3] if mode == "RGB" else []))
            pixels = np.random.default_rng([c, i]).integers(256, size=shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{c:03d}" / f"{i}.png")
    return folder


def config(folder: Path, **options) -> Config:
    settings = {"data": "image_folder", "data_dir": folder, "cache_dir": folder.parent / "cache"}
    return Config(**(settings | {"rounds": 1, "embedding_dim": 8} | options))


@pytest.mark.parametrize(
    "classes, each, mode, clients",
    [(3, 30, "RGB", 8), (2, 3, "RGB", 1), *later((2, 20, "L", 4), (500, 3, "L", 10))],
)
def test_a_folder_of_ones_own_is_trained_on_with_no_more_than_its_name(
    classes, each, mode, clients, tmp_path
):
    folder = write_noise(tmp_path / "data", classes, each, mode)
    found = run(config(folder, out=tmp_path / "out", max_norm=1e9))
    assert found.config.cohort == clients == found.summary.num_clients
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert all(saved[name] is not None for name in FITTED)
    assert saved["model"] == "conv4_rgb" and (saved["image_size"], saved["crop_size"]) == (32, 28)
    again = run(Config.from_dict(saved | {"out": None}))
    assert torch.equal(found.weight, again.weight)


def test_what_was_chosen_is_said_in_the_line(tmp_path, capsys):
    folder = write_noise(tmp_path / "data", 2, 20)
    argv = ["run", "--data=image_folder", f"--data-dir={folder}", f"--cache-dir={tmp_path}/cache"]
    assert cli.main([*argv, "--rounds=1", "--embedding-dim=8", f"--out={tmp_path}/out"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        "image_folder: 2 classes, 32 training and 8 test images, 4 clients; chosen to fit: image_size 32, "
        "images_per_client 8, classes_per_client 2, num_negatives 1, cohort 4, client_lr 0.05, "
        "warmup_rounds 0, crop_size 28, model conv4_rgb, scale 10.0; "
        "mobilenet_v3_large needs torchvision (fedss doctor)"
    )


def test_a_retrieval_of_one_class_is_said_before_training(tmp_path, capsys, caplog):
    """Of three classes one is held out."""
    words = "all test images are of one class, so every retrieval is right: MAP@10 and recall@1 mean nothing"
    folder = write_noise(tmp_path / "data", 3, 20)
    argv = ["run", "--data=image_folder", f"--data-dir={folder}", f"--cache-dir={tmp_path}/cache"]
    argv += ["--rounds=1", "--embedding-dim=8"]
    assert cli.main([*argv, "--task=retrieval", f"--out={tmp_path}/one"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out.index(f"image_folder: {words}") < next(i for i, line in enumerate(out) if "round 1" in line)
    data = tiny_data("retrieval")
    for labels, said in ((data.test_labels, False), (torch.full_like(data.test_labels, 3), True)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run(tiny_config(rounds=1), data=replace(data, test_labels=labels), model=tiny_model())
        assert (words in caplog.text) == said


def test_classes_of_one_test_image_are_counted(caplog):
    """A retrieval can find nothing for them."""
    data = tiny_data("retrieval")
    labels = torch.zeros_like(data.test_labels)
    labels[-2:] = torch.tensor([5, 7])
    words = "test classes of one image, for which nothing right can be found: 2 of 3; MAP@10 and recall@1 "
    for each, said in ((replace(data, test_labels=labels), [words]), (data, [])):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run(tiny_config(rounds=1, eval_every=1, task=each.task), data=each, model=tiny_model())
        assert [line[: len(words)] for line in caplog.messages] == said


def test_results_do_not_go_where_they_would_be_a_class(tmp_path, capsys, monkeypatch):
    """By default too, where the data are in the current folder; beside train and test they harm nobody."""
    folder = write_noise(tmp_path / "data", 2, 20)
    words = "out: expected a folder outside of .*data, where its plots would be images of a class, got "
    for out in (folder / "run", folder / "class000" / "run", tmp_path / "data" / ".." / "data" / "run"):
        with pytest.raises(ConfigError, match=words):
            run(config(folder, out=out))
    monkeypatch.chdir(folder)
    for command in ("run", "compare"):
        assert cli.main([command, "--data=image_folder", "--data-dir=.", "--rounds=1"]) == 2
        assert f"fedss {command}: --out: expected a folder outside of ., where" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["class000", "class001"]
    for part in ("train", "test"):
        write_noise(tmp_path / "split" / part, 2, 4)
    load_data(config(tmp_path / "split", out=tmp_path / "split" / "run"))
    with pytest.raises(ConfigError, match="outside of .*train, where"):
        load_data(config(tmp_path / "split", out=tmp_path / "split" / "train" / "run"))


def test_a_stopped_run_is_resumed_with_what_was_chosen(tmp_path, monkeypatch):
    folder = write_noise(tmp_path / "data", 2, 20)
    options = {"rounds": 2, "checkpoint_every": 1, "out": tmp_path / "out"}
    whole = run(config(folder, rounds=2))
    with pytest.raises(Exception, match="stopped after round 1"):
        run(config(folder, **options), stop=lambda: True)
    monkeypatch.setattr(loading, "unavailable", lambda name: "")  # installed meanwhile
    resumed = run(Config.load(tmp_path / "out" / "config.json"), resume=True)
    assert torch.equal(whole.weight, resumed.weight)


def test_large_folders_have_the_papers_settings(monkeypatch):
    monkeypatch.setattr(loading, "unavailable", lambda name: "")
    how = Partition("classes", images_per_client=None, classes_per_client=None).fitted(np.full(1000, 30))
    found = Found("image_folder", 1000, 30_000, 5_000, 300, how)
    chosen = fitted(Config(data="image_folder"), found)
    assert [getattr(chosen, name) for name in FITTED] == [32, 100, 20, "mobilenet_v3_large", 256, 224]
    assert [getattr(chosen, name) for name in PACE] == [0.01, 20.0, 0]
    assert chosen.num_clients == 0 and choices(chosen, found) == []


def test_a_small_folder_is_a_federation_of_clients_with_a_few_classes_and_negatives(tmp_path, capsys):
    """A quarter of the classes each, where all of them would be FullSoftmax on clients who are all alike."""
    how = Partition("classes", images_per_client=None, classes_per_client=None).fitted(np.full(19, 18))
    found = Found("image_folder", 19, 342, 90, how.clients_of(342), how)
    chosen = fitted(Config(data="image_folder"), found)
    numbers = "classes_per_client", "num_negatives", "cohort", "images_per_client"
    assert [getattr(chosen, name) for name in numbers] == [4, 4, 11, 32]
    assert "num_negatives 4" in choices(Config(data="image_folder"), found)[0]
    assert "num_negatives" not in choices(Config(data="image_folder", method="full_softmax"), found)[0]
    words = "num_negatives 19: all other classes, as with full_softmax"
    assert words in choices(Config(data="image_folder", num_negatives=19), found)
    whole = (
        "no federation: a step takes as many images as 11 clients would, 32 each: all 342, so without chance"
    )
    for size, said in (
        (32, whole),
        (5, "no federation: a step takes as many images as 11 clients would, 5 each"),
    ):
        assert said in choices(Config(data="image_folder", method="centralized", batch_size=size), found)
    least = Partition("classes", images_per_client=None, classes_per_client=None).fitted(np.full(5, 20))
    assert least.classes_per_client == 2


def test_where_nothing_is_federated_the_line_counts_no_clients(tmp_path, capsys):
    folder = write_noise(tmp_path / "data", 2, 20)
    argv = ["run", "--data=image_folder", f"--data-dir={folder}", f"--cache-dir={tmp_path}/cache"]
    argv += ["--rounds=1", "--embedding-dim=8", f"--out={tmp_path}/out", "--method=centralized"]
    assert cli.main(argv) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("image_folder: 2 classes, 32 training and 8 test images, in one place; chosen")


def test_any_size_of_images_is_trained_on(tmp_path):
    folder = write_noise(tmp_path / "data", 5, 10)
    found = run(config(folder, image_size=64, embedding_dim=32))
    assert found.config.model == "isotropic:depth=4,patch=7" and found.summary.accuracy is not None


def test_the_error_names_nets_that_take_such_images(tmp_path):
    folder = write_noise(tmp_path / "data", 5, 10)
    words = "conv4_32 3x32x32 to 3x47x47, vit those of its setting side, the others any, as isotropic"
    for model in ("conv4_rgb", "vit:depth=1"):
        with pytest.raises(ConfigError, match=f"^model: {model} can't take images of 3x56x56 .*{words}"):
            load_data(config(folder, image_size=64, model=model, embedding_dim=32))


@pytest.mark.parametrize(
    "given, pace",
    [
        ({}, (0.05, 10.0, 20)),
        ({"model": "conv4_rgb", "image_size": 64, "rounds": 30}, (0.05, 10.0, 3)),
        ({"client_lr": 0.2, "warmup_rounds": 0}, (0.2, 10.0, 0)),
        ({"init_checkpoint": "net.pt"}, (0.01, 20.0, 0)),
        ({"model": "mobilenet_v3_large"}, (0.01, 20.0, 0)),
        ({"model": "vit:depth=2"}, (0.05, 10.0, 20)),
    ],
)
def test_a_small_net_that_begins_from_nothing_learns_as_those_of_the_small_sets(given, pace):
    """The paper's rate, at which a large one is trained, hardly moves it."""
    how = Partition("classes", images_per_client=None, classes_per_client=None).fitted(np.full(4, 20))
    found = Found("image_folder", 4, 80, 20, how.clients_of(80), how)
    chosen = fitted(Config(data="image_folder", **given), found)
    assert tuple(getattr(chosen, name) for name in PACE) == pace


@pytest.mark.parametrize(
    "given, chosen",
    [
        ({"model": "mobilenet_v3_large"}, {"image_size": 256, "crop_size": 224}),
        ({"model": "vit:depth=2"}, {"image_size": 37, "crop_size": 32, "model": "vit:depth=2"}),
        ({"image_size": 36}, {"image_size": 36, "crop_size": 31, "model": "conv4_rgb"}),
        ({"crop_size": 30}, {"image_size": 35, "crop_size": 30}),
        ({"crop_size": 0}, {"image_size": 32, "crop_size": 0}),
        ({"cohort": 2}, {"cohort": 2}),
        ({"cohort": 3, "num_clients": 3}, {"cohort": 3, "num_clients": 3, "classes_per_client": 2}),
        ({"classes_per_client": 4, "num_negatives": 2}, {"classes_per_client": 4, "num_negatives": 2}),
        ({"image_size": 64}, {"model": "isotropic:depth=4,patch=7", "crop_size": 56, "embedding_dim": 64}),
        ({"image_size": 64, "crop_size": 32}, {"model": "conv4_rgb"}),
        ({"image_size": 224}, {"model": "isotropic:depth=4,patch=8", "crop_size": 196}),
        ({"crop_size": 16}, {"model": "isotropic:depth=4,patch=2", "image_size": 19}),
        ({"model": "resnet18_32"}, {"image_size": 37, "crop_size": 32, "embedding_dim": 512}),
    ],
)
def test_what_is_given_stands(given, chosen):
    settings = Config(data="image_folder", **given)
    numbers = settings.num_clients, settings.images_per_client, settings.classes_per_client
    how = Partition("classes", *numbers).fitted(np.full(4, 20))
    found = Found("image_folder", 4, 80, 20, how.clients_of(80), how)
    assert {name: getattr(fitted(settings, found), name) for name in chosen} == chosen


def test_nothing_is_left_to_choose_for_the_other_data_sets():
    for name in PRESETS:
        if name != "image_folder":
            before = Config(data=name)
            assert fitted(before, Found(name, 10, 100, 10, 5)) is before


# ---- a partition that fits


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    classes=st.none() | st.integers(1, 8),
    clients=st.just(0) | st.integers(1, 12),
)
def test_images_can_be_divided_by_what_is_chosen_wherever_they_can_be(sizes, classes, clients):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    how = Partition("classes", clients, None, classes)
    possible = [
        (k, p)
        for k in ([clients] if clients else range(1, len(labels) + 1))
        for p in ([classes] if classes else range(1, len(sizes) + 1))
        if k <= len(labels) and len(sizes) <= k * p <= np.minimum(sizes, k).sum()
    ]
    if not possible:
        with pytest.raises(ConfigError, match="^classes_per_client: |^num_clients: "):
            divide(labels, how, 0)
        return
    rows, _ = divide(labels, how, 0)
    held = {len(np.unique(labels[held])) for held in rows}
    assert (len(rows), *held) in possible and len(held) == 1


def test_few_images_make_several_clients():
    def clients(images: int) -> int:
        how = Partition("iid", images_per_client=None).fitted(np.array([images // 2, images - images // 2]))
        return how.clients_of(images)

    assert [clients(n) for n in (8, 40, 72, 500, 1000, 12_000)] == [1, 4, 8, 10, 10, 120]


# ---- all mistakes at once


def test_all_mistakes_come_in_one_answer_and_before_images_are_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fedss_kernels.federated.data.image_folder.cached_images", None)
    folder = write_noise(tmp_path / "data", 3, 10)
    argv = ["run", "--data=image_folder", f"--data-dir={folder}", f"--cache-dir={tmp_path}/cache"]
    argv += ["--model=conv4", "--cohort=32", f"--out={tmp_path}/out"]
    assert cli.main([*argv, "--num-clients=2"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "--model: conv4 can't take images of 3x28x28" in err
    assert "; --cohort: expected at most 2, the clients there are, got 32" in err
    assert cli.main([*argv, "--classes-per-client=9", "--num-clients=2"]) == 2
    err = capsys.readouterr().err
    assert (
        "--classes-per-client: 24 images of 3 classes among 2 clients: expected a number from 2 to 3" in err
    )
    assert "--model: conv4 can't take" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("numbers", "wrong"),
    [
        ({"num_clients": 99, "classes_per_client": 20}, ["num_clients", "classes_per_client", "cohort"]),
        ({"num_clients": 2, "classes_per_client": 20}, ["classes_per_client", "cohort"]),
        ({"num_clients": 99, "partition": "iid"}, ["num_clients", "cohort"]),
    ],
)
def test_numbers_for_more_images_than_there_are_come_at_once(numbers, wrong, tmp_path):
    """As the defaults of a data set are for a sample of it."""
    folder = write_noise(tmp_path / "data", 3, 10)
    options = {"data": "image_folder", "data_dir": folder, "model": "conv4_rgb", "cohort": 32} | numbers
    with pytest.raises(ConfigError) as caught:
        load_data(Config(cache_dir=tmp_path / "cache", **options))
    assert [option for option, _ in caught.value.mistakes] == wrong


def test_all_that_does_not_fit_data_of_ones_own_comes_at_once():
    from tiny_federation import tiny_config, tiny_data

    with pytest.raises(ConfigError, match=r"cohort: expected at most 5.*; model: conv4 can't take") as caught:
        run(tiny_config(cohort=9), data=tiny_data())
    assert [option for option, _ in caught.value.mistakes] == ["cohort", "model"]


def test_a_holdout_is_counted_before_images_are_read(tmp_path):
    folder = write_noise(tmp_path / "data", 2, 20)
    with pytest.raises(ConfigError, match="cohort: expected at most 3, the clients there are, got 4"):
        load_data(config(folder, cohort=4, holdout=0.25))
    assert len(load_data(config(folder, holdout=0.25)).clients) == 3


@pytest.mark.parametrize(
    "method, words",
    [
        ("fedss", "of the 96 images those of the clients held out are the test, not the 72"),
        (
            "local_only",
            "of the 96 images those of the clients held out are there alone, some of each in the test",
        ),
    ],
)
def test_the_line_says_what_a_holdout_does(method, words, tmp_path):
    config = Config(glyph_classes=12, glyph_writers=4, cohort=2, holdout=0.5, method=method)
    (said,) = [line for line in choices(config, Found("glyphs", 12, 96, 72, 2)) if "holdout" in line]
    assert said == f"--holdout 0.5: {words}"
    data = load_data(replace(config, cache_dir=tmp_path))
    held = sum(map(len, data.clients))
    assert f"{held} training and {len(data.test_images)} test images, 2 clients" in repr(data) and held < 96


def test_images_that_are_no_clients_are_counted(caplog):
    """Of the tiny data nobody has an image of the last class."""
    data = tiny_data()
    few = replace(data, clients=tuple(rows[data.labels[rows] != 2] for rows in data.clients))
    lost, images = int((data.labels == 2).sum()), len(data.images)
    assert lost > 0 and f"{images - lost} training and" in repr(few)
    unheld = f"training images that are no client's, and are not there: {lost} of {images}"
    untrained = "test images of classes of which no client has an image: {} of 21"
    tested = replace(data, test_labels=data.test_labels.clamp(max=5))
    for each, said in (
        (few, [unheld, untrained.format(6)]),
        (data, [untrained.format(3)]),
        (tested, []),
        (replace(few, task="retrieval"), [unheld]),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run(tiny_config(rounds=1, task=each.task), data=each, model=tiny_model())
        assert caplog.messages == said


def test_more_rounds_with_another_default_warmup_are_told(tmp_path, caplog):
    begun = tiny_config(rounds=9, lr_decay="constant", out=tmp_path)
    begun = replace(begun, **dict.fromkeys(["warmup_rounds"]))
    data = tiny_data()
    words = "the run goes on with the warm-up it began with, of 0 rounds; by default one of 10 rounds has 1"
    assert run(begun, data=data, model=tiny_model()).config.warmup_rounds == 0
    for rounds, said in ((10, True), (11, False)):
        caplog.clear()
        more = replace(begun, rounds=rounds, warmup_rounds=0)
        run(more, data=data, model=tiny_model(), resume=True)
        assert (words in caplog.messages) == said


def test_a_holdout_of_everybody_is_named_as_what_it_is(tmp_path):
    folder = write_noise(tmp_path / "data", 2, 5)
    with pytest.raises(ConfigError, match="^holdout: expected to leave some of 1 clients, got 0.5$"):
        load_data(config(folder, holdout=0.5))


def test_drawn_data_that_fit_neither_the_cohort_nor_the_net_are_told_both():
    with pytest.raises(ConfigError, match="crop_size: .*; cohort: expected at most 4, the clients there are"):
        load_data(Config(glyph_classes=12, glyph_writers=4, cohort=50, crop_size=99))
