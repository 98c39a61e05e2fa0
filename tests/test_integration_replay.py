"""The loss for RePlay's models: as its protocol says, and in its own SasRec where it is installed."""

import math

import pytest
import torch
import torch.nn.functional as F

from fedss_kernels.integrations.replay import SampledSoftmaxCE

BATCH, EVENTS, D, ITEMS, N = 3, 5, 8, 40, 16


class Model(torch.nn.Module):
    """What RePlay's models do with a loss: they hand it their logits, and call it by keywords."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.items = torch.nn.Embedding(ITEMS + 1, D, padding_idx=ITEMS)
        self.loss = loss
        self.loss.logits_callback = self.get_logits

    def get_logits(self, embeddings, items=None):
        return F.linear(embeddings, self.items.weight[:-1] if items is None else self.items(items))


def batch():
    rng = torch.Generator().manual_seed(1)
    embeddings = torch.randn(BATCH, EVENTS, D, generator=rng, requires_grad=True)
    return {
        "model_embeddings": embeddings,
        "feature_tensors": {},
        "positive_labels": torch.randint(ITEMS, (BATCH, EVENTS, 1), generator=rng),
        "negative_labels": torch.randperm(ITEMS, generator=rng)[:N],
        "padding_mask": torch.ones(BATCH, EVENTS, dtype=torch.bool),
        "target_padding_mask": torch.rand(BATCH, EVENTS, 1, generator=rng) > 0.3,
    }


def plain(model, given, counts=0.0):
    """CESampled, in a few lines."""
    mask = given["target_padding_mask"].squeeze(-1)
    embeddings, targets = given["model_embeddings"][mask], given["positive_labels"].squeeze(-1)[mask]
    negatives = given["negative_labels"]
    logits = model.get_logits(embeddings)
    others = logits[:, negatives.clamp(min=0)] - counts
    others = others.masked_fill((negatives == targets[:, None]) | (negatives == -100), -torch.inf)
    own = logits.gather(1, targets[:, None])
    return F.cross_entropy(torch.cat([own, others], 1), torch.zeros_like(targets))


def assert_equal(model, given, right):
    leaves = (given["model_embeddings"], model.items.weight)
    loss = model.loss(**given)
    torch.testing.assert_close(loss, right, rtol=1e-5, atol=1e-6)
    pairs = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(right, leaves), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_it_is_the_plain_formula():
    model, given = Model(SampledSoftmaxCE()), batch()
    targets = given["positive_labels"][given["target_padding_mask"]]
    assert set(targets.tolist()) & set(given["negative_labels"].tolist()), "there are hits to leave out"
    assert_equal(model, given, plain(model, given))


def test_padding_among_the_negatives_is_left_out():
    model, given = Model(SampledSoftmaxCE()), batch()
    given["negative_labels"][3:7] = -100
    assert_equal(model, given, plain(model, given))


@pytest.mark.parametrize("form", ["a number", "each item's own"])
def test_the_correction_is_subtracted(form):
    counts = torch.full((), math.log(N / ITEMS)) if form == "a number" else torch.linspace(-3, 0, ITEMS)
    model, given = Model(SampledSoftmaxCE(counts)), batch()
    each = counts if form == "a number" else counts[given["negative_labels"]]
    assert_equal(model, given, plain(model, given, each))


def test_corrected_it_estimates_the_loss_over_all_items():
    model, given = Model(SampledSoftmaxCE(math.log(N / ITEMS))), batch()
    with torch.no_grad():
        model.items.weight *= 0.2
        everything = given | {"negative_labels": torch.arange(ITEMS)}
        full = plain(model, everything)
        draws = [torch.randperm(ITEMS)[:N] for _ in range(300)]
        sampled = torch.stack([model.loss(**given | {"negative_labels": drawn}) for drawn in draws])
        model.loss.log_expected_count.zero_()
        uncorrected = model.loss(**given)
    assert abs(sampled.mean() - full) < 0.01 < full - uncorrected


@pytest.mark.parametrize("form", ["a number", "each item's own"])
def test_made_on_meta_it_has_its_correction(form):
    """Which no state dict holds."""
    counts = math.log(N / ITEMS) if form == "a number" else torch.linspace(-3, 0, ITEMS)
    with torch.device("meta"):
        late = SampledSoftmaxCE(counts)
    late = late.to("meta").to_empty(device="cpu")
    late.load_state_dict(SampledSoftmaxCE(counts).state_dict())
    assert torch.equal(late.log_expected_count, torch.as_tensor(counts))
    assert torch.equal(late.to(torch.bfloat16).log_expected_count, torch.as_tensor(counts)), (
        "it is not rounded"
    )
    with pytest.raises(ValueError, match="log_expected_count: expected a tensor that holds numbers"):
        SampledSoftmaxCE(torch.zeros(ITEMS, device="meta"))


def test_a_sparse_gradient_lists_the_items_that_take_part():
    items, loss = torch.nn.Embedding(10, D, sparse=True), SampledSoftmaxCE()
    loss.logits_callback = lambda embeddings, ids: embeddings @ items(ids).t()
    mask = torch.ones(1, 2, 1, dtype=torch.bool)
    for negatives, listed in (([5, -100, 7], [3, 4, 5, 7]), ([-100, -100], [3, 4])):
        items.weight.grad = None
        given = torch.randn(1, 2, D), None, torch.tensor([[[3], [4]]]), torch.tensor(negatives), None, mask
        loss(*given).backward()
        assert items.weight.grad.coalesce().indices()[0].tolist() == listed


def test_an_event_less_batch_has_the_loss_0():
    model, given = Model(SampledSoftmaxCE()), batch()
    given["target_padding_mask"][:] = False
    model.loss(**given).backward()
    assert model.loss(**given) == 0 and not model.items.weight.grad.any()


@pytest.mark.parametrize(
    "wrong, words",
    [
        (
            {"negative_labels": torch.zeros(BATCH, N, dtype=torch.int64)},
            r"negative_labels: expected shape \(N,\)",
        ),
        ({"negative_labels": torch.zeros(N)}, "negative_labels: expected int64"),
        (
            {"positive_labels": torch.zeros(BATCH, EVENTS, 2, dtype=torch.int64)},
            r"positive_labels: expected shape \(3, 5, 1\), one for each event, got \(3, 5, 2\)",
        ),
        (
            {"target_padding_mask": torch.ones(BATCH, EVENTS, dtype=torch.bool)},
            "target_padding_mask: expected",
        ),
    ],
)
def test_a_mistake_is_said(wrong, words):
    model = Model(SampledSoftmaxCE())
    with pytest.raises((ValueError, TypeError), match=words):
        model.loss(**batch() | wrong)


def test_without_a_model_and_with_a_wrong_correction():
    with pytest.raises(AttributeError, match="callback"):
        SampledSoftmaxCE()(**batch())
    with pytest.raises(ValueError, match=r"log_expected_count: expected a number or shape \(cardinality,\)"):
        SampledSoftmaxCE(torch.zeros(2, 2))
    for wrong, error, words in [
        ({"log_expected_count": "a"}, TypeError, r"log_expected_count: expected a number .* got str"),
        ({"scale": "a"}, TypeError, "scale: expected a number .* got str"),
        ({"scale": math.nan}, ValueError, "scale: expected a finite number, got nan"),
        ({"similarity": "foo"}, ValueError, 'similarity: expected "cosine" or "dot", got \'foo\''),
    ]:
        with pytest.raises(error, match=words):
            SampledSoftmaxCE(**wrong)
    with pytest.raises(ValueError, match=r"log_expected_count: .* each item, got 5 and item \d+$"):
        Model(SampledSoftmaxCE(torch.zeros(5))).loss(**batch())


# ---- in RePlay's own models --------------------------------------------------------------------------------


def sasrec(loss, item_id: str = "item_id"):
    from replay.data import FeatureHint, FeatureSource, FeatureType
    from replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema
    from replay.nn.sequential import SasRec

    feature = TensorFeatureInfo(
        item_id,
        is_seq=True,
        feature_type=FeatureType.CATEGORICAL,
        embedding_dim=D,
        padding_value=ITEMS,
        cardinality=ITEMS,
        feature_hint=FeatureHint.ITEM_ID,
        feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, item_id)],
    )
    torch.manual_seed(0)
    options = {"embedding_dim": D, "num_heads": 2, "num_blocks": 1, "max_sequence_length": EVENTS}
    body = SasRec.from_params(TensorSchema([feature]), **options, dropout=0.0).body
    return SasRec(body=body, loss=loss)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_in_sasrec_it_equals_cesampled():
    loss = pytest.importorskip("replay.nn.loss", reason="replay-rec is not installed")
    given = batch()
    call = {name: given[name] for name in ("positive_labels", "negative_labels", "target_padding_mask")}
    call |= {"feature_tensors": {"item_id": torch.randint(ITEMS, (BATCH, EVENTS))}}
    call |= {"padding_mask": given["padding_mask"]}
    results = []
    for loss_func in (SampledSoftmaxCE(), loss.CESampled()):
        model = sasrec(loss_func)
        if results:
            model.load_state_dict(results[0][2])
        value = model(**call)["loss"]
        value.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((value, gradients, model.state_dict()))
    (ours, mine, _), (theirs, right, _) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert mine.keys() == right.keys() and len(mine) > 5
    for name in mine:
        torch.testing.assert_close(mine[name], right[name], rtol=1e-4, atol=1e-6)
