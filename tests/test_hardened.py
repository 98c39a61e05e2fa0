"""Halves that a server prepares: the file, a run that begins with it, and that it shows less of images."""

import csv
import dataclasses

import pytest
import torch
from images_copied import Copied
from tiny_federation import tiny_config, tiny_data
from torch import nn

from fedss_kernels.federated import ConfigError, Stopped, run
from fedss_kernels.federated.clients.player import Player
from fedss_kernels.federated.config import Config
from fedss_kernels.federated.figures import inversion
from fedss_kernels.federated.files.half_file import HalfFile
from fedss_kernels.federated.models.blocks import Chain
from fedss_kernels.federated.split_learning.half import cut
from fedss_kernels.federated.split_learning.hardened import Diverged, harden
from fedss_kernels.federated.split_learning.resistance import Resistance
from fedss_kernels.federated.split_learning.split_round import SplitRound


def net(seed=1):
    torch.manual_seed(seed)
    return Chain(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        stem=nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.GroupNorm(1, 4), nn.ReLU()),
        block1=nn.Sequential(nn.Conv2d(4, 4, 3, stride=2), nn.GroupNorm(1, 4), nn.ReLU()),
    )


def config(**options):
    usual = {"method": "mocosfl", "data": "own", "model": "own", "bottleneck": "C2S2", "queue_size": 12}
    return tiny_config(**usual | {"key_dim": 3, "round_steps": 2, "client_lr": 0.05} | options)


def made(target=None, epochs=None, source=None, **options):
    target = tiny_data().test_images[:3] if target is None else target
    epochs = [] if epochs is None else epochs
    keep = {"model": net(), "width": 4, "on_epoch": lambda *found: epochs.append(found)}
    return harden(config(**options), source or tiny_data(), target, Resistance(), **keep)


@pytest.fixture
def half(tmp_path):
    made().write(tmp_path / "half.safetensors")
    return tmp_path / "half.safetensors"


def frozen(half, **options):
    return config(half_checkpoint=half, freeze_clients=True, **options)


def test_a_file_is_read_as_it_was_written(tmp_path):
    epochs = []
    half = made(epochs=epochs)
    half.write(tmp_path / "half.safetensors")
    found = HalfFile.read(tmp_path / "half.safetensors")
    for name in ("net", "head"):
        torch.testing.assert_close(getattr(found, name), getattr(half, name), rtol=0, atol=0)
    assert found.config == half.config and Config.from_dict(found.config).bottleneck == "C2S2"
    assert found.made["target_images"] == 3 and found.made["strength"] == 2.0
    assert [epoch for epoch, _, _ in epochs] == [0, 1, 2]
    assert epochs[-1][1:] == (found.made["loss"], found.made["attacker_ssim"])


def test_equal_arguments_make_equal_halves_and_the_target_makes_others():
    one, same, without = made(), made(), made(target=tiny_data().images[:0])
    torch.testing.assert_close((one.net, one.head), (same.net, same.head), rtol=0, atol=0)
    assert any(not torch.equal(one.net[name], without.net[name]) for name in one.net)
    assert any(
        not torch.equal(one.net[name], value) for name, value in net().state_dict().items() if name in one.net
    )


def test_images_of_no_client_are_not_trained_on():
    data, without = tiny_data(), tiny_data().images[:0]
    few = tuple(rows - 6 for rows in data.clients[1:])
    names = {"client_names": data.client_names[1:], "test_clients": ()}
    more = dataclasses.replace(data, clients=data.clients[1:], **names)
    alone = dataclasses.replace(data, images=data.images[6:], labels=data.labels[6:], clients=few, **names)
    one, same = (made(target=without, source=source, round_steps=0) for source in (more, alone))
    torch.testing.assert_close((one.net, one.head), (same.net, same.head), rtol=0, atol=0)
    with Copied() as copied:
        made(target=without, source=more, rounds=1, round_steps=1)
    assert copied.most == config().batch_size < len(alone.images), "a batch at a time"


def test_a_run_begins_with_both_halves_and_its_copies_are_they(half):
    """The copies are made after the file is read, not before."""
    settings, found = frozen(half), HalfFile.read(half)
    player = Player(settings, tiny_data(), net(seed=2))
    algorithm, names = SplitRound(settings, player), list(player.extractor.module.state_dict())
    clients, server = algorithm.joint.clients, algorithm.joint.server
    head = [found.head[name] for name in ("0.weight", "0.bias", "2.weight", "2.bias")]
    expected = torch.cat([value.flatten() for value in (*(found.net[name] for name in names), *head)])
    torch.testing.assert_close(torch.cat([clients.weights, server.weights]), expected, rtol=0, atol=0)
    assert torch.equal(clients.copy, clients.weights) and torch.equal(server.copy, server.weights)
    assert torch.equal(algorithm.initial, expected[: len(algorithm.initial)])


def test_clients_keep_it_to_the_bit_and_nothing_comes_down_but_it(half, tmp_path):
    settings = frozen(half, out=tmp_path / "run")
    result = run(settings, data=tiny_data(), model=net(seed=2))
    found, trained = HalfFile.read(half).net, result.extractor.state_dict()
    for name, value in trained.items():
        assert torch.equal(value, found[name]) == name.startswith("blocks.stem."), name
    with (tmp_path / "run" / "ledger.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert sum(int(line["up_latents"]) for line in lines) > 0
    assert not any(int(line[flow]) for line in lines for flow in ("down_gradients", "up_extractor"))
    came = [line["client"] for line in lines if int(line["down_extractor"])]
    assert len(came) == len(set(came)) == len({line["client"] for line in lines})


@pytest.mark.exhaustive
def test_a_run_that_was_stopped_goes_on_wherever_the_file_is_now_and_not_with_another(half, tmp_path):
    def go(half, out, **how):
        return run(frozen(half, out=tmp_path / out), data=tiny_data(), model=net(), **how)

    whole = go(half, "whole").extractor
    with pytest.raises(Stopped):
        go(half, "run", stop=lambda: True)
    moved = half.rename(half.with_name("moved.safetensors"))
    torch.testing.assert_close(
        go(moved, "run", resume=True).extractor.state_dict(), whole.state_dict(), rtol=0, atol=0
    )
    with pytest.raises(Stopped):
        go(moved, "other", stop=lambda: True)
    made(seed=5).write(moved)
    with pytest.raises(ValueError, match="net"):
        go(moved, "other", resume=True)


def test_a_half_of_another_net_is_refused_by_what_differs(half, tmp_path):
    def words(**options):
        settings = frozen(options.pop("file", half), **options)
        with pytest.raises(ConfigError) as found:
            run(settings, data=tiny_data(), model=options.pop("net", net()))
        return str(found.value)

    assert words(bottleneck="C3S2").endswith("is of another net: expected bottleneck C2S2, got C3S2")
    assert words(key_dim=4, bottleneck=None).endswith("expected bottleneck C2S2, got None; key_dim 3, got 4")
    assert "cannot read" in words(file=tmp_path / "none")
    damaged = tmp_path / "damaged"
    damaged.write_bytes(half.read_bytes()[:100])
    assert words(file=damaged).endswith("damaged, or not of fedss harden")
    with pytest.raises(ConfigError, match="half_checkpoint: expected freeze_clients with it"):
        config(half_checkpoint=half)
    other = Chain(nn.Flatten(), stem=nn.Conv2d(1, 3, 6), block1=nn.Conv2d(3, 4, 1))
    with pytest.raises(ConfigError, match="is of another net"):
        run(frozen(half), data=tiny_data(), model=other)


def test_targets_that_do_not_fit_and_numbers_that_are_not_finite_are_told():
    with pytest.raises(
        ValueError, match=r"target: expected images as the source's, \(1, 6, 6\), got \(1, 5, 5\)"
    ):
        made(target=torch.zeros(1, 1, 5, 5, dtype=torch.uint8))
    with pytest.raises(Diverged, match="epoch 1: numbers are not finite"):
        made(client_lr=1e30)


def smooth(count, seed=0, size=16):
    """Images with something to see everywhere."""
    coarse = torch.rand(count, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (255 * nn.functional.interpolate(coarse, size=size, mode="bilinear")).to(torch.uint8)


@pytest.mark.exhaustive
def test_a_half_that_was_trained_against_an_attacker_shows_less_to_others():
    """The same net, bottleneck, images and steps. The attackers are new, and so are their images."""
    data = tiny_data()
    data = dataclasses.replace(data, images=smooth(len(data.images)), test_images=smooth(21))
    images = smooth(512, seed=1)
    settings = config(bottleneck="C4S2", batch_size=16, rounds=4, round_steps=100, queue_size=200, key_dim=8)

    def attack(strength):
        resistance = Resistance(strength, 0.1)
        made = harden(settings, data, images[:256], resistance, model=net(), width=8)
        player = Player(settings, data, net())
        player.extractor.module.load_state_dict(made.net)
        half = cut(player.extractor.module, 1)[0].eval()
        seen = inversion.Images(images[256:448] / 255, images[448:] / 255)
        lines = inversion.measure({"it": half}, seen, seed=0, epochs=20, width=8).lines[1:]
        return {line.attacker: line for line in lines}

    shown, hidden = attack(0.0), attack(40.0)
    for attacker in shown:
        assert hidden[attacker].mse > 1.2 * shown[attacker].mse
    trained_against = "residual, for SSIM"
    assert hidden[trained_against].ssim < shown[trained_against].ssim - 0.04
