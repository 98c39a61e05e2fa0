"""Learning without labels: the loss of two views, its head, and simclr, which trains all of the net by it."""

import csv
import dataclasses

import pytest
import torch
from tiny_federation import PIXELS, tiny_config, tiny_data
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from fedss_kernels.federated import Config, ConfigError, Stopped, run
from fedss_kernels.federated.clients import contrastive
from fedss_kernels.federated.clients.contrast import contrast
from fedss_kernels.federated.clients.objectives import Queued, TwoViews
from fedss_kernels.federated.clients.player import Player
from fedss_kernels.federated.clients.views import Views
from fedss_kernels.federated.idle_settings import idle
from fedss_kernels.federated.models.projection import PROJECTED, projection_head, projection_size
from fedss_kernels.federated.randomness import Purpose, generator

WIDTH = 12
NUM_PARAMETERS, HEAD = PIXELS * WIDTH + WIDTH, projection_size(WIDTH)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, WIDTH))


def data_of(*clients):
    names = tuple(f"client {k}" for k in range(len(clients)))
    return dataclasses.replace(tiny_data(), clients=clients, client_names=names, test_clients=())


def config(**options):
    return tiny_config(**({"method": "simclr", "client_lr": 0.05, "embedding_dim": WIDTH} | options))


def train(**options):
    stop_after, seen, resume = options.pop("stop_after", None), [], options.pop("resume", False)
    return run(
        config(**options),
        data=options.pop("data", None) or tiny_data(),
        model=net(),
        on_round=seen.append,
        resume=resume,
        stop=None if stop_after is None else lambda: seen[-1].round == stop_after,
    )


def bits(result) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in result.extractor.state_dict().values()]


def test_the_loss_is_nt_xent():
    """Of each row the softmax over all the others, its other view the right one."""
    B = 5
    views = torch.randn(2 * B, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    other = torch.arange(2 * B).roll(B)
    loss = TwoViews(views[:0], 0.2).loss(views, other)
    cosines = normalize(views) @ normalize(views).T / 0.2
    expected = cross_entropy(cosines.masked_fill(torch.eye(2 * B, dtype=torch.bool), -torch.inf), other)
    found, right = (torch.autograd.grad(each, views)[0] for each in (loss, expected))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


def test_a_head_is_a_function_of_the_seed_and_the_stage_and_keeps_no_statistics():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, same, other, later = (projection_head(WIDTH, *of) for of in ((1, 0), (1, 0), (2, 0), (1, 1)))
    assert torch.equal(state, torch.get_rng_state())
    flat = [
        torch.cat([p.detach().flatten() for p in head.parameters()]) for head in (first, same, other, later)
    ]
    assert torch.equal(flat[0], flat[1]) and len(flat[0]) == HEAD
    assert not torch.equal(flat[0], flat[2]) and not torch.equal(flat[0], flat[3])
    assert not [*first.buffers()]
    x = torch.randn(6, WIDTH)
    assert torch.equal(first(x), first.eval()(x))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_clients_round_is_torchs_sgd_on_two_views(momentum):
    """Batches of 3 of its 7 images: the last, of one image, is left out."""
    k, round = 1, 2
    data = data_of(torch.arange(3), torch.arange(3, 10))
    options = {"client_momentum": momentum, "cohort": 2, "local_epochs": 2}
    player = Player(config(**options), data, net())
    phi = player.extractor.flat.clone()
    update = player.update(round, 0, k, player.request(round, 0, k), phi, torch.empty(0))
    module, head = net(), projection_head(WIDTH, 0)
    moved = [*module.parameters(), *head.parameters()]
    sgd = torch.optim.SGD(moved, lr=0.05, momentum=momentum)
    shuffle, rng = (generator(0, round, 0, k, p) for p in (Purpose.BATCHES, Purpose.AUGMENTATION))
    losses = []
    for _ in range(2):
        order = data.clients[k][torch.from_numpy(shuffle.permutation(7))]
        for batch in order.split(3)[:2]:
            views = [player.client.views(data.images[batch], rng) for _ in range(2)]
            u = normalize(head(module(torch.cat(views))))
            cosines = (u @ u.T / 0.2).masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf)
            loss = cross_entropy(cosines, torch.arange(6).roll(3))
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.append(loss.item())
    after = torch.cat([p.detach().flatten() for p in moved])
    torch.testing.assert_close(update.extractor, phi - after, rtol=1e-3, atol=1e-5)
    assert update.loss == pytest.approx(sum(losses) / 4, rel=1e-4) and update.num_examples == 7
    assert len(update.class_ids) == 0 and update.rows.shape == (0, WIDTH)


def test_the_views_of_a_pass_are_made_at_once_as_far_as_there_is_room(monkeypatch):
    """Of 7 images batches of 3, 3 and 1, the last left out; the bits are those of a call for each view."""
    order, made = torch.tensor([6, 1, 4, 3, 0, 2, 5]), []
    client = Player(config(), tiny_data(), net()).client
    by_itself = generator(0, 1, 0, 2, Purpose.AUGMENTATION)
    expected = [
        torch.cat([client.views(tiny_data().images[batch], by_itself) for _ in range(2)])
        for batch in order.split(3)[:2]
    ]
    call = type(client.views).made
    monkeypatch.setattr(type(client.views), "made", lambda *of: made.append(len(of[1])) or call(*of))
    rooms = ((contrastive.AHEAD, [12]), (12 * PIXELS, [12]), (12 * PIXELS - 1, [6, 6]), (1, [6, 6]))
    for room, counts in rooms:
        monkeypatch.setattr(contrastive, "AHEAD", room)
        made.clear()
        found = [*client.batches(order, None, generator(0, 1, 0, 2, Purpose.AUGMENTATION))]
        assert made == counts
        assert all(torch.equal(x, e) for (x, _), e in zip(found, expected, strict=True))
        assert [other.tolist() for _, other in found] == [[3, 4, 5, 0, 1, 2]] * 2


def test_no_label_is_read_in_training():
    data = tiny_data()
    blind = dataclasses.replace(data, labels=torch.full_like(data.labels, 3))
    first, second = (run(config(), data=each, model=net()) for each in (data, blind))
    assert bits(first) == bits(second)


def test_what_is_taken_away_is_the_net_alone(tmp_path):
    result = train(out=tmp_path)
    assert result.weight is None and result.table is None
    assert sum(p.numel() for p in result.extractor.parameters()) == NUM_PARAMETERS
    assert {*torch.load(tmp_path / "model.pt", weights_only=True)} == {"extractor"}
    assert result.summary.num_parameters == NUM_PARAMETERS
    assert result.summary.accuracy == result.summary.probe is not None
    assert result.summary.random_probe is not None and result.history[1].knn is not None
    assert result.summary.top1 is None and result.summary.mean_class_set == 0


def test_the_net_and_the_head_travel(tmp_path):
    result = train(out=tmp_path, dropout_rate=0.3, rounds=6)
    with (tmp_path / "ledger.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["outcome"] for line in lines} == {"accepted", "dropped"}
    for line in lines:
        up = line["outcome"] == "accepted"
        found = [int(line[f"{way}_{kind}"]) for kind in ("extractor", "projection") for way in ("down", "up")]
        assert found == [4 * NUM_PARAMETERS, 4 * NUM_PARAMETERS * up, 4 * HEAD, 4 * HEAD * up]
        assert not {"down_rows", "up_rows", "up_ids", "down_seed"} & {*line}
    assert result.summary.full_traffic == result.summary.traffic  # it is what others are held against


def test_a_run_goes_on_bit_for_bit(tmp_path):
    whole = train()
    with pytest.raises(Stopped):
        train(out=tmp_path, stop_after=2)
    assert bits(train(out=tmp_path, resume=True)) == bits(whole)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"personalise_epochs": 1}, "personalise_epochs: expected 0 with simclr, which has no class rows"),
        ({"batch_size": 1}, "batch_size: expected at least 2 with simclr, as an image alone"),
        ({"class_store": "store"}, "class_store: expected none with simclr, without class rows"),
        ({"temperature": 0.0}, "temperature: expected a finite number greater than 0"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        config(**options)


def test_a_client_with_one_image_is_refused():
    data = data_of(torch.arange(4), torch.tensor([5]), torch.arange(6, 9))
    words = "method: expected at least 2 images of each client with simclr, got clients with one: 1 of 3"
    with pytest.raises(ConfigError, match=words):
        run(config(), data=data, model=net())


def test_settings_of_class_rows_have_no_effect():
    usual = {"data": "glyphs", "method": "simclr"}
    assert idle([Config(**usual)]) == []
    lines = idle([Config(**usual, flip=True, scale=3.0, num_negatives=5)])
    assert len(lines) == 3 and lines[0].startswith("num_negatives 5 has no effect: it is for fedss")
    assert lines[1] == "scale 3.0 has no effect: the method has no class rows"
    assert lines[2].startswith("flip True has no effect: the method takes views of an image")
    assert idle([tiny_config(temperature=0.5)])[0].startswith(
        "temperature 0.5 has no effect: it is for simclr"
    )


# ---- fl_moco: against keys of the round --------------------------------------------------------------------


def test_a_view_is_told_from_the_keys_of_the_steps_before():
    generator = torch.Generator().manual_seed(0)
    objective = Queued(torch.empty(0, 6), temperature=0.2, size=10)
    seen = torch.empty(0, 6)
    for _ in range(4):
        queries = torch.randn(6, 6, generator=generator, requires_grad=True)
        keys = normalize(torch.randn(6, 6, generator=generator))
        cosines = normalize(queries) @ torch.cat([keys, seen[-10:]]).T / 0.2
        others = torch.eye(6, 6, dtype=torch.bool)
        cosines[:, :6] = cosines[:, :6].masked_fill(~others, -torch.inf)  # not the others of its batch
        expected = cross_entropy(cosines, torch.arange(6))
        torch.testing.assert_close(objective.loss(queries, keys), expected)
        seen = torch.cat([seen, keys])
    assert torch.equal(objective.keys, seen[-10:])


def test_a_round_of_fl_moco_is_sgd_on_it():
    """A client's copy begins as the net that it is sent, and steps before each batch."""
    settings = config(method="fl_moco", client_lr=0.05, batch_size=4, queue_size=9, ema=0.9)
    player = Player(settings, tiny_data(), net())
    phi = player.extractor.flat.clone()
    request = player.request(0, 0, 2)
    update = player.update(0, 0, 2, request, phi.clone(), torch.empty(0))
    by_hand = Player(settings, tiny_data(), net())
    online, slow, keys = by_hand.extractor, by_hand.client.copy, torch.empty(0, PROJECTED)
    online.module.train(), slow.module.train()
    shuffle = generator(0, 0, 0, 2, Purpose.BATCHES)
    draws = generator(0, 0, 0, 2, Purpose.AUGMENTATION)
    order = tiny_data().clients[2][torch.from_numpy(shuffle.permutation(8))]
    for batch in order.split(4):
        images = tiny_data().images[batch]
        first, second = Views("moco", 6)(images, draws), Views("moco", 6)(images, draws)
        slow.flat.mul_(0.9).add_(online.flat, alpha=1 - 0.9)
        views = torch.cat([first, second])
        with torch.no_grad():
            made = normalize(slow(views), dim=1).roll(4, 0)
        online.zero_gradient()
        contrast(online(views), made, keys, 0.1).backward()
        with torch.no_grad():
            online.step(0.05)
        keys = torch.cat([keys, made])[-9:]
    torch.testing.assert_close(update.extractor, phi - online.flat, rtol=1e-5, atol=1e-7)
    assert update.extractor.abs().max() > 0


def test_fl_moco_learns_and_moves_what_simclr_moves():
    result = train(method="fl_moco", rounds=2)
    assert result.summary.traffic == result.summary.full_traffic and result.summary.probe is not None
    said = "".join(idle([config(method="fl_moco", queue_size=5, ema=0.5)]))
    assert "queue_size" not in said and "ema" not in said
