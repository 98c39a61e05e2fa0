"""bench.round_memory: a round holds one client's rows and one sum, not every client's."""

import pytest
from fedss_kernels.bench import round_memory
from fedss_kernels.bench.peak_memory import CLEAR


@pytest.mark.exhaustive
@pytest.mark.skipif(
    not CLEAR.exists(),
    reason="a process resets its peak of memory by Linux' /proc/self/clear_refs, which is not there",
)
def test_a_round_holds_little_more_than_its_least(capsys):
    """All updates would be 16 / 5 of it; what the loss packs 0.2 more, and so a copy of what is lent."""
    assert round_memory.main(["--classes", "70000", "--rounds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["1", "2"]
    assert all(1 <= float(line.strip("| ").split(" | ")[-1]) < 1.25 for line in lines)
