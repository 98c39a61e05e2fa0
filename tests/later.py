"""Values of a test's parameters that are left to the exhaustive tests."""

from typing import Any

import pytest


def later(*values: Any) -> list[Any]:
    """Each of these values; a tuple has one for each of several parameters."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.exhaustive)
        for value in values
    ]
