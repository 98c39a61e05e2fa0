"""What compiles in tests: torch's tracing alone; or all of torch.compile, which takes seconds a graph."""

import pytest

COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)]
