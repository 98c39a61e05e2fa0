"""A half that is trained against an attacker: the penalty, whose turn it is, and what is left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from split_nets import LR, head, joint, net, noise, views
from torch import nn

from fedss_kernels.federated.split_learning.inversion import ssim
from fedss_kernels.federated.split_learning.resistance import Hardening, Resistance
from fedss_kernels.federated.split_learning.rules import Rules

PLAIN = {"momentum": 0.0, "client_momentum": 0.0, "weight_decay": 0.0}


def attacker():
    """Latents (B, 4, 5, 5) to images (B, 2, 5, 5); of a batch in training it has the statistics."""
    torch.manual_seed(6)
    layers = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1), nn.Sigmoid()
    return nn.Sequential(*layers).double()


def images(step, B=6):
    return views(step, B).sigmoid()  # in [0, 1]


def hardening(rules, **options):
    return Hardening(joint(rules), attacker(), Resistance(**options), steps=10)


def grown(G, h, x):
    """After a step of Adam along what G makes of h, a constant."""
    G = copy.deepcopy(G).train()
    optimizer = torch.optim.Adam(G.parameters(), lr=1e-3)
    (1 - ssim(G(h.detach()), x).mean()).backward()
    optimizer.step()
    return G.eval()


@pytest.mark.parametrize("symmetric", ["none", "full"])
def test_a_step_is_one_of_the_attacker_and_then_one_along_contrast_and_penalty_by_autograd(symmetric):
    """All of it in one graph, from images to the loss: with C's gradient through the attacker."""
    rules, strength, allowed = Rules(symmetric=symmetric, **PLAIN), 3.0, -0.5
    made = hardening(rules, strength=strength, allowed=allowed)
    x1, x2 = images(0)
    whole, top = net(), head()  # the copies are equal to them in the first step
    fed, other = (x1, x2) if symmetric == "none" else (torch.cat([x1, x2]), torch.cat([x2, x1]))
    h = whole.stem(fed)
    G = grown(attacker(), h, fed)
    seen = ssim(G(h), fed).mean()

    def keys(z):
        return F.normalize(top(whole.pool(whole.block(z))), dim=1)

    q, k = keys(h), keys(whole.stem(other)).detach()
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ noise().T], dim=1) / rules.temperature
    contrast = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64)) * len(fed) / len(x1)
    (contrast + strength * (seen - allowed)).backward()

    loss, found = made.step(x1, x2, LR)
    assert loss == pytest.approx(contrast.item(), abs=1e-9) and found == pytest.approx(seen.item(), abs=1e-9)
    expected = torch.cat([(p - LR * p.grad).detach().flatten() for p in whole.stem.parameters()])
    torch.testing.assert_close(made.joint.clients.each_weights[0], expected, atol=1e-9, rtol=0)
    rest = [*whole.block.parameters(), *top.parameters()]
    expected = torch.cat([(p - LR * p.grad).detach().flatten() for p in rest])
    torch.testing.assert_close(made.joint.server.weights, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(made.attacker.state_dict(), G.state_dict())


def test_the_attacker_steps_first_and_is_asked_as_it_is_in_use():
    made, (x1, x2) = hardening(Rules(symmetric="none"), allowed=-1.0), images(0)
    h, before = net().stem(x1), attacker()
    after = grown(before, h, x1)
    found = made.step(x1, x2, LR)[1]
    by = {
        "after, in use": after(h),
        "after, in training": copy.deepcopy(after).train()(h),
        "before": before.eval()(h),
    }
    seen = {name: ssim(made_of, x1).mean().item() for name, made_of in by.items()}
    assert found == pytest.approx(seen.pop("after, in use"), abs=1e-12)
    assert all(abs(found - other) > 1e-6 for other in seen.values())


@pytest.mark.parametrize("options", [{"allowed": 1.0}, {"strength": 0.0, "allowed": -1.0}])
def test_where_nothing_is_asked_for_it_is_learning_as_ever(options):
    rules = Rules()
    made, plain = hardening(rules, **options), joint(rules)
    plain.clients.receive([0])
    for step in range(3):
        x1, x2 = images(step)
        assert made.step(x1, x2, LR)[0] == plain.step(x1[None], x2[None], LR)
    made.end()
    plain.synchronise({0: 1})
    stored = made.joint.clients.stored() | made.joint.server.stored()
    torch.testing.assert_close(stored, plain.clients.stored() | plain.server.stored(), rtol=0, atol=0)
    assert not torch.equal(made.attacker[1].weight, attacker()[1].weight)  # who learns all the same


def test_what_is_over_the_allowed_is_pushed_down_and_what_is_under_is_let_be():
    x, G = images(0)[0], attacker()
    h = net().stem(x).detach()
    seen, gradient = Resistance(2.0, -1.0).against(G, h, x)
    nudged = h - 1e-4 * gradient / gradient.norm()
    assert Resistance().against(G, nudged, x)[0] < seen
    assert not Resistance(2.0, seen + 1e-9).against(G, h, x)[1].any()
    twice = Resistance(4.0, seen - 1e-9).against(G, h, x)[1]
    torch.testing.assert_close(twice, 2 * gradient)
    assert not G.training and all(p.grad is None for p in G.parameters())


def test_the_attackers_rate_falls_three_times():
    made = Hardening(joint(Rules()), attacker(), Resistance(), steps=10)
    rates = []
    for step in range(10):
        rates.append(made.optimizer.param_groups[0]["lr"])
        made.step(*images(step), LR)
    assert rates == pytest.approx([1e-3] * 3 + [2e-4] * 3 + [4e-5] * 2 + [8e-6] * 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": -1.0}, "strength: expected a number of at least 0, got -1.0"),
        ({"strength": float("nan")}, "strength: expected a number of at least 0, got nan"),
        ({"allowed": 1.5}, "allowed: expected an SSIM, from -1 to 1, got 1.5"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Resistance(**options)
