"""Clients and server that step together are one net that is trained in one place: to the last digits."""

import copy
import math

import pytest
import torch
from split_nets import (
    KEY_DIM,
    LR,
    QUEUE,
    SIDE,
    CentralMoco,
    head,
    joint,
    net,
    noise,
    play,
    views,
)
from torch import nn

from fedss_kernels.federated.clients.contrast import contrast
from fedss_kernels.federated.split_learning.half import Half, cut
from fedss_kernels.federated.split_learning.joint import NobodyLeft
from fedss_kernels.federated.split_learning.key_queue import KeyQueue
from fedss_kernels.federated.split_learning.latents import Latents
from fedss_kernels.federated.split_learning.rules import Rules

OWN = Rules(client_gradient="own")


def same(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def state(made):
    return {**made.server.stored(), **made.clients.stored()}


def same_states(a, b, tolerance=1e-12, without=()):
    a, b = state(a), state(b)
    assert a.keys() == b.keys()
    for name in a.keys() - set(without):
        same(a[name], b[name], tolerance)


# ---- one net in one place ----------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", ["server", "full", "none"])
@pytest.mark.parametrize("N", [12, 4, 2, 1])
def test_synchronised_at_every_step_it_is_central_moco(symmetric, N):
    rules = Rules(client_gradient="own", symmetric=symmetric)
    made = joint(rules)
    losses = play(made, 6, N)
    central = CentralMoco(rules).play(6)
    same(torch.tensor(losses), torch.tensor(central.losses))
    for which, clients, server in (
        ("weights", made.clients.weights, made.server.weights),
        ("copy", made.clients.copy, made.server.copy),
        ("velocity", made.clients.velocity, made.server.velocity),
    ):
        of_clients, of_server = central.flat(which)
        same(clients, of_clients)
        same(server, of_server)
    same(made.server.queues[0].oldest_first, central.queue)
    assert made.server.weights.dtype == torch.float64


@pytest.mark.parametrize("after", [0, 1])
def test_one_client_is_central_moco_wherever_the_net_is_cut(after):
    rules = Rules(momentum_copies="kept", velocities="kept")  # alone it makes no difference
    made = joint(rules, after)
    losses, central = play(made, 6, 1, period=4), CentralMoco(rules, after).play(6)
    same(torch.tensor(losses), torch.tensor(central.losses))
    same(made.server.weights, central.flat("weights")[1])
    same(made.server.copy, central.flat("copy")[1])
    if not after:
        assert made.clients.weights.numel() == 0


def test_halves_in_a_row_are_the_net():
    x = views(0)[0]
    for after in (0, 1):
        first, rest = (Half(part) for part in cut(net(), after))
        flats = first.initial.repeat(3, 1)
        each = first.each(flats, x.unflatten(0, (3, 4))).flatten(0, 1)
        assert torch.equal(rest(rest.initial, first(first.initial, x)), net()(x))
        same(each, first(first.initial, x), 1e-14)


def test_clients_at_once_are_clients_one_by_one():
    """Of halves that differ, with gradients."""
    first = Half(cut(net(), 1)[0])
    flats = first.initial + torch.randn(4, len(first.initial), dtype=torch.float64)
    x = views(1)[0].unflatten(0, (4, 3))
    at_once, one_by_one = (flats.clone().requires_grad_() for _ in range(2))
    h = first.each(at_once, x)
    others = torch.stack([first(flat, images) for flat, images in zip(one_by_one, x, strict=True)])
    g = torch.randn_like(h)
    h.backward(g)
    others.backward(g)
    same(h, others, 1e-13)
    same(at_once.grad, one_by_one.grad, 1e-12)


@pytest.mark.parametrize("after", [-1, 2, 3])
def test_a_net_is_cut_where_there_are_blocks_on_either_side_or_on_the_servers(after):
    with pytest.raises(
        ValueError,
        match=f"cut: expected 0 to 1, as the net has 2 blocks and the server needs one, got {after}",
    ):
        cut(net(), after)
    with pytest.raises(
        ValueError, match="cut: expected 0 to 0, as the net has 1 block and the server needs one, got 1"
    ):
        cut(nn.Linear(2, 2), 1)


# ---- what a client's gradient is of ------------------------------------------------------------------------


@pytest.mark.parametrize("K", [12, 3])
def test_a_gradient_as_sent_moves_the_clients_less_by_as_many_as_there_are(K):
    moved = {}
    for name in ("sent", "own"):
        made = joint(Rules(client_gradient=name, weight_decay=0.0))
        before = made.clients.weights.clone()
        play(made, 1, K)
        moved[name] = made.clients.weights - before
    same(K * moved["sent"], moved["own"], 1e-13)
    assert moved["own"].abs().max() > 1e-3


def test_in_turn_the_server_steps_on_each_clients_latents():
    """As a joint run of one client, of the second from where the first left the server."""
    rules = Rules(in_turn=True, client_gradient="own")
    made, x = joint(rules), views(0).unflatten(1, (2, 6))
    made.clients.receive([0, 1])
    loss = made.step(x[0], x[1], LR)
    one, halves = joint(Rules()), []
    losses = []
    for k in (0, 1):
        one.clients.weights, one.clients.copy = (made.clients.half.initial.clone() for _ in range(2))
        one.clients.receive([k])
        losses.append(one.step(x[0][[k]], x[1][[k]], LR))
        halves.append(one.clients.each_weights[0])
    same(made.clients.each_weights, torch.stack(halves))
    same(made.server.weights, one.server.weights)
    same(made.server.queues[0].keys, one.server.queues[0].keys)
    assert loss == pytest.approx(sum(losses) / 2, abs=1e-14)


# ---- the synchronisation -----------------------------------------------------------------------------------


def test_between_synchronisations_clients_differ_and_their_average_weighs_by_images():
    made, images = joint(Rules()), {0: 1, 1: 2, 2: 5}
    made.clients.receive([0, 1, 2])
    for step in range(3):
        x = views(step).unflatten(1, (3, 4))
        made.step(x[0], x[1], LR)
    each, copies, velocities = (
        value.clone()
        for value in (made.clients.each_weights, made.clients.each_copy, made.clients.each_velocity)
    )
    assert (each[0] - each[1]).abs().max() > 1e-4
    made.synchronise(images)
    for now, those, mean in (
        (made.clients.each_weights, each, made.clients.weights),
        (made.clients.each_copy, copies, made.clients.copy),
        (made.clients.each_velocity, velocities, made.clients.velocity),
    ):
        same(mean, (those[0] + 2 * those[1] + 5 * those[2]) / 8, 1e-15)
        assert torch.equal(now, mean.repeat(3, 1))
    layers = made.clients.half.sizes
    by_hand = [sum(part.norm().item() for part in (one - made.clients.weights).split(layers)) for one in each]
    assert made.clients.divergence == pytest.approx(sum(by_hand) / 3, rel=1e-12) and by_hand[0] > 0


def test_averaged_copies_are_the_copy_of_the_average():
    """The moving average is linear: as long as all begin with the same."""
    made = joint(Rules())
    copy_of_average = made.clients.copy.clone()
    made.clients.receive(range(3))
    for step in range(5):
        average = made.clients.each_weights.mean(0)
        copy_of_average = 0.99 * copy_of_average + 0.01 * average
        x = views(step).unflatten(1, (3, 4))
        made.step(x[0], x[1], LR)
    made.synchronise(dict.fromkeys(range(3), 7))
    same(made.clients.copy, copy_of_average, 1e-14)


def test_copies_and_velocities_are_averaged_or_kept_or_begin_anew():
    def after_two_rounds(**options):
        made = joint(Rules(**options))
        play(made, 3, 3, period=3)
        return made

    kept = after_two_rounds(momentum_copies="kept", velocities="kept")
    assert kept.clients.kept_copies.keys() == kept.clients.kept_velocities.keys() == {0, 1, 2}
    assert not torch.equal(kept.clients.kept_copies[0], kept.clients.kept_copies[1])
    assert torch.equal(kept.clients.copy, kept.clients.half.initial)  # a newcomer's
    kept.clients.receive([1, 4])
    assert torch.equal(kept.clients.each_copy[0], kept.clients.kept_copies[1])
    assert torch.equal(kept.clients.each_velocity[0], kept.clients.kept_velocities[1])
    assert torch.equal(kept.clients.each_copy[1], kept.clients.half.initial)
    assert not kept.clients.each_velocity[1].any()
    reset = after_two_rounds(momentum_copies="reset", velocities="zeroed")
    assert torch.equal(reset.clients.copy, reset.clients.weights) and not reset.clients.velocity.any()
    averaged = after_two_rounds()
    mean = torch.stack([kept.clients.kept_copies[k] for k in range(3)]).mean(0)
    same(averaged.clients.copy, mean, 1e-14)  # the first round is the same in both
    assert averaged.clients.velocity.abs().max() > 1e-3
    assert {name for name in state(averaged) if "kept" in name} == set()  # O(1) in the clients
    kept.clients.each_copy[0] += 1
    gone = kept.clients.each_copy[0].clone()
    kept.clients.leave(torch.tensor([False, True]))
    assert torch.equal(kept.clients.kept_copies[1], gone) and kept.clients.clients == [4]


# ---- the queue ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("M", "n"), [(7, 3), (7, 7), (4, 6), (1, 5), (5, 11)])
def test_a_queue_holds_the_last_keys_and_loses_the_oldest_first(M, n):
    keys = torch.arange(6.0 * n).view(-1, 1)
    queue, all_of_them = KeyQueue(-torch.arange(1.0, M + 1).view(-1, 1)), [-torch.arange(1.0, M + 1)]
    for new in keys.split(n):
        queue.enqueue(new)
        all_of_them.append(new[:, 0])
        assert torch.equal(queue.oldest_first[:, 0], torch.cat(all_of_them)[-M:])


def test_a_steps_own_keys_are_not_its_negatives():
    q, k, queue = noise(4, 1), noise(4, 2), noise(6, 3)
    by_hand = []
    for i in range(4):
        own, others = math.exp(q[i] @ k[i] / 0.1), [math.exp(q[i] @ m / 0.1) for m in queue]
        by_hand.append(-math.log(own / (own + sum(others))))
    assert contrast(3 * q, 0.5 * k, queue, 0.1).item() == pytest.approx(sum(by_hand) / 4, rel=1e-12)


def test_the_first_views_keys_are_enqueued_first():
    made = joint(Rules(), queues=[KeyQueue(noise(8))])
    before, x = copy.deepcopy(made), views(0, 4).unflatten(1, (2, 2))
    made.clients.receive([0, 1])
    made.step(x[0], x[1], LR)
    half, first = before.server.half, before.clients.half
    k1, k2 = (
        nn.functional.normalize(half(half.initial, first(first.initial, seen)), dim=1)
        for seen in (views(0, 4)[0], views(0, 4)[1])
    )  # at the first step the copies are what they are copies of
    same(made.server.queues[0].oldest_first, torch.cat([k1, k2]), 1e-13)


def test_other_clients_images_change_a_loss_through_the_queue_and_one_step_later():
    """With a queue for each client never: the server's half held still."""

    def losses(private, other):
        queues = [KeyQueue(noise(5, k)) for k in range(2)] if private else None
        made = joint(Rules(weight_decay=0.0), queues=queues)
        found = []
        for step in range(2):
            x = views(step, 4).unflatten(1, (2, 2))
            x[:, 1] += other
            made.clients.receive([0, 1])
            sent = made.clients.forward(x[0], x[1])
            alone = sent.of(slice(0, 1))
            q = made.server.half(made.server.weights, alone.online.flatten(0, 2))
            k = made.server.half(made.server.copy, alone.momentum.flatten(0, 2))
            found.append(contrast(q, k, made.server.queues[0].keys, 0.1).item())
            made.server.step(sent, [0, 1], 0.0)
        return found

    for private in (True, False):
        (first, second), (first_too, second_too) = losses(private, 0.0), losses(private, 1.0)
        assert first == first_too
        assert (second == second_too) is private


def test_a_queue_of_each_clients_own():
    made = joint(Rules(), queues=[KeyQueue(noise(4, k)) for k in range(3)])
    made.clients.receive([0, 2])
    before = [queue.keys.clone() for queue in made.server.queues]
    x = views(0, 4).unflatten(1, (2, 2))
    made.step(x[0], x[1], LR)
    assert [torch.equal(q.keys, b) for q, b in zip(made.server.queues, before, strict=True)] == [
        False,
        True,
        False,
    ]
    with pytest.raises(ValueError, match="queue: expected at least 1 key"):
        KeyQueue(torch.zeros(0, 3))


def test_where_all_keys_are_alike_the_loss_is_that_of_guessing():
    whole = net()
    with torch.no_grad():
        for p in whole.parameters():
            p.zero_()
    made = joint(Rules(weight_decay=0.0), whole=whole, queues=[KeyQueue(noise(6))])
    losses = play(made, 3, 2, lr=0.0)
    assert losses[1] == pytest.approx(2 * math.log(7), rel=1e-12) and losses[0] != losses[1]


# ---- clients that are gone, and halves that are not trained ------------------------------------------------


def test_a_client_whose_numbers_are_not_finite_is_out_and_changes_nobody_else():
    rules = Rules()
    made, without = joint(rules), joint(rules)
    made.clients.receive([3, 5, 8])
    without.clients.receive([3, 8])
    for step in range(3):
        x = views(step).unflatten(1, (3, 4))
        kept = x[:, [0, 2]]
        x[0, 1, 0, 0, 0, 0] = float("nan")
        if step == 0:
            made.step(x[0], x[1], LR)
        else:
            made.step(kept[0], kept[1], LR)
        without.step(kept[0], kept[1], LR)
    assert made.clients.clients == [3, 8] and made.left_out == {5: "not finite"} and without.left_out == {}
    for each in (made, without):
        each.synchronise({3: 2, 5: 9, 8: 1})
    same_states(made, without, 1e-13)
    x = torch.full((2, 2, 4, 2, SIDE, SIDE), float("inf"), dtype=torch.float64)
    before = {name: value.clone() for name, value in made.server.stored().items()}
    with pytest.raises(NobodyLeft):
        made.step(x[0], x[1], LR)
    assert all(torch.equal(before[name], value) for name, value in made.server.stored().items())


def test_a_half_that_is_not_finite_is_not_averaged():
    made = joint(Rules())
    made.clients.receive([0, 1, 2])
    x = views(0).unflatten(1, (3, 4))
    made.step(x[0], x[1], LR)
    made.clients.each_velocity[1, 0] = float("inf")
    mean = made.clients.each_weights[[0, 2]].mean(0)
    made.synchronise({0: 1, 1: 1, 2: 1})
    same(made.clients.weights, mean, 1e-15)
    assert made.left_out == {1: "not finite"}


@pytest.mark.parametrize("factor, out", [(29.0, {}), (40.0, {1: "norm"})])
def test_latents_of_a_norm_far_from_the_others_are_left_out(factor, out):
    """The bound is 30 times the median of three, two of which are alike."""
    made = joint(Rules())
    made.max_norm_ratio = 30.0
    made.clients.receive([0, 1, 2])
    x = views(0).unflatten(1, (3, 4))
    x[:, 2] = x[:, 0]
    usual = made.clients.forward(x[0], x[1])
    sizes = torch.stack([usual.online.square().flatten(2).sum(2), usual.momentum.square().flatten(2).sum(2)])
    torch.testing.assert_close(usual.norms, sizes.sum((0, 1)).sqrt())
    changed = usual.norms[0] / usual.norms[1] * factor
    sent = Latents(*(part.clone() for part in (usual.online, usual.momentum)))
    for part in (sent.online, sent.momentum):
        part[:, 1] *= changed
    made.clients.forward = lambda first, second: sent
    made.step(x[0], x[1], LR)
    assert made.left_out == out


def test_a_half_that_changed_far_more_than_the_others_is_not_averaged():
    made = joint(Rules())
    made.max_norm_ratio = 30.0
    made.clients.receive([0, 1, 2])
    x = views(0).unflatten(1, (3, 4))
    made.step(x[0], x[1], LR)
    made.clients.each_copy[1] += 10 * made.clients.weights.norm()
    mean = made.clients.each_weights[[0, 2]].mean(0)
    made.synchronise({0: 1, 1: 1, 2: 1})
    same(made.clients.weights, mean, 1e-15)
    assert made.left_out == {1: "norm"}


@pytest.mark.parametrize("symmetric", ["server", "full", "none"])
def test_frozen_clients_send_and_never_change(symmetric):
    """The server trains as it would where the clients' half is a function that is given."""
    rules = Rules(frozen=True, symmetric=symmetric)
    made = joint(rules)
    before = made.clients.half.initial.clone()
    losses = play(made, 4, 3)
    for value in (made.clients.weights, made.clients.copy):
        assert torch.equal(value, before)
    first = made.clients.half
    alone = joint(Rules(symmetric=symmetric), 0, whole=_rest())
    for step in range(4):
        alone.clients.receive([0])
        x = first(before, views(step).flatten(0, 1)).unflatten(0, (2, 1, 12))
        assert alone.step(x[0], x[1], LR) == pytest.approx(losses[step], rel=1e-12)
    same(alone.server.weights, made.server.weights)
    assert (rules.latents, rules.gradients) == (4 if symmetric == "full" else 2, 0)


def test_in_turn_the_server_steps_on_each_frozen_clients_latents():
    turns, alone = (joint(Rules(frozen=True, in_turn=in_turn)) for in_turn in (True, False))
    losses = play(turns, 4, 3)
    for step in range(4):
        each = [x.unflatten(0, (3, -1)) for x in views(step)]
        found = []
        for client in range(3):
            alone.clients.receive([client])
            found.append(alone.step(each[0][client, None], each[1][client, None], LR))
        assert sum(found) / 3 == pytest.approx(losses[step], rel=1e-12)
    same(alone.server.weights, turns.server.weights)


def _rest():
    """A net of the block after the cut alone."""
    whole = net()
    rest = nn.Module()
    rest.block, rest.pool = whole.block, whole.pool
    rest.blocks = nn.Sequential(whole.block)
    return rest


def test_the_order_of_clients_in_a_cohort_makes_no_difference():
    a, b = (joint(OWN, queues=[KeyQueue(noise(48))]) for _ in range(2))  # two steps' keys
    order = torch.tensor([2, 0, 3, 1])
    a.clients.receive(range(4))
    b.clients.receive(order.tolist())
    for step in range(3):
        x = views(step).unflatten(1, (4, 3))
        a.step(x[0], x[1], LR)
        b.step(x[0][order], x[1][order], LR)
    for each in (a, b):
        each.synchronise(dict.fromkeys(range(4), 1))
    same_states(a, b, without=("queue",))
    keys, others = (each.server.queues[0].keys for each in (a, b))
    assert (torch.cdist(keys, others) < 1e-6).any(1).all()  # which are in the clients' order


# ---- as it was ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", ["averaged", "kept"])
def test_what_is_stored_is_all_that_counts(copies):
    rules = Rules(momentum_copies=copies, velocities=copies)
    made = joint(rules)
    play(made, 4, 3, period=2)
    stored = {name: value.clone() for name, value in state(made).items()}
    other = joint(rules, queues=[KeyQueue(torch.zeros(QUEUE, KEY_DIM, dtype=torch.float64))])
    other.server.restore(stored)
    other.clients.restore(stored)
    assert play(made, 4, 4, period=2, first=4) == play(other, 4, 4, period=2, first=4)
    same_states(made, other, 0)


def test_numbers_change_on_their_way_where_they_do():
    seen = []
    made = joint(Rules(), travels=lambda numbers: seen.append(tuple(numbers.shape)) or numbers)
    play(made, 1, 3)
    P, latents = len(made.clients.weights), (1, 3, 4, 4, SIDE, SIDE)
    each = [(P,)] * 3, [latents] * 3, [(3, P), (P,)] * 3
    # C, its copy and velocity down; latents of both halves up, gradients down; all three up and down again
    assert seen == [shape for part in each for shape in part]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("symmetric", "both"),
        ("momentum_copies", "lost"),
        ("client_gradient", "mean"),
        ("velocities", ""),
        ("temperature", 0.0),
        ("ema", 1.5),
    ],
)
def test_rules_that_cannot_be_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"{option}: expected .*, got {value!r}"):
        Rules(**{option: value})


def test_a_head_is_the_servers():
    first, rest = cut(net(), 1, head())
    assert len(Half(rest).initial) - len(Half(cut(net(), 1)[1]).initial) == 4 * 6 + 6 + 6 * 3 + 3
    assert len(Half(first).initial) == 2 * 4 * 9 + 8
