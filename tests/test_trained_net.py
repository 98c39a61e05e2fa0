"""`load_net`: the net of a finished run's folder, and its input."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_federation import tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import Config, load_net, run
from fedss_kernels.federated.config import ConfigError
from fedss_kernels.federated.idle_settings import idle
from fedss_kernels.federated.loading import load_data
from fedss_kernels.federated.metrics import retrieval


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for c in range(5):
        (folder / f"class{c}").mkdir()
        for i in range(6):
            pixels = np.random.default_rng([c, i]).integers(256, size=(40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{c}" / f"{i}.png")
    return folder


def trained(folder: Path, **options) -> tuple[Config, torch.nn.Module]:
    result = run(Config(**({"rounds": 1, "max_norm": 1e9} | options), out=folder))
    return result.config, result.extractor


def test_the_net_of_a_folder_embeds_image_files_as_its_run_did(photos, tmp_path):
    options = {"data": "image_folder", "data_dir": photos, "cache_dir": tmp_path / "cache"}
    options |= {"model": "conv4_rgb", "embedding_dim": 8, "task": "retrieval", "image_size": 32}
    config, extractor = trained(tmp_path / "run", **options)
    net, as_input = load_net(tmp_path / "run")
    data = load_data(config)
    assert not net.training and config.crop_size == 28
    expected = extractor(data.test_images[:, :, 2:30, 2:30] / 255)
    assert torch.equal(net(as_input(data.test_images)), expected)
    of_test = json.loads((tmp_path / "run" / "summary.json").read_text())["map_at_10"]
    assert retrieval(expected, data.test_labels).measured["map_at_10"] == of_test
    held_out = next(c for c in range(5) if f"class{c}" not in data.class_names)
    files = sorted((photos / f"class{held_out}").iterdir())
    assert torch.equal(net(as_input(files)), expected)
    assert torch.equal(net(as_input([str(file) for file in files])), expected)


def test_the_share_of_the_test_is_chosen_and_its_classes_are_named(photos, tmp_path):
    options = {"data": "image_folder", "data_dir": photos, "cache_dir": tmp_path / "cache", "test_share": 0.4}
    options |= {"embedding_dim": 8, "image_size": 32, "model": "conv4_rgb", "max_norm": 1e9, "rounds": 1}
    result = run(Config(**options, task="retrieval", out=tmp_path / "run"))
    lines = (tmp_path / "run" / "classes.csv").read_text().splitlines()
    found = load_data(result.config)
    test, training = found.test_class_names, found.class_names
    assert len(test) == 2 and {*test, *training} == {f"class{c}" for c in range(5)}
    assert lines == [
        "part,number,name",
        *(f"training,{i},{name}" for i, name in enumerate(training)),
        *(f"test,{i},{name}" for i, name in enumerate(test)),
    ]
    whose = dict(zip(test, range(2), strict=True))
    file = next((photos / test[1]).iterdir())
    _, as_input = load_net(tmp_path / "run")
    pixels = found.test_images[found.test_labels == whose[test[1]]]
    assert any(torch.equal(as_input([file])[0], image) for image in as_input(pixels))
    assert len(load_data(replace(result.config, task="classification")).test_labels) == 5 * round(0.4 * 6)
    assert not load_data(replace(result.config, task="classification")).test_class_names


def test_a_share_of_what_is_divided_already_is_said_to_have_no_effect(photos, tmp_path):
    for part in ("train", "test"):
        shutil.copytree(photos, tmp_path / "split" / part)
    config = Config(data="image_folder", data_dir=tmp_path / "split", cache_dir=tmp_path / "cache")
    words = "test_share 0.4 has no effect: train and test are folders"
    assert words in load_data(replace(config, test_share=0.4)).notes
    assert not load_data(config).notes
    assert idle([Config(test_share=0.4)]) == ["test_share 0.4 has no effect: it is for the data image_folder"]


def test_a_net_that_was_handed_over_is_handed_over_again(tmp_path):
    folder, model = tmp_path / "run", tiny_model()
    result = run(tiny_config(rounds=1, out=folder), data=tiny_data(), model=model)
    with pytest.raises(ValueError, match=r"^model: expected .*load_net\(run, model=.*handed over in"):
        load_net(folder)
    net, as_input = load_net(str(folder), model=model)
    images = as_input(tiny_data().test_images)
    assert torch.equal(net(images), result.extractor(images)) and net is not model
    with pytest.raises(ValueError, match="^model: .* is of another net"):
        load_net(folder, model=torch.nn.Linear(2, 2))


def test_what_cannot_be_is_said(tmp_path):
    with pytest.raises(ValueError, match="no run in .*nowhere"):
        load_net(tmp_path / "nowhere")
    run(
        tiny_config(rounds=1, out=tmp_path / "run", method="local_only"), data=tiny_data(), model=tiny_model()
    )
    with pytest.raises(ValueError, match="one net for all, got one of local_only"):
        load_net(tmp_path / "run", model=tiny_model())


def test_a_run_begins_with_the_net_of_another_where_that_has_one_for_all(tmp_path):
    """That of local training has been trained by nobody: each client has its own."""
    options = {"glyph_classes": 6, "glyph_writers": 2, "cohort": 2, "embedding_dim": 8, "server_lr": 1.0}
    for method in ("fedper", "local_only"):
        trained(tmp_path / method, method=method, partition="iid", num_clients=2, **options)
    begun = tmp_path / "fedper" / "model.pt"
    config, _ = trained(tmp_path / "run", init_checkpoint=begun, **options)
    assert config.init_checkpoint == begun
    words = "local_only/model.pt: expected a run with one net for all, got one whose clients have their own$"
    with pytest.raises(ConfigError, match=f"^init_checkpoint: .*{words}"):
        trained(tmp_path / "none", init_checkpoint=tmp_path / "local_only" / "model.pt", **options)
    assert not (tmp_path / "none").exists()


def test_a_bottleneck_needs_the_net_as_its_run_made_it(tmp_path):
    options = {"method": "mocosfl", "model": "conv4_ws", "bottleneck": "C4S2", "batch_size": 2}
    sizes = {"cohort": 2, "rounds": 1, "queue_size": 8, "key_dim": 8, "embedding_dim": 128}
    result = run(Config(**options, **sizes, out=tmp_path / "run"), data=tiny_data())
    with pytest.raises(ValueError, match="^model: expected a run without a bottleneck"):
        load_net(tmp_path / "run")
    net, as_input = load_net(tmp_path / "run", model=result.extractor)
    images = as_input(tiny_data().images)
    assert torch.equal(net(images), result.extractor(images))


def test_images_are_uint8_or_files(tmp_path):
    trained(tmp_path / "run", glyph_classes=6, glyph_writers=2, cohort=2, embedding_dim=8)
    _, as_input = load_net(tmp_path / "run")
    with pytest.raises(ValueError, match="^images: expected .* uint8, got .*float32"):
        as_input(torch.zeros(2, 1, 28, 28))
    with pytest.raises(ValueError, match="^images: expected a tensor, as image files are no data of glyphs"):
        as_input(["a.png"])


@pytest.mark.parametrize("images", ["a.png", Path("a.png"), np.zeros((2, 1, 28, 28), np.uint8)])
def test_what_is_no_sequence_of_files_is_refused_by_its_type(images, tmp_path):
    trained(tmp_path / "run", glyph_classes=6, glyph_writers=2, cohort=2, embedding_dim=8)
    _, as_input = load_net(tmp_path / "run")
    words = f"^images: expected a tensor or a sequence of files, got {type(images).__name__}$"
    with pytest.raises(ValueError, match=words):
        as_input(images)


def test_files_that_give_no_pixels_are_named_with_their_reasons(photos, tmp_path):
    options = {"data": "image_folder", "data_dir": photos, "cache_dir": tmp_path / "cache"}
    trained(tmp_path / "run", **options, image_size=32, model="conv4_rgb", embedding_dim=8)
    _, as_input = load_net(tmp_path / "run")
    assert as_input([]).shape == (0, 3, 28, 28)
    good = sorted((photos / "class0").iterdir())
    text, cut, gone = (tmp_path / name for name in ("text.jpg", "cut.png", "gone.png"))
    text.write_text("hello")
    cut.write_bytes(good[0].read_bytes()[:1000])
    with pytest.raises(ValueError, match="^images: 3 of 9 files cannot be read: ") as refused:
        as_input([*good, text, cut, gone])
    for file, reason in ((text, "no image that Pillow can open"), (cut, "truncated"), (gone, "No such file")):
        assert f"{file} (" in str(refused.value) and reason in str(refused.value)
