"""top-1, MAP@R and recall against brute force, and by hand."""

import logging
import math

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN

from fedss_kernels.federated.metrics import Retrieval, nearest, retrieval, top1


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
    assert retrieval(embeddings, labels, r=3).map_at_r == pytest.approx(1 / 3, abs=1e-12)
    lengths = torch.tensor([[3.0], [0.1], [7.0], [2.0]])  # distances are of normalised embeddings
    assert retrieval(embeddings * lengths, labels, r=3).map_at_r == pytest.approx(1 / 3, abs=1e-12)


def test_map_divides_by_r_even_where_fewer_can_be_found():
    assert retrieval(on_circle(0, 1), torch.tensor([5, 5]), r=10).map_at_r == pytest.approx(1 / 10)


def test_map_of_one_embedding_is_refused():
    with pytest.raises(ValueError, match="at least 2 embeddings, got 1"):
        retrieval(on_circle(0), torch.tensor([0]))


def test_recall_by_hand():
    """The four points of above: the nearest is right for 100, one of the nearest two for 0 and 30 too."""
    embeddings, labels = on_circle(0, 10, 30, 100), torch.tensor([0, 1, 0, 0])
    found = [retrieval(embeddings, labels, r=r) for r in (1, 2)]
    assert [each.recall_at_1 for each in found] == [1 / 4] * 2
    assert [each.recall_at_r for each in found] == [1 / 4, 3 / 4]


def test_an_independent_implementation_agrees():
    """Where every class has R + 1 images, the library's R, a query's number of matches, is ours."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(7).repeat(11)
    embeddings = torch.randn(7, 6, generator=generator)[labels] + torch.randn(77, 6, generator=generator)
    calculator = AccuracyCalculator(
        include=("mean_average_precision_at_r", "precision_at_1"),
        k="max_bin_count",
        knn_func=CustomKNN(LpDistance(normalize_embeddings=True)),
    )
    theirs = calculator.get_accuracy(embeddings, labels)
    ours = retrieval(embeddings, labels, r=10)
    assert 0.2 < ours.map_at_r < 0.8
    assert ours.map_at_r == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-6)
    assert ours.recall_at_1 == pytest.approx(theirs["precision_at_1"], abs=1e-12)


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
    assert retrieval(embeddings, labels, r, block).map_at_r == pytest.approx(expected, abs=1e-12)


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


def test_embeddings_that_have_collapsed_are_still_told_apart():
    """Ten clusters of twelve around one direction, 1e-4 apart: squared, that is below float32's digits."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat_interleave(12)
    embeddings = torch.ones(120, 16) + 1e-4 * torch.randn(10, 16, generator=g)[labels]
    embeddings += 1e-6 * torch.randn(120, 16, generator=g)
    assert retrieval(embeddings, labels).map_at_r == 1


# ---- what is not finite ------------------------------------------------------------------------------------

BAD = [math.nan, math.inf, -math.inf]


def clusters(*bad: float) -> tuple[torch.Tensor, torch.Tensor]:
    """60 embeddings of 6 classes, not all found, and in front of them one for each of `bad`, of class 0."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(6).repeat(10)
    embeddings = torch.randn(6, 5, generator=generator)[labels] + torch.randn(60, 5, generator=generator)
    before = torch.ones(len(bad), 5)
    before[:, 2] = torch.tensor(bad)
    return torch.cat([before, embeddings]), torch.cat([torch.zeros(len(bad), dtype=torch.int64), labels])


@pytest.mark.parametrize("block", [1, 100, 2**22])
def test_a_row_that_is_not_finite_is_a_miss_and_the_others_have_what_they_have_without_it(block, caplog):
    without = retrieval(*clusters(), block=block)
    assert 0.2 < without.map_at_r < 0.8 and without.not_finite == 0 and not caplog.records
    found = retrieval(*clusters(*BAD), block=block)
    assert found.not_finite == 3
    for name in ("map_at_r", "recall_at_1", "recall_at_r"):
        assert getattr(found, name) == pytest.approx(getattr(without, name) * 60 / 63, rel=1e-12)
    assert [record.message for record in caplog.records] == ["3 of 63 embeddings are not finite: misses"]
    assert caplog.records[0].levelno == logging.WARNING


def test_where_fewer_than_two_rows_are_finite_nothing_is_found():
    labels = torch.zeros(3, dtype=torch.int64)
    assert retrieval(torch.full((3, 2), math.nan), labels) == Retrieval(0.0, 0.0, 0.0, 3)
    one = torch.tensor([[1.0, 0.0], [math.nan, 0.0], [math.inf, 0.0]])
    assert retrieval(one, labels) == Retrieval(0.0, 0.0, 0.0, 2)


@pytest.mark.parametrize("block", [1, 100, 2**22])
def test_top1_of_what_is_not_finite_is_a_miss(block, caplog):
    """An embedding, even of class 0, the first; a class row for its own images, and for no others."""
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    embeddings, labels = clusters()
    right = top1(embeddings, weight, labels, block) * 60
    assert 2 < right < 60 and not caplog.records
    more, of_more = clusters(*BAD)
    assert top1(more, weight, of_more, block) == pytest.approx(right / 63, rel=1e-12)
    assert caplog.messages == ["3 of 63 embeddings are not finite: misses"]
    for bad in BAD:
        ruined = weight.clone()
        ruined[4, 1] = bad
        others = torch.cat([weight[:4], weight[5:]])
        expected = top1(embeddings, others, torch.where(labels > 4, labels - 1, labels), block)
        of_4 = labels == 4  # among the others, number 4 is class 5: no image of class 4 may be right by that
        of_4 = top1(embeddings[of_4], others, torch.full((10,), 4), block) * 10
        caplog.clear()
        assert top1(embeddings, ruined, labels, block) == pytest.approx(expected - of_4 / 60, rel=1e-12)
        assert caplog.messages == ["1 of 6 class rows are not finite: nothing is taken for these classes"]
    assert top1(embeddings, torch.full((6, 5), math.nan), labels * 0, block) == 0


@pytest.mark.parametrize("size", [1e20, 1e38])
def test_a_length_whose_square_is_past_float32_is_no_obstacle(size):
    embeddings, labels = clusters()
    embeddings /= embeddings.abs().max()
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    long = embeddings.clone()
    long[::2] *= size
    assert retrieval(long, labels).map_at_r == pytest.approx(retrieval(embeddings, labels).map_at_r, rel=1e-6)
    assert top1(long, weight * size, labels) == top1(embeddings, weight, labels)


# ---- the dot product ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 100, 2**22])
def test_by_dot_product_top1_is_that_of_a_linear_layer(block):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(31, 6, generator=generator) * torch.rand(31, 1, generator=generator)
    embeddings = torch.randn(40, 5, generator=generator)
    layer = torch.nn.functional.linear(embeddings, weight[:, :-1], weight[:, -1])
    predicted = nearest(embeddings, weight, block, similarity="dot")
    assert torch.equal(predicted, layer.argmax(dim=1))
    labels = torch.where(torch.arange(40) < 12, predicted, (predicted + 1) % 31)
    assert top1(embeddings, weight, labels, block, similarity="dot") == pytest.approx(12 / 40, abs=1e-12)
    without_bias = weight.clone()
    without_bias[:, -1] = 0
    assert not torch.equal(nearest(embeddings, without_bias, block, similarity="dot"), predicted)
    assert not torch.equal(nearest(embeddings, weight[:, :-1], block), predicted)


@pytest.mark.parametrize("block", [1, 2**22])
def test_by_dot_product_of_equals_the_first_and_a_bias_decides_alone(block):
    rows = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    images = torch.tensor([[2.0, 5.0], [0.5, 5.0], [1.0, -3.0]])  # 2 2 1; .5 .5 1; 1 1 1
    assert nearest(images, rows, block, similarity="dot").tolist() == [0, 2, 0]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("block", [1, 2**22])
def test_by_dot_product_too_what_is_not_finite_is_a_miss(block, bad, caplog):
    rows = torch.tensor([[0.0, 0.0, 9.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    images = torch.tensor([[2.0, 1.0], [bad, 0.0], [1.0, 3.0]])
    assert nearest(images, rows, block, similarity="dot").tolist() == [0, -1, 0]
    for place in (0, 2):  # a number of the row, and its bias
        ruined = rows.clone()
        ruined[0, place] = bad
        assert nearest(images[[0, 2]], ruined, block, similarity="dot").tolist() == [1, 2]
    assert set(caplog.messages) == {
        "1 of 3 embeddings are not finite: misses",
        "1 of 3 class rows are not finite: nothing is taken for these classes",
    }


@pytest.mark.parametrize("block", [1, 2**22])
def test_a_dot_product_past_float32_is_no_obstacle(block):
    rows = torch.tensor([[1e20, 0.0, 0.0], [2e20, 0.0, 0.0], [3e20, -3e20, 0.0], [0.0, 0.0, 1e30]])
    images = torch.tensor([[1e20, 0.0], [-1e20, 0.0], [1e20, 3e20]])
    assert nearest(images, rows, block, similarity="dot").tolist() == [2, 3, 1]


def test_another_similarity_is_refused():
    with pytest.raises(ValueError, match="similarity: expected one of cosine, dot, got 'l2'"):
        nearest(torch.ones(1, 2), torch.ones(1, 2), similarity="l2")
