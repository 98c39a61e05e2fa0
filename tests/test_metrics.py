"""top-1 and MAP@R against brute force, and by hand."""

import math

import pytest
import torch

from fedss_kernels.federated.metrics import map_at_r, top1


def on_circle(*degrees: float, length: float = 1.0) -> torch.Tensor:
    return torch.tensor(
        [[length * math.cos(math.radians(a)), length * math.sin(math.radians(a))] for a in degrees]
    )


def test_map_by_hand():
    """Four points at 0, 10, 30 and 100 degrees, of classes A, B, A, A, and R = 3. Nearer is nearer in angle.

    0 (A):   10 B, 30 A, 100 A  ->  0 + 1/2 + 2/3 = 7/6
    10 (B):  nothing right      ->  0
    30 (A):  10 B, 0 A, 100 A   ->  0 + 1/2 + 2/3 = 7/6
    100 (A): 30 A, 10 B, 0 A    ->  1 + 0 + 2/3   = 5/3
    Their sum is 4, a third of it 4/3, and the mean of four queries 1/3.
    """
    embeddings, labels = on_circle(0, 10, 30, 100), torch.tensor([0, 1, 0, 0])
    assert map_at_r(embeddings, labels, r=3) == pytest.approx(1 / 3, abs=1e-12)
    lengths = torch.tensor([[3.0], [0.1], [7.0], [2.0]])  # distances are of normalised embeddings
    assert map_at_r(embeddings * lengths, labels, r=3) == pytest.approx(1 / 3, abs=1e-12)


def test_map_divides_by_r_even_where_fewer_can_be_found():
    assert map_at_r(on_circle(0, 1), torch.tensor([5, 5]), r=10) == pytest.approx(1 / 10)


def test_map_of_one_embedding_is_refused():
    with pytest.raises(ValueError, match="at least 2 embeddings, got 1"):
        map_at_r(on_circle(0), torch.tensor([0]))


def brute_force_map(embeddings: torch.Tensor, labels: torch.Tensor, r: int) -> float:
    unit = embeddings.double() / embeddings.double().norm(dim=1, keepdim=True)
    total = 0.0
    for q in range(len(unit)):
        distances = sorted((float((unit[q] - unit[j]).norm()), j) for j in range(len(unit)) if j != q)
        right = 0
        for i, (_, j) in enumerate(distances[:r], start=1):
            if labels[j] == labels[q]:
                right += 1
                total += right / i / r
    return total / len(unit)


@pytest.mark.parametrize("block", [1, 100, 2**22])  # blocks of one query, of a few, of all
@pytest.mark.parametrize("r", [1, 10])
def test_map_equals_brute_force(r, block):
    generator = torch.Generator().manual_seed(r)
    embeddings = torch.randn(57, 5, generator=generator)
    labels = torch.randint(0, 6, (57,), generator=generator)
    expected = brute_force_map(embeddings, labels, r)
    assert 0.05 < expected < 0.5
    assert map_at_r(embeddings, labels, r, block) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("block", [1, 100, 2**22])
def test_top1_equals_brute_force(block):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(31, 5, generator=generator) * torch.rand(31, 1, generator=generator)
    labels = torch.randint(0, 31, (40,), generator=generator)
    embeddings = weight[labels] + 0.2 * torch.randn(40, 5, generator=generator)
    right = 0
    for x, label in zip(embeddings.double(), labels.tolist(), strict=True):
        cosines = [float(x @ w / (x.norm() * w.norm())) for w in weight.double()]
        right += max(range(31), key=cosines.__getitem__) == label
    assert 10 < right < 40
    assert top1(embeddings, weight, labels, block) == pytest.approx(right / 40, abs=1e-12)


def test_top1_by_hand():
    """Cosine, not dot product: class 1 is long and class 0 points the same way as the first image."""
    weight = torch.cat([on_circle(0), on_circle(60, length=100), on_circle(180)])
    embeddings = on_circle(5, 50, 170, 100)  # nearest in angle: 0, 1, 2, 1
    assert top1(embeddings, weight, torch.tensor([0, 1, 2, 2])) == 3 / 4


def test_top1_of_equals_the_first_counts():
    weight = torch.ones(3, 2)
    for block in (1, 2**22):
        assert top1(torch.ones(4, 2), weight, torch.tensor([0, 2, 1, 2]), block) == 1 / 4
