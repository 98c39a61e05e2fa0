"""Training without federation: its steps, its images, and that it learns."""

import copy

import pytest
import torch
from tiny_federation import NUM_CLASSES, tiny_config, tiny_data, tiny_model
from torch import nn

from fedss_kernels import reference
from fedss_kernels.federated import run
from fedss_kernels.federated.clients.player import Player
from fedss_kernels.federated.randomness import Purpose, generator, initial_rows

# Clients of 6, 6, 8, 2 and 6 images; in batches of 4: 2, 2, 2, 1 and 2 steps, 1.8 on average.


def test_as_many_steps_as_a_client_makes_each_of_a_cohorts_images():
    config = tiny_config(method="centralized", batch_size=4, cohort=2)
    client = Player(config, tiny_data(), tiny_model()).client
    assert client.mean_steps == pytest.approx(1.8) and client.batch_size == 8
    (held,) = client.data.clients
    assert held.tolist() == list(range(28))
    drawn = [
        [batch for _, batch in client.passes(held, round, generator(0, round, 0, 0, Purpose.BATCHES))]
        for round in range(10)
    ]
    assert [len(batches) for batches in drawn] == [1, 2, 2, 2, 2, 1, 2, 2, 2, 2]
    assert all(len(batch.unique()) == 8 for batches in drawn for batch in batches)
    assert len({tuple(batch.tolist()) for batches in drawn for batch in batches}) == 18


def test_three_rounds_are_sgd_on_the_full_softmax():
    config = tiny_config(method="centralized", rounds=3, cohort=3, client_lr=0.2)
    result = run(config, data=tiny_data(), model=tiny_model())
    data, model = tiny_data(), copy.deepcopy(tiny_model()).double()
    weight = initial_rows(0, torch.arange(NUM_CLASSES), 4, 0.5).double().requires_grad_()
    client = Player(config, data, tiny_model()).client
    for round in range(3):
        shuffle = generator(0, round, 0, 0, Purpose.BATCHES)
        for _, batch in client.passes(client.data.clients[0], round, shuffle):
            loss = reference.sampled_softmax_loss(
                model(data.images[batch].double() / 255), weight, data.labels[batch], scale=5.0
            )
            parameters = [*model.parameters(), weight]
            with torch.no_grad():
                for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    p -= 0.2 * gradient
    torch.testing.assert_close(result.weight.double(), weight.detach(), rtol=2e-5, atol=2e-5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(result.extractor.state_dict()[name].double(), value, rtol=2e-5, atol=2e-5)


def test_nothing_moves_and_nobody_is_drawn():
    result = run(
        tiny_config(method="centralized", cohort=3, min_clients=3, dropout_rate=0.9),
        data=tiny_data(),
        model=tiny_model(),
    )
    assert result.summary.traffic.total == 0 and result.summary.full_traffic.total > 0
    assert [metrics.accepted for metrics in result.history] == [1, 1, 1]
    assert result.summary.num_clients == 5


def test_it_learns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    config = tiny_config(method="centralized", rounds=60, cohort=5, client_lr=0.1, eval_every=60)
    result = run(config, data=tiny_data(), model=model)
    assert result.history[-1].loss < 0.2 * result.history[0].loss and result.summary.top1 >= 6 / 7
