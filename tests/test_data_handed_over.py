"""Data of one's own as they come: arrays and lists, and what cannot be meant."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_federation import tiny_data

from fedss_kernels.federated import FederatedData, Result

WAYS = [
    lambda t: t.numpy(),
    lambda t: t.tolist(),
    lambda t: t.to(torch.int32),
    lambda t: t.numpy().astype(np.uint8),
    lambda t: tuple(t.tolist()),
]


@pytest.mark.parametrize("way", WAYS)
def test_arrays_lists_and_other_integers_are_labels_and_rows(way):
    data = tiny_data()
    labels = {name: way(getattr(data, name)) for name in ("labels", "test_labels")}
    other = replace(data, **labels, clients=[way(rows) for rows in data.clients], num_classes=np.int64(7))
    for name in ("labels", "test_labels"):
        assert torch.equal(getattr(other, name), getattr(data, name))
        assert getattr(other, name).dtype == torch.int64
    assert all(map(torch.equal, other.clients, data.clients)) and type(other.num_classes) is int


def test_images_may_be_arrays_that_cannot_be_written_to():
    data = tiny_data()
    pixels = data.images.numpy().copy()
    pixels.flags.writeable = False
    assert torch.equal(replace(data, images=pixels).images, data.images)
    assert replace(data).images is data.images  # a tensor stays as it is


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("labels", np.zeros(28), "labels: expected integers, got torch.float64"),
        ("labels", [True] * 28, "labels: expected integers, got torch.bool"),
        (
            "labels",
            ["ant"] * 28,
            "labels: expected a tensor, an array or a list .*, got a list of str",
        ),
        ("labels", np.array(["ant"] * 28), "labels: expected a tensor, .* got an array of <U3"),
        ("test_labels", None, "test_labels: expected a tensor, .* got NoneType"),
        ("test_labels", np.zeros((21, 7), int), r"test_labels: expected \(21,\) int64.* got \(21, 7\)"),
        ("labels", np.full(28, 7), r"labels: expected classes in \[0, 7\), got values from 7 to 7"),
        ("images", np.zeros((28, 1, 6, 6)), r"images: expected .* uint8 tensor, got .*float64"),
        ("clients", None, "clients: expected a tuple or a list, got NoneType"),
        ("class_names", "abcdefg", "class_names: expected a tuple or a list, got str"),
        ("num_classes", True, "num_classes: expected an integer, got True"),
        ("num_classes", 7.0, "num_classes: expected an integer, got 7.0"),
    ],
)
def test_what_cannot_be_meant_is_one_line_with_its_name(name, value, message):
    with pytest.raises(ValueError, match=message):
        replace(tiny_data(), **{name: value})


@pytest.mark.parametrize("kind", [FederatedData, Result])
def test_every_field_is_documented(kind):
    for field in dataclasses.fields(kind):
        assert f"\n    {field.name}: " in kind.__doc__, field.name
