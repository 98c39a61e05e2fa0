"""Measures of features: by hand, and beside the same formulas in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from fedss_kernels.federated.clients.extractor import Extractor
from fedss_kernels.federated.models import build_model
from fedss_kernels.federated.models.blocks import named_blocks
from fedss_kernels.federated.probes import depth_of, depths, features, fine_tuned, knn, linear_probe


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Doubling(nn.Module):
    """A stem that takes two channels' means apart, and three blocks that double; `pool` takes the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 1, bias=False)
        self.scales = nn.ParameterList(torch.tensor(2.0) for _ in range(3))
        nn.init.ones_(self.stem.weight)

    @property
    def blocks(self) -> nn.Sequential:
        named = {f"block{i}": Scale(s) for i, s in enumerate(self.scales, 1)}
        return named_blocks(stem=self.stem, **named)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.blocks(x))


class Scale(nn.Module):
    def __init__(self, scale: nn.Parameter) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x


# ---- features


def test_features_are_of_the_blocks_down_to_a_depth():
    net = Doubling()
    images = torch.full((5, 1, 4, 4), 51, dtype=torch.uint8)
    assert depth_of(net) == 3
    for depth in range(4):
        assert torch.allclose(features(net, images, depth), torch.full((5, 2), 0.2 * 2**depth))
    with pytest.raises(ValueError, match=r"depth: expected one in \[0, 3\], got 4"):
        features(net, images, 4)


def test_features_of_a_net_without_a_pool_are_means_over_a_grid():
    """Of conv4's last block, 64 channels of 4x4 pixels, the four quarters; its embedding is no depth."""
    net, images = build_model("conv4", 8, seed=0), torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    assert depth_of(net) == 3
    with torch.no_grad():
        last = net.features[:-1](images / 255)
    quarter = last[:, 7, 2:, :2].mean(dim=(1, 2))
    found = features(net, images, 3)
    assert found.shape == (3, 64 * 4) and torch.allclose(found[:, 7 * 4 + 2], quarter, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "embedding_dim", "depth"),
    [("isotropic:depth=3", 32, 3), ("vit:depth=2", 32, 2), ("resnet18_32", 512, 8), ("conv4_ws", 128, 3)],
)
def test_features_of_all_blocks_are_the_embedding_where_no_layer_follows(model, embedding_dim, depth):
    net, images = build_model(model, embedding_dim, 0), torch.randint(0, 256, (2, 3, 32, 32)).to(torch.uint8)
    assert depth_of(net) == depth
    found = [features(net, images, at) for at in range(depth + 1)]
    assert torch.equal(found[-1], net.eval()(images / 255).detach())
    assert all(made.dim() == 2 for made in found)


def test_a_net_without_blocks_has_the_depth_of_what_it_makes():
    net, images = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
    assert depth_of(net) == 0 and depths(net) == (0,)
    assert torch.equal(features(net, images, 0), net(images / 255))


def test_what_a_net_without_blocks_has_for_a_pool_is_its_own_affair():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.layer = nn.MaxPool2d(2), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.pool(x).flatten(1))

    assert features(Plain(), torch.zeros(5, 1, 4, 4, dtype=torch.uint8), 0).shape == (5, 3)


def test_features_are_made_in_batches_in_eval_mode_of_images_as_the_extractor_takes_them():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 2))
    extractor, images = Extractor(net, crop_size=2), torch.arange(5 * 16).view(5, 1, 4, 4).to(torch.uint8)
    net.train()
    found = features(net, images, 0, prepared=extractor.as_input, batch_size=2)
    assert torch.equal(found, extractor.embed(images, 2)) and not found.requires_grad


@pytest.mark.parametrize(
    ("blocks", "expected"), [(12, (1, 3, 6, 12)), (6, (1, 2, 3, 6)), (3, (1, 2, 3)), (1, (1,))]
)
def test_depths_are_the_first_a_quarter_half_and_all(blocks, expected):
    net = nn.Module()
    net.blocks = nn.Sequential(*(nn.Linear(2, 2) for _ in range(blocks + 1)))
    assert depths(net) == expected


# ---- nearest neighbours


def knn_by_formula(bank, labels, queries, truth, k, temperature, centred):
    bank, queries = bank.double().numpy(), queries.double().numpy()
    mean = bank.mean(axis=0) if centred else 0.0
    bank, queries = bank - mean, queries - mean
    right = 0
    for query, wanted in zip(queries, truth.tolist(), strict=True):
        cosines = bank @ query / (np.linalg.norm(bank, axis=1) * np.linalg.norm(query))
        votes = dict[int, float]()
        for i in np.argsort(-cosines)[:k]:
            votes[int(labels[i])] = votes.get(int(labels[i]), 0.0) + np.exp(cosines[i] / temperature)
        right += max(votes, key=votes.get) == wanted
    return right / len(queries)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.1), (7, 1.0), (500, 0.5)])
def test_neighbours_vote_as_by_the_formula(k, temperature, centred):
    labels, truth = torch.arange(60) % 4, torch.arange(41) % 4
    bank, queries = 2 + draws(60, 5) + labels[:, None] / 2, 2 + draws(41, 5, seed=1) + truth[:, None] / 2
    options = {"k": k, "temperature": temperature, "centred": centred}
    expected = knn_by_formula(bank, labels, queries, truth, **options)
    assert 0.2 < expected < 1
    for block in (1, 100, 10**6):
        assert knn(bank, labels, queries, truth, **options, block=block) == pytest.approx(expected, abs=1e-12)


def test_one_near_neighbour_outweighs_two_far_ones_where_it_is_cold():
    bank, labels = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]]), torch.tensor([7, 3, 3])
    query = torch.tensor([[1.0, 0.0]])
    for temperature, found in ((0.1, 7), (10.0, 3), (1e-4, 7)):  # e^(1 / 1e-4) is no number
        options = {"k": 3, "temperature": temperature, "centred": False}
        assert knn(bank, labels, query, torch.tensor([found]), **options) == 1.0


def test_what_is_not_finite_is_a_miss_and_no_neighbour():
    bank, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [torch.nan, 0.0]]), torch.tensor([0, 1, 2])
    queries = torch.tensor([[1.0, 0.1], [0.1, 1.0], [torch.inf, 0.0], [torch.nan, 0.0]])
    assert knn(bank, labels, queries, torch.tensor([0, 1, 0, 2]), k=1, centred=True) == 0.5
    assert linear_probe(bank, labels, queries, torch.tensor([0, 1, 0, 2])) == 0.5


def test_knn_refuses_what_cannot_be():
    rows, labels = draws(3, 2), torch.arange(3)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        knn(rows, labels, rows, labels, k=0)
    with pytest.raises(ValueError, match="temperature: expected a finite number greater than 0, got 0"):
        knn(rows, labels, rows, labels, temperature=0.0)
    for measure in (knn, linear_probe):
        with pytest.raises(ValueError, match=r"training labels: expected \(3,\), one for each row, got \(2"):
            measure(rows, labels[:2], rows, labels)
        with pytest.raises(ValueError, match=r"test features: expected \(T, 2\), got \(3, 4\)"):
            measure(rows, labels, draws(3, 4), labels)
        with pytest.raises(ValueError, match=r"training features: expected \(N, F\) of at least one row"):
            measure(rows[:0], labels[:0], rows, labels)


# ---- the linear probe


def probe_by_newton(train, labels, l2, steps=30):
    """(W, b) of the optimum in float64, features standardised: loss = mean CE + l2 / 2 |W|^2."""
    x = train.double().numpy()
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    n, f = x.shape
    c = int(labels.max()) + 1
    design, target = np.hstack([x, np.ones((n, 1))]), np.eye(c)[labels.numpy()]
    penalty = np.diag(np.tile(np.append(np.full(f, l2), 0.0), c))
    theta = np.zeros(c * (f + 1))
    for _ in range(steps):
        logits = design @ theta.reshape(c, -1).T
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        gradient = ((p - target).T @ design / n).ravel() + penalty @ theta
        hessian = penalty.copy()
        for a in range(c):
            for b in range(c):
                w = p[:, a] * ((a == b) - p[:, b]) / n
                block = design.T @ (design * w[:, None])
                hessian[a * (f + 1) : (a + 1) * (f + 1), b * (f + 1) : (b + 1) * (f + 1)] += block
        theta -= np.linalg.lstsq(hessian, gradient, rcond=None)[
            0
        ]  # a constant to all classes changes nothing
    return theta.reshape(c, -1)


def test_the_probe_is_the_optimum_by_newtons_method():
    labels, truth = torch.arange(150) % 3, torch.arange(400) % 3
    shift = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, -0.5, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
    scales, means = torch.tensor([1.0, 100.0, 0.01, 5.0]), torch.tensor([0.0, 50.0, 1.0, -3.0])
    train = (draws(150, 4) + shift[labels]) * scales + means
    test = (draws(400, 4, seed=1) + shift[truth]) * scales + means
    theta = probe_by_newton(train, labels, l2=1e-5)
    x = (test.double() - train.double().mean(dim=0)) / train.double().std(dim=0, unbiased=False)
    logits = x.numpy() @ theta[:, :-1].T + theta[:, -1]
    expected = (logits.argmax(axis=1) == truth.numpy()).mean()
    assert 0.4 < expected < 0.9
    found = linear_probe(train, labels, test, truth)
    assert found == pytest.approx(expected, abs=1 / 400)
    assert found == linear_probe(train, labels, test, truth)
    assert linear_probe(train, labels + 40, test, truth + 40) == found
    for block in (10, 1000):  # rows at a time
        assert linear_probe(train, labels, test, truth, block=block) == pytest.approx(found, abs=1 / 400)


def test_the_penalty_shrinks_what_the_probe_learns():
    """Two classes far apart, the larger one twice as often: with all weights at nothing it always wins."""
    labels = torch.tensor([0, 0, 1]).repeat(20)
    train = labels[:, None].float() + 0.1 * draws(60, 1)
    assert linear_probe(train, labels, train, labels) == 1.0
    assert linear_probe(train, labels, train, labels, l2=1e4) == pytest.approx(2 / 3)


def test_features_that_say_nothing_in_training_say_nothing_in_the_test():
    """One is 0 throughout, one differs in its last bit alone, which in training tells all."""
    labels = torch.arange(90) % 2
    last_bit = torch.tensor([1000.0, torch.tensor(1000.0).nextafter(torch.tensor(2000.0))])
    train = torch.stack([draws(90) + 3 * labels, last_bit[labels], torch.zeros(90)], dim=1)
    test = torch.stack([train[:, 0], last_bit[1 - labels], 1e6 * draws(90, seed=1)], dim=1)
    alone = linear_probe(train[:, :1], labels, train[:, :1], labels)
    assert linear_probe(train, labels, test, labels) == alone > 0.85


def test_classes_that_the_training_lacks_are_misses():
    train, labels = torch.tensor([[0.0], [1.0], [0.1], [1.1]]), torch.tensor([2, 9, 2, 9])
    test, truth = torch.tensor([[0.0], [1.0], [1.0], [0.0]]), torch.tensor([2, 9, 5, 0])
    assert linear_probe(train, labels, test, truth) == knn(train, labels, test, truth, k=1) == 0.5
    assert linear_probe(train, torch.full((4,), 2), test, truth) == 0.25  # of one class alone


def test_features_that_tell_nothing_apart_give_the_commonest_class():
    labels = torch.tensor([0, 1, 1])
    assert linear_probe(torch.ones(3, 2), labels, torch.ones(4, 2), torch.tensor([1, 1, 1, 0])) == 0.75


# ---- fine-tuning


def stripes(number: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes of 1x8x8 images: horizontal and vertical stripes, noise over both."""
    labels = torch.arange(number) % 2
    rows = (torch.arange(8) % 2 * 120).view(8, 1).expand(8, 8)
    images = torch.where(labels[:, None, None, None] == 0, rows, rows.T)
    noise = torch.randint(0, 130, images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + noise).to(torch.uint8), labels


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        stem, block1, block2 = (
            nn.Sequential(nn.Conv2d(c, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Dropout(0.1))
            for c in (1, 8, 8)
        )
        self.blocks = named_blocks(stem=stem, block1=block1, block2=block2)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_fine_tuning_trains_blocks_and_layer_and_leaves_the_net_as_it_is():
    net, (train, labels), (test, truth) = Small(), stripes(40), stripes(60, seed=1)
    before = [p.clone() for p in net.parameters()]
    state = torch.get_rng_state()
    options = {"rate": 0.03, "batch_size": 10}

    def tuned(depth: int, epochs: int) -> float:
        return fine_tuned(net, depth, train, labels, test, truth, epochs=epochs, **options)

    assert tuned(1, 0) == 0.5  # the layer begins at nothing
    assert tuned(2, 12) == tuned(2, 12) > 0.9
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_fine_tuning_moves_every_block_and_no_deeper_one():
    net, (train, labels) = Small(), stripes(20)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, block in net.blocks.named_children():
        block.register_forward_hook(  # a copy has it too
            lambda block, *_, name=name: seen.setdefault(name, []).append(block[0].weight.detach().clone())
        )
    fine_tuned(net, 1, train, labels, train, labels, epochs=1, batch_size=5)  # the first step moves the layer
    assert list(seen) == ["stem", "block1"]
    assert not any(torch.equal(weights[0], weights[-1]) for weights in seen.values())


def test_blocks_that_a_run_froze_are_tuned_too_and_the_net_stays_frozen():
    net, (train, labels) = Small(), stripes(40)
    free = fine_tuned(net, 2, train, labels, train, labels, epochs=12, batch_size=10)
    net.requires_grad_(False)
    assert fine_tuned(net, 2, train, labels, train, labels, epochs=12, batch_size=10) == free > 0.9
    assert not any(p.requires_grad for p in net.parameters())


def test_a_net_that_fine_tuning_breaks_is_right_in_nothing():
    train, labels = stripes(40)
    assert fine_tuned(Small(), 2, train, labels, train, labels, epochs=3, rate=3e38) == 0.0


def test_an_image_whose_features_are_not_finite_is_not_tuned_on():
    (train, labels), (test, truth) = stripes(40), stripes(60, seed=1)
    train[0] = 7  # blank, which the net answers with NaN
    net = Small()
    net.blocks.stem.register_forward_pre_hook(
        lambda stem, x: x[0].where(
            (x[0] != x[0].flatten(1)[:, :1, None, None]).any((1, 2, 3), True), torch.nan
        )
    )
    assert fine_tuned(net, 2, train, labels, test, truth, epochs=12, rate=0.03, batch_size=10) > 0.9


@pytest.mark.parametrize("factor", [1e19, 1e25])
def test_neighbours_are_near_by_direction_however_long_rows_are(factor):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 4
    rows = torch.eye(8)[labels] + 0.3 * torch.randn(40, 8, generator=g)
    plain = knn(rows, labels, rows.roll(1, 0), labels.roll(1), k=5)
    assert knn(rows * factor, labels, rows.roll(1, 0) * factor, labels.roll(1), k=5) == plain > 0.9
