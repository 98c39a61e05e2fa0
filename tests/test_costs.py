"""Costs of a training step, of nets small enough to count by hand; the paper's shares to the digit."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedss_kernels.federated.probes import costs

B, WIDTHS = 64, (32, 48, 16)
FLOAT = 4  # bytes


def chain(*widths: int) -> nn.Sequential:
    """Linear, ReLU, Linear, ReLU ..., a ReLU after each."""
    layers = [(nn.Linear(a, b), nn.ReLU()) for a, b in zip(widths, widths[1:], strict=False)]
    return nn.Sequential(*(layer for pair in layers for layer in pair))


def stepping(net: nn.Module, x: torch.Tensor):
    return lambda: net(x).sum().backward()


def known(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return [*net.parameters(), x]


# ---- what autograd saves


def test_a_relu_saves_what_it_makes_and_the_layer_after_it_the_same():
    net, x = chain(*WIDTHS), torch.randn(B, WIDTHS[0])
    found = costs.saved_bytes(stepping(net, x), known(net, x))
    assert found == B * (48 + 16) * FLOAT


def test_without_leaving_them_out_parameters_and_input_count_too_once_each():
    net, x = chain(*WIDTHS), torch.randn(B, WIDTHS[0])
    found = costs.saved_bytes(stepping(net, x), [])
    weights = 48 * 16  # the first layer's are in no gradient
    assert found == (B * (32 + 48 + 16) + weights) * FLOAT


def test_views_of_a_storage_are_counted_once_and_in_whole():
    flat = torch.randn(100, requires_grad=True)

    def step() -> None:
        made = flat * 2  # saves nothing of its own
        (made[:50].exp() * made[50:].sigmoid()).sum().backward()  # each saves what it makes

    assert costs.saved_bytes(step, [flat]) == 2 * 50 * FLOAT

    def halves() -> None:
        made = flat * 2
        torch.dot(made[:50], made[50:]).backward()

    assert costs.saved_bytes(halves, [flat]) == 100 * FLOAT


def test_what_was_freed_within_the_step_is_no_reason_to_take_another_for_it():
    """Storages are kept meanwhile, or the second net's would be where the first's were."""
    net, x = chain(*WIDTHS), torch.randn(B, WIDTHS[0])
    once = costs.saved_bytes(stepping(net, x), known(net, x))
    twice = costs.saved_bytes(lambda: [stepping(net, x)() for _ in range(5)], known(net, x))
    assert twice == 5 * once


def test_a_frozen_prefix_without_a_graph_saves_nothing():
    fixed, active = chain(32, 64, 64, 48), chain(48, 16)
    x = torch.randn(B, 32)

    def step() -> None:
        with torch.no_grad():
            h = fixed(x)
        active(h).sum().backward()

    def graph() -> None:
        active(fixed(x)).sum().backward()

    left_out = [*known(fixed, x), *active.parameters()]
    assert costs.saved_bytes(step, left_out) == B * (48 + 16) * FLOAT  # what it gave, and the active layer's
    assert costs.saved_bytes(graph, left_out) == B * (64 + 64 + 48 + 16) * FLOAT


# ---- what is allocated at a time


def test_the_peak_is_of_all_that_is_there_at_one_time():
    def step() -> None:
        first, second = torch.empty(1 << 20), torch.empty(1 << 18)
        del first
        third = torch.empty(1 << 19)
        del second, third

    assert costs.peak_bytes(step) == ((1 << 20) + (1 << 18)) * FLOAT


def test_what_was_there_before_is_no_part_of_the_peak():
    held = [torch.empty(1 << 20)]

    def step() -> None:
        held.clear()
        held.append(torch.empty(1 << 18))

    assert costs.peak_bytes(step) == (1 << 18) * FLOAT  # what it frees of that is none of its own either
    assert costs.peak_bytes(lambda: None) == 0


def test_checkpointing_saves_little_and_its_peak_is_more_than_that():
    net = nn.ModuleList(chain(64, 64, 64, 64) for _ in range(6))
    x = torch.randn(2048, 64, requires_grad=True)

    def plain() -> None:
        h = x
        for block in net:
            h = block(h)
        h.sum().backward()

    def again() -> None:
        h = x
        for block in net:
            h = checkpoint(block, h, use_reentrant=False)
        h.sum().backward()

    one = 2048 * 64 * FLOAT  # what a layer makes
    saved, less = (costs.saved_bytes(step, known(net, x)) for step in (plain, again))
    assert saved == 18 * one and less == 5 * one  # the blocks' inputs, the first of which is x
    peaks = []
    for step in (plain, again):
        net.zero_grad()
        x.grad = None
        peaks.append(costs.peak_bytes(step))
    assert peaks[0] >= saved and less + 3 * one <= peaks[1] < peaks[0] - 8 * one


# ---- multiply-adds


def test_multiply_adds_of_forward_and_backward():
    net, x = chain(*WIDTHS), torch.randn(B, WIDTHS[0])
    first, second = B * 32 * 48, B * 48 * 16
    assert costs.multiply_adds(lambda: net(x)) == first + second
    assert costs.multiply_adds(stepping(net, x)) == 2 * first + 3 * second  # none to the input
    net[0].requires_grad_(False)
    assert costs.multiply_adds(stepping(net, x)) == first + 2 * second


def test_the_three_of_a_step():
    net, x = chain(*WIDTHS), torch.randn(B, WIDTHS[0])
    calls = list[int]()

    def step() -> None:
        calls.append(1)
        net.zero_grad()
        stepping(net, x)()

    found = costs.measure(step, known(net, x))
    assert (found.saved, found.multiply_adds) == (
        costs.saved_bytes(step, known(net, x)),
        costs.multiply_adds(step),
    )
    gradients = sum(p.numel() for p in net.parameters()) * FLOAT
    assert found.peak >= found.saved + gradients - B * 48 * FLOAT and len(calls) >= 4


# ---- the paper's formulas


@pytest.mark.parametrize(
    ("stage", "budget", "compute", "traffic"),
    [(1, None, "8.3", "8.3"), (12, None, "38.9", "54.2"), (12, 6, "22.2", "29.2"), (6, 6, "22.2", "29.2")],
)
def test_shares_of_the_paper(stage, budget, compute, traffic):
    assert f"{100 * costs.compute_share(stage, 12, budget):.1f}" == compute
    assert f"{100 * costs.traffic_share(stage, 12, budget):.1f}" == traffic


def test_shares_of_memory_as_the_paper_draws_them():
    assert costs.memory_share(1, 12) == pytest.approx(1 / 12)
    assert round(100 * costs.memory_share(12, 12)) == 22
    assert 14 <= 100 * costs.memory_share(12, 12, 6) < 15
    assert costs.memory_share(3, 4, fixed=0.5) == pytest.approx((1 + 2 * 0.5) / 4)
    assert costs.memory_share(12, 12, fixed=1.0) == costs.memory_share(1, 1) == 1.0


def test_shares_refuse_what_is_no_stage():
    for share in (costs.compute_share, costs.traffic_share, costs.memory_share):
        with pytest.raises(ValueError, match=r"stage: expected one in \[1, 12\], got 0"):
            share(0, 12)
        with pytest.raises(ValueError, match=r"stage: expected one in \[1, 12\], got 13"):
            share(13, 12)
        with pytest.raises(ValueError, match="budget: expected at least 2 blocks, got 1"):
            share(3, 12, 1)
