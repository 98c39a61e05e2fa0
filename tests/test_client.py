"""A client's local steps: what it sees of its images, and its momentum."""

import pytest
import torch
from tiny_federation import CLASSES_HELD, tiny_config, tiny_data, tiny_model

from fedss_kernels import sampled_softmax_loss
from fedss_kernels.federated.clients.augment import random_flip, random_shift
from fedss_kernels.federated.clients.player import Player
from fedss_kernels.federated.messages import Update
from fedss_kernels.federated.randomness import Purpose, generator, initial_rows

CLIENT, ROUND = 1, 2


def player_of(**options) -> Player:
    return Player(tiny_config(method="pos_only", **options), tiny_data(), tiny_model())


def play(player: Player, client: int = CLIENT) -> Update:
    """A round from the net and the class rows as they begin."""
    rows = initial_rows(0, torch.tensor(CLASSES_HELD[client]), 4, 0.5)
    phi = torch.cat([p.detach().flatten() for p in tiny_model().parameters()])
    return player.update(ROUND, 0, client, player.request(ROUND, 0, client), phi, rows)


def orders(epochs: int) -> list[torch.Tensor]:
    held, shuffle = tiny_data().clients[CLIENT], generator(0, ROUND, 0, CLIENT, Purpose.BATCHES)
    return [held[torch.from_numpy(shuffle.permutation(len(held)))] for _ in range(epochs)]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("max_shift", [0, 1])
def test_it_sees_its_images_shifted_then_flipped_by_one_stream(max_shift, flip):
    player = player_of(max_shift=max_shift, flip=flip, local_epochs=2, batch_size=100)
    seen = []
    player.extractor.module.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
    play(player)
    data, rng = tiny_data(), generator(0, ROUND, 0, CLIENT, Purpose.AUGMENTATION)
    for order, images in zip(orders(2), seen, strict=True):
        expected = data.images[order].float() / 255
        if max_shift:
            expected = random_shift(expected, max_shift, rng)
        if flip:
            expected = random_flip(expected, rng)
        assert torch.equal(images, expected)
    assert torch.equal(seen[0], data.images[orders(2)[0]].float() / 255) == (not max_shift and not flip)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_its_steps_are_those_of_torchs_sgd(momentum):
    """One velocity over the net and the class rows, zero at the start: several batches, two epochs."""
    update = play(player_of(client_momentum=momentum, local_epochs=2))
    data, model = tiny_data(), tiny_model()
    classes = torch.tensor(CLASSES_HELD[CLIENT])
    rows = initial_rows(0, classes, 4, 0.5).requires_grad_()
    phi = torch.cat([p.detach().flatten() for p in model.parameters()])
    before = rows.detach().clone()
    sgd = torch.optim.SGD([*model.parameters(), rows], lr=0.2, momentum=momentum)
    for order in orders(2):
        for batch in order.split(3):
            sgd.zero_grad()
            target = torch.searchsorted(classes, data.labels[batch])
            sampled_softmax_loss(model(data.images[batch].float() / 255), rows, target, scale=5.0).backward()
            sgd.step()
    phi_moved = phi - torch.cat([p.detach().flatten() for p in model.parameters()])
    # both in float32: some roundings of 6e-8 of numbers below 1, four steps on
    torch.testing.assert_close(update.extractor, phi_moved, rtol=0, atol=2e-6)
    torch.testing.assert_close(update.rows, before - rows.detach(), rtol=0, atol=2e-6)


def test_momentum_moves_further_and_is_forgotten_between_clients_and_rounds():
    plain, player = play(player_of()), player_of(client_momentum=0.9)
    first = play(player)
    play(player, client=3)
    again = play(player)
    assert first.extractor.norm() > 1.05 * plain.extractor.norm()
    assert torch.equal(first.extractor, again.extractor) and torch.equal(first.rows, again.rows)
