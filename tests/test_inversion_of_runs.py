"""`fedss invert` and `harden`: whose images, which attackers, what is written, and what is refused."""

import argparse
import csv
import dataclasses
import json
import shutil

import pytest
import torch
from image_files import write_image
from images_copied import Copied
from torch import nn

from fedss_kernels.federated import ConfigError, cli
from fedss_kernels.federated.cli import inversion as commands
from fedss_kernels.federated.cli.options import Mistake
from fedss_kernels.federated.config import Config
from fedss_kernels.federated.figures import inversion
from fedss_kernels.federated.files.half_file import HalfFile
from fedss_kernels.federated.loading import load_data
from fedss_kernels.federated.split_learning.inversion import nearness

IN_ONE_PLACE = "--data=glyphs --glyph-classes=6 --glyph-writers=8".split()  # fewer clients than a cohort
DATA = [*IN_ONE_PLACE, "--cohort=2"]
NET = "--model=conv4_ws --embedding-dim=128 --key-dim=8 --queue-size=40 --rounds=1 --round-steps=2".split()
ATTACK = "--attack-share=0.1 --attack-images=9 --attack-epochs=1 --attack-width=4".split()
ALL = ["residual, for MSE", "residual, for SSIM", "plain, for MSE"]


def fedss(command, *arguments):
    return cli.main([command, *map(str, arguments)])


def train(out, *options):
    assert fedss("run", *DATA, *NET, "--method=mocosfl", f"--out={out}", *options) == 0
    return out


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "wide")


def pixels(count, seed=0):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_attacker_has_a_share_and_is_tried_on_others_by_the_seed():
    images = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1)

    def drawn(**options):
        found = inversion.Images.drawn(
            images, prepared=lambda x: x, **{"share": 0.1, "count": 30, "seed": 0} | options
        )
        return found.own.flatten().tolist(), found.others.flatten().tolist()

    own, others = drawn()
    assert len(own) == 20 and len(others) == 30 and not {*own} & {*others}
    assert drawn() == (own, others) and drawn(seed=1) != (own, others)
    assert inversion.Images.drawn(images, 0.1, 3, 0, lambda x: x / 255).own.max() <= 1
    for options in ({"share": 0.005}, {"share": 0.9}):
        with pytest.raises(
            ValueError, match="images: expected 2 or more for the attacker, and others to try it on"
        ):
            drawn(**options)


def test_it_is_said_where_attackers_have_few_images(tmp_path):
    """From them none learns, and a half that shows all seems safe."""
    half, how = {"all": nn.Identity()}, {"seed": 0, "epochs": 1, "width": 2}
    few = inversion.measure(half, inversion.Images(pixels(3), pixels(2)), **how)
    assert few.remark.startswith("each attacker has 3 images, and trains on 2 of them: from so few")
    inversion.write(tmp_path, few)
    assert f"Here {few.remark}." in (tmp_path / "report.html").read_text()
    assert (
        inversion.Images(pixels(99), pixels(2)).remark and not inversion.Images(pixels(100), pixels(2)).remark
    )


@pytest.mark.exhaustive
def test_a_half_that_shows_more_is_inverted_better_and_all_meet_the_same_attackers():
    x = torch.nn.functional.interpolate(pixels(90)[:, :, ::4, ::4], scale_factor=4, mode="bilinear")
    images, lines = inversion.Images(x[:60], x[60:]), []
    shows, hides = nn.AvgPool2d(2), nn.Sequential(nn.AvgPool2d(8), nn.Upsample(scale_factor=4))
    found = inversion.measure(
        {"shows": shows, "hides": hides},
        images,
        seed=0,
        epochs=8,
        width=8,
        on_line=lambda found: lines.append(found.lines[-1]),
    )
    assert found.lines == lines
    assert [(line.half, line.attacker) for line in lines] == [("none", "the mean image")] + [
        (half, attacker) for half in ("shows", "hides") for attacker in ALL
    ]
    mse = {(line.half, line.attacker): line.mse for line in lines}
    assert mse["none", "the mean image"] == nearness(x[:60].mean(0).expand(30, -1, -1, -1), x[60:]).mse
    assert all(mse["shows", attacker] < mse["hides", attacker] for attacker in ALL[::2])
    assert [line.latents for line in lines] == [0] + [16] * 6
    assert torch.equal(found.images, x[60:68]) and list(found.pictures) == [
        f"{half}: {attacker}" for half in ("shows", "hides") for attacker in ALL
    ]
    again = inversion.measure({"hides": hides}, images, seed=0, epochs=8, width=8)
    assert again.lines[1:] == found.lines[4:]  # whatever else is measured


@pytest.mark.exhaustive
def test_runs_are_attacked_side_by_side(wide, tmp_path, capsys):
    runs = [wide, train(tmp_path / "narrow", "--bottleneck=C2S2")]
    out = tmp_path / "out"
    capsys.readouterr()
    assert fedss("invert", *runs, *ATTACK, f"--out={out}") == 0
    lines = table(out / "inversion.csv")
    assert [(line["half"], line["latents"]) for line in lines] == [
        ("none", "0"),
        *[("wide", str(16 * 14 * 14))] * 3,
        *[("narrow", str(2 * 7 * 7))] * 3,
    ]
    assert all(0 < float(line["mse"]) < 1 and -1 <= float(line["ssim"]) <= 1 for line in lines)
    said = capsys.readouterr()
    assert (out / "inversion.md").read_text() in said.out
    assert "fedss invert: narrow, plain, for MSE: MSE " in said.err
    assert (out / "inversion.png").read_bytes().startswith(b"\x89PNG")
    assert "What latents show of images" in (out / "report.html").read_text()
    trained = torch.load(runs[1] / "model.pt", weights_only=True)["extractor"]
    config = Config.load(runs[1] / "config.json")
    half, _ = inversion.clients_half(config, load_data(config), trained)
    assert torch.equal(half[0][1].weight, trained["blocks.stem.1.weight"])


def test_what_cannot_be_attacked_is_told_in_a_line(wide, tmp_path, capsys):
    other, whole = shutil.copytree(wide, tmp_path / "other"), tmp_path / "whole"
    for file in (other / "config.json", *other.glob("checkpoint*/checkpoint.json")):
        file.unlink()
    assert fedss("run", *DATA, "--rounds=1", f"--out={whole}") == 0
    capsys.readouterr()

    def words(*arguments):
        assert fedss("invert", *arguments, f"--out={tmp_path / 'out'}") == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert f"method of {whole}: expected one whose clients send latents, got 'fedss'" in words(whole, *ATTACK)
    for change in ({"data_seed": 1}, {"holdout": 0.25}):
        dataclasses.replace(Config.load(wide / "config.json"), **change).save(other / "config.json")
        same = f"other: expected a run whose clients hold the same images as {wide}'s"
        assert same in words(wide, other, *ATTACK)
    assert "images: expected 2 or more for the attacker" in words(wide, "--attack-images=100000")
    assert "no run in" in words(tmp_path / "none")
    assert not (tmp_path / "out").exists()


def test_an_attacker_sees_images_of_clients_alone():
    """Those of a holdout are the test, which nobody trains on."""
    data = load_data(Config(data="glyphs", glyph_classes=6, glyph_writers=8, cohort=1, holdout=0.5))
    held = torch.cat(data.clients)
    everything = argparse.Namespace(attack_share=0.5, attack_images=len(held) // 2)
    with Copied() as copied:
        found = commands._drawn(everything, data, 0, lambda images: images)
    assert copied.most == len(found.own) == len(held) // 2, "no more than are wanted"
    drawn = torch.cat([found.own, found.others]).flatten(1)
    assert sorted(drawn.tolist()) == sorted(data.images[held].flatten(1).tolist())
    known = commands._known(argparse.Namespace(target_share=0.999999), Config(), data)
    assert sorted(known.flatten(1).tolist()) == sorted(drawn.tolist())


@pytest.mark.exhaustive
def test_latents_that_no_decoder_takes_are_told_before_any_attack(wide, tmp_path, capsys):
    """Of all such runs at once: nothing that was measured of others gets lost."""
    own = ["--model=isotropic:depth=2,patch=7", "--embedding-dim=32"]
    coarse = train(tmp_path / "coarse", *own)
    again = shutil.copytree(coarse, tmp_path / "again")
    capsys.readouterr()
    assert fedss("invert", wide, coarse, again, *ATTACK, f"--out={tmp_path / 'out'}") == 2
    words = "expected a height and width that doublings make those of images, 28 x 28, got 4 x 4"
    assert capsys.readouterr().err == (
        f"fedss invert: latents of {coarse}: {words}; latents of {again}: {words}\n"
    )
    assert not (tmp_path / "out").exists()
    assert (
        fedss("harden", *IN_ONE_PLACE, *NET, *ATTACK, *own, "--batch-size=6", f"--out={tmp_path / 'half'}")
        == 2
    )
    assert "fedss harden: latents: expected a height" in capsys.readouterr().err
    tokens, images = nn.Flatten(2), inversion.Images(pixels(2), pixels(1))
    with pytest.raises(ValueError, match=r"^latent: expected \(channels, height, width\), got \(1, 64\)$"):
        inversion.check_latents(tokens, images)


def test_the_target_has_its_own_defaults(tmp_path):
    """And the size of the source's images: they go through one net."""
    folder = tmp_path / "images"
    for i in range(12):
        write_image(folder / f"class{i % 2}" / f"{i}.png", i)
    own = {"cache_dir": tmp_path / "cache", "model": "conv4_rgb", "cohort": 1}
    source = load_data(Config(data="image_folder", data_dir=folder, image_size=32, **own))
    drawn = Config(data="glyphs", **own)  # natural, of images that keep their size

    def target(*given):
        arguments = argparse.Namespace(target="image_folder", target_dir=folder, given=given)
        return commands._target(arguments, drawn, source)

    assert target("data").images.shape[1:] == (3, 32, 32)
    words = "^of --target image_folder: --partition: these images have no authors"
    with pytest.raises(Mistake, match=words):
        target("data", "partition")
    folder = tmp_path / "none"
    with pytest.raises(Mistake, match="^of --target image_folder: --target-dir: no such folder: .*none$"):
        target("data")


@pytest.mark.exhaustive
def test_a_half_is_made_attacked_and_begun_with(tmp_path, capsys):
    out, half = tmp_path / "half", tmp_path / "half" / "half.safetensors"
    arguments = [*IN_ONE_PLACE, *NET, *ATTACK, "--batch-size=6", f"--out={out}"]
    assert fedss("harden", *arguments, "--target=glyphs", "--target-share=0.02", "--strength=3") == 0
    said = capsys.readouterr()
    assert "fedss harden: epoch 1 of 1: loss " in said.err and str(half) in said.out
    made = HalfFile.read(half)
    assert made.config["bottleneck"] == "C4S2" and made.config["batch_size"] == 6
    assert made.made["strength"] == 3 and made.made["target_images"] > 0
    lines = table(out / "inversion.csv")
    assert [{name: str(value) for name, value in line.items()} for line in made.made["attack"]] == lines
    assert [line["attacker"] for line in lines] == ["the mean image", *ALL]
    train(tmp_path / "run", "--bottleneck=C4S2", f"--half-checkpoint={half}", "--freeze-clients")
    capsys.readouterr()
    assert fedss("invert", tmp_path / "run", *ATTACK, f"--out={tmp_path / 'inverted'}") == 0
    again = table(tmp_path / "inverted" / "inversion.csv")
    assert [line["mse"] for line in again] == [line["mse"] for line in lines]  # it is the same half
    assert fedss("harden", *arguments) == 2
    assert "half.safetensors is there: choose another folder" in capsys.readouterr().err
    assert fedss("harden", *arguments, "--overwrite") == 0
    assert HalfFile.read(half).made["target_images"] == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["traffic"]["down_gradients"] == 0


def test_a_net_that_is_not_finite_is_told_beside_the_others(wide, tmp_path, capsys):
    ruined = shutil.copytree(wide, tmp_path / "ruined")
    model = torch.load(ruined / "model.pt", weights_only=True)
    model["extractor"]["blocks.stem.1.weight"][0] = torch.nan
    torch.save(model, ruined / "model.pt")
    capsys.readouterr()
    assert fedss("invert", wide, ruined, *ATTACK, f"--out={tmp_path / 'out'}") == 1
    said = capsys.readouterr()
    assert said.err.startswith("fedss invert: each attacker has ")  # a few images
    assert said.err.splitlines()[-1] == "fedss invert: ruined: what is made of its latents is not finite"
    assert "| wide |" in said.out and "| nan |" in said.out


@pytest.mark.parametrize(
    "command, error, code, words",
    [
        ("invert", KeyboardInterrupt(), 130, "stopped"),
        ("harden", KeyboardInterrupt(), 130, "stopped"),
        ("invert", OSError(5, "Input/output error"), 1, "Input/output error"),
    ],
)
def test_attacks_that_are_done_when_it_ends_early_are_written(
    command, error, code, words, wide, tmp_path, capsys, monkeypatch
):
    real, done = inversion.train_attacker, []

    def train_attacker(*arguments, **options):
        if done:
            raise error
        done.append(real(*arguments, **options))

    monkeypatch.setattr(inversion, "train_attacker", train_attacker)
    argv = [wide] if command == "invert" else [*IN_ONE_PLACE, *NET, "--batch-size=6"]
    capsys.readouterr()
    assert fedss(command, *argv, *ATTACK, f"--out={tmp_path / 'out'}") == code
    assert [line["attacker"] for line in table(tmp_path / "out" / "inversion.csv")] == [
        "the mean image",
        ALL[0],
    ]
    left_out, stopped = capsys.readouterr().err.splitlines()[-2:]
    assert left_out == f"fedss {command}: stopped: what is not there was not measured"
    assert stopped == f"fedss {command}: {words}"
    if command == "harden":
        assert len(HalfFile.read(tmp_path / "out" / "half.safetensors").made["attack"]) == 2


@pytest.mark.parametrize("room", [1000, 10_000_000])
def test_no_half_is_trained_for_which_there_is_no_room(
    room, tmp_path, capsys, monkeypatch, room_for_files_of
):
    """And of a disk that is full only after the training it is said, too."""
    out = tmp_path / "half"
    if room > 1000:
        monkeypatch.setattr(HalfFile, "write", fails_with(OSError(28, "No space left on device", "the half")))
    load_data(Config(data="glyphs", glyph_classes=6, glyph_writers=8, cohort=1))  # drawn before
    with room_for_files_of(room):
        assert fedss("harden", *IN_ONE_PLACE, *NET, *ATTACK, "--batch-size=6", f"--out={out}") == 1
    few, *trained, last = capsys.readouterr().err.splitlines()
    assert few.startswith("fedss harden: each attacker has ")  # a few images, before the training
    reason = "No space left on device: the half" if trained else f"File too large: {out}"
    assert last == f"fedss harden: {reason}; nothing of this training is saved"
    assert bool(trained) is (room > 1000) and not any(out.iterdir())


def fails_with(error):
    def fail(*arguments):
        raise error

    return fail


def test_what_the_attack_found_is_told_where_it_cannot_be_kept(tmp_path, capsys, monkeypatch):
    out, write = tmp_path / "half", HalfFile.write

    def first(half, path):
        if "attack" in half.made:
            raise OSError(28, "No space left on device", str(path))
        write(half, path)

    monkeypatch.setattr(HalfFile, "write", first)
    argv = [*IN_ONE_PLACE, *NET, *ATTACK, "--batch-size=6", "--target-share=0.5", f"--out={out}"]
    assert fedss("harden", *argv) == 1
    said, half = capsys.readouterr(), out / "half.safetensors"
    assert said.out.startswith("--target-share has no effect: --target is not given\n")
    assert (out / "inversion.md").read_text() in said.out
    why = "without what the attack found: No space left on device"
    assert said.err.splitlines()[-1] == f"fedss harden: {half} is there, {why}: {half}"
    assert "attack" not in HalfFile.read(half).made


def test_a_training_that_comes_to_nothing_writes_no_half(tmp_path, capsys):
    out = tmp_path / "half"
    assert (
        fedss("harden", *IN_ONE_PLACE, *NET, *ATTACK, "--batch-size=6", "--client-lr=1e30", f"--out={out}")
        == 1
    )
    assert "epoch 1: numbers are not finite" in capsys.readouterr().err and not any(out.iterdir())


def test_only_split_runs_have_a_half():
    with pytest.raises(ConfigError, match="method: expected one whose clients send latents, got 'fedss'"):
        inversion.check(Config())
