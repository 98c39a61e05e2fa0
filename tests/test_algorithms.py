"""The methods: what each asks for, and the limits in which two of them are one."""

import math

import numpy as np
import pytest
import torch
from tiny_federation import CLASSES_HELD, NUM_CLASSES, tiny_config, tiny_data, tiny_model

from fedss_kernels import draw_negatives
from fedss_kernels.federated import Result, run
from fedss_kernels.federated.algorithms import METHODS
from fedss_kernels.federated.clients.player import Player
from fedss_kernels.federated.messages import Request

POSITIVES = torch.tensor([1, 4, 5])


def ask(method: str, num_negatives: int, correction: str = "negatives") -> Request:
    negatives = draw_negatives(10, POSITIVES, num_negatives, np.random.default_rng(3))
    return METHODS[method].request(10, POSITIVES, negatives, correction)


def trained(method: str, **options) -> Result:
    return run(tiny_config(method=method, **options), data=tiny_data(), model=tiny_model())


def assert_same_bits(a: Result, b: Result) -> None:
    assert torch.equal(a.weight, b.weight)
    for name, value in a.extractor.state_dict().items():
        assert torch.equal(value, b.extractor.state_dict()[name]), name


@pytest.mark.parametrize("correction", ["negatives", "none"])
@pytest.mark.parametrize("denominator", ["cohort", "holders"])
def test_without_negatives_fedss_is_pos_only_bit_for_bit(correction, denominator):
    options = {"correction": correction, "denominator": denominator}
    assert_same_bits(
        trained("fedss", num_negatives=0, **options), trained("pos_only", num_negatives=3, **options)
    )


@pytest.mark.parametrize("correction", ["negatives", "none"])
@pytest.mark.parametrize("num_negatives", [NUM_CLASSES - 2, NUM_CLASSES + 100])  # the smallest |P| is 2
def test_with_every_negative_fedss_is_full_softmax_bit_for_bit(num_negatives, correction):
    fedss = trained("fedss", num_negatives=num_negatives, correction=correction)
    assert_same_bits(fedss, trained("full_softmax", correction=correction))


def test_between_the_limits_the_methods_differ():
    names = [
        name
        for name, method in METHODS.items()
        if name != "fedavg" and not method.by_round and not method.split
    ]
    nets = [trained(name).extractor[1].weight for name in names]
    for i, a in enumerate(nets):
        for b in nets[:i]:
            assert not torch.equal(a, b)


def test_fedavg_is_full_softmax_under_its_own_name():
    assert_same_bits(trained("fedavg"), trained("full_softmax"))


def test_fedss_asks_for_its_positives_and_corrected_negatives():
    request = ask("fedss", num_negatives=3)
    negative = ~torch.isin(request.class_ids, POSITIVES)
    assert torch.isin(POSITIVES, request.class_ids).all()
    assert len(request.class_ids) == 6 and negative.sum() == 3
    assert request.class_ids.equal(request.class_ids.unique())  # ascending, each once
    # 3 of the 10 - 3 classes that it doesn't hold: an expected count of 3/7 each.
    expected = negative.double() * math.log(3 / 7)
    torch.testing.assert_close(request.log_expected_count, expected, rtol=1e-6, atol=0)
    assert request.denominator is None and request.sends_ids


def test_neg_only_gets_the_rows_of_fedss_and_sums_over_the_negatives():
    fedss, request = ask("fedss", num_negatives=3), ask("neg_only", num_negatives=3)
    assert request.class_ids.equal(fedss.class_ids) and request.sends_ids
    negatives = request.class_ids[request.denominator]
    assert len(negatives) == 3 and not torch.isin(negatives, POSITIVES).any()
    assert request.log_expected_count.tolist() == pytest.approx([math.log(3 / 7)] * 3)


def test_pos_only_gets_its_positives_uncorrected():
    request = ask("pos_only", num_negatives=3)
    assert request.class_ids.equal(POSITIVES) and request.denominator is None and request.sends_ids
    assert request.log_expected_count.tolist() == [0, 0, 0]


def test_full_softmax_gets_all_and_sends_no_ids():
    request = ask("full_softmax", num_negatives=3)
    assert request.class_ids.tolist() == list(range(10)) and request.denominator is None
    assert request.log_expected_count.tolist() == [0] * 10
    assert not request.sends_ids


def test_without_correction_every_expected_count_is_one():
    assert ask("fedss", 3, "none").log_expected_count.tolist() == [0] * 6
    assert ask("neg_only", 3, "none").log_expected_count.tolist() == [0] * 3


@pytest.mark.parametrize("method", METHODS)
def test_a_method_says_what_it_is(method):
    assert METHODS[method].name == method
    assert METHODS[method].label and METHODS[method].summary.endswith(".")


def test_with_equal_pushes_neg_only_asks_for_as_many_as_push_in_fedss():
    """|P| - 1 of its own and m others push an image in FedSS; so many others in NegOnly, if there are."""
    data = tiny_data()
    for k, held in enumerate(CLASSES_HELD):
        requests = {}
        for name in ("fedss", "neg_only", "pos_only"):
            config = tiny_config(method=name, equal_pushes=True, num_negatives=2)
            requests[name] = Player(config, data, tiny_model()).request(0, 0, k)
        assert len(requests["fedss"].class_ids) == len(held) + 2
        assert len(requests["neg_only"].denominator) == min(len(held) - 1 + 2, NUM_CLASSES - len(held))
        assert len(requests["pos_only"].class_ids) == len(held)
