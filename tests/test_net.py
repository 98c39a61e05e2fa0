"""phi on the server in blocks: one that is not trained rests to the bit, and starts again from standing."""

import pytest
import torch

from fedss_kernels.federated.server.net import Net
from fedss_kernels.federated.server.row_table import SGD, Adagrad
from fedss_kernels.federated.server.server import Server

BLOCKS = (3, 1, 4)
P = sum(BLOCKS)
OPTIMIZERS = [SGD(0.3, 0.9), Adagrad(0.3)]


def first() -> torch.Tensor:
    return torch.randn(P, generator=torch.Generator().manual_seed(0))


def gradients(rounds: int) -> list[torch.Tensor]:
    return list(torch.randn(rounds, P, generator=torch.Generator().manual_seed(1)))


def test_steps_are_those_of_momentum_and_a_block_that_rests_has_none_afterwards():
    """By hand: beta 1/2, lr 1, blocks of one number. v = 1, 3/2; in step 2 the second block rests."""
    net = Net(torch.tensor([10.0, 20.0]), SGD(1.0, 0.5), [1, 1])
    net.step(torch.tensor([1.0, 1.0]))
    assert net.phi.tolist() == [9.0, 19.0]
    net.step(torch.tensor([1.0]), [True, False])
    assert net.phi.tolist() == [7.5, 19.0]
    net.step(torch.tensor([0.0, 1.0]), [True, True])
    assert net.phi.tolist() == [6.75, 18.0]  # and not 19 - 1.25


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_block_that_rests_keeps_its_bits_and_starts_again_as_if_new(optimizer):
    net, moves = Net(first(), optimizer, BLOCKS), [True, False, True]
    steps = gradients(6)
    net.step(steps[0])
    resting = net.phi[3:4]
    for gradient in steps[1:5]:
        net.step(torch.cat([gradient[:3], gradient[4:]]), moves)
        assert torch.equal(net.phi[3:4], resting)
    net.step(steps[5])
    fresh = Net(resting, optimizer, [1])
    fresh.step(steps[5][3:4])
    assert torch.equal(net.phi[3:4], fresh.phi) and not torch.equal(net.phi[3:4], resting)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_others_move_as_if_alone(optimizer):
    net, alone = Net(first(), optimizer, BLOCKS), Net(first()[4:], optimizer, [4])
    for gradient in gradients(4):
        net.step(gradient[4:], [False, False, True])
        alone.step(gradient[4:])
    assert torch.equal(net.phi[4:], alone.phi) and torch.equal(net.phi[:4], first()[:4])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_many_blocks_are_one_to_the_bit_where_all_are_trained(optimizer, monkeypatch):
    calls, step = [], type(optimizer).step
    monkeypatch.setattr(type(optimizer), "step", lambda self, *given: calls.append(0) or step(self, *given))
    many, one = Net(first(), optimizer, BLOCKS), Net(first(), optimizer, [P])
    for gradient in gradients(4):
        many.step(gradient, [True] * 3)
        one.step(gradient)
        assert torch.equal(many.phi, one.phi)
    assert len(calls) == 8  # one call each: neighbours go together


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_stored_goes_on_to_the_same_bits(optimizer):
    def server() -> Server:
        return Server(first(), 2, 1, initial_rows=zeros, optimizer=optimizer, blocks=BLOCKS)

    def zeros(class_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(class_ids), 1)

    net, trained = server(), [True, False, True]
    for gradient in gradients(3):
        net._net.step(torch.cat([gradient[:3], gradient[4:]]), trained)
    other = server()
    other.restore({name: t.clone() for name, t in net.stored().items()}, 0)
    assert torch.equal(other.extractor, net.extractor)
    for gradient in gradients(2):
        net._net.step(gradient)
        other._net.step(gradient)
        assert torch.equal(other.extractor, net.extractor)


def test_blocks_that_are_not_phi_are_refused():
    with pytest.raises(ValueError, match=r"blocks: expected sizes of 8 numbers together, got \[3, 4\]"):
        Net(first(), SGD(1.0, 0.0), [3, 4])
    net = Net(first(), SGD(1.0, 0.0), BLOCKS)
    with pytest.raises(ValueError, match="trained: expected one of each of 3 blocks, got 2"):
        net.step(first(), [True, True])
    with pytest.raises(ValueError, match="gradient: expected the 4 numbers of the blocks trained, got 8"):
        net.step(first(), [True, True, False])
    assert torch.equal(net.phi, first())
