"""The words of a report: those of its runs, and no others."""

import re
from dataclasses import replace

import pytest
from tiny_federation import tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import run
from fedss_kernels.federated.measures import OF_FEATURES
from fedss_kernels.federated.reports.glossary import glossary
from fedss_kernels.federated.reports.reported_run import Run

OF_ROWS = ["class row", "class matrix W", "positives", "negatives", "|S_k|"]


def terms(*runs: Run) -> list[str]:
    return re.findall("<dt>(.*?)</dt>", glossary(runs))


@pytest.fixture(scope="module")
def with_rows() -> Run:
    result = run(tiny_config(rounds=1), data=tiny_data(), model=tiny_model())
    return Run(result.config, result.history, result.summary)


@pytest.fixture
def without(with_rows) -> Run:
    """As of a method whose model is a net alone."""
    return replace(with_rows, summary=replace(with_rows.summary, measures=OF_FEATURES["classification"]))


def test_of_class_rows(with_rows):
    found = terms(with_rows)
    assert found[:7] == [*OF_ROWS[:2], "extractor φ", *OF_ROWS[2:], "round"] and "features" not in found


def test_of_features_without_a_class_row(without):
    found = terms(without)
    assert found[:4] == ["extractor φ", "block", "features", "round"] and not {*OF_ROWS} & {*found}
    assert {"kNN", "linear probe", "probe before"} < {*found}


def test_of_both_in_a_comparison(with_rows, without):
    found = terms(with_rows, without)
    assert {*OF_ROWS, "features", "top-1", "kNN"} < {*found} and len(found) == len({*found})
