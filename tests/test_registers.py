"""The script that says what a call's kernels need of a GPU, without one."""

import pytest
import torch
from registers import entries_of, main, report
from test_ahead_of_time import TABLES, shipped_calls

from fedss_kernels.triton_kernels.configurations import NVIDIA, SMALL_BATCH, Blocks


def call(B, S, D, C, dtype):
    return {"B": B, "S": S, "D": D, "C": C, "dtype": dtype, "sparse": True}


CLIENT = call(100, 820, 64, 10_000, torch.bfloat16)
LARGE = call(4096, 8192, 512, 10_000, torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "target", "entry"),
    [
        (CLIENT, "sm_90", ("many", 2)),
        (call(32, 820, 64, 10_000, torch.float32), "gfx942", ("few", 4)),
        (call(32, 820, 64, 10_000, torch.float16), "sm_90", ("few", 4)),  # its rows are pulled in float32
    ],
)
def test_the_entry_of_the_table_is_named(options, target, entry):
    assert set(entries_of(options, target)) == {entry}
    assert set(entries_of(options, target)) == {entry}, "what is planned already is found too"


def test_a_problem_in_chunks_has_none():
    assert entries_of(LARGE, "sm_90") == []
    with pytest.raises(ValueError, match="goes in chunks, and has no entry"):
        report(LARGE, "sm_90", every=True)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_entry_serves_some_shipped_launch(target):
    table = TABLES[target]
    served = {entry for options in shipped_calls() for entry in entries_of(options, target)}
    for_more = {("many", pull) for pull, blocks in table.few.items() if blocks.rows < SMALL_BATCH}
    assert served == {("few", pull) for pull in table.few} | for_more


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["100x820"], "expected BxSxDxC, as 100x820x64x1000000, got '100x820'"),
        (["100x820x64x1000", "--blocks", "128,16"], "argument --blocks: invalid"),
        (["4096x8192x512x10000", "--every"], "the problem goes in chunks, and has no entry in the table"),
    ],
)
def test_a_mistake_is_told(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.exhaustive
def test_a_tile_that_is_too_large_for_registers_is_seen_to_spill():
    found = [line.split() for line in report(CLIENT, "sm_90")[2:]]
    assert [line[0] for line in found] == ["partial_terms", "merge_splits", "small_tiles", "small_results"]
    assert all(line[4] == "0" for line in found)
    large = Blocks(128, 128, 64, 4, 1)
    lines = report(CLIENT, "sm_90", large)
    assert lines[0] == f"small: NVIDIA.many[2] = {large}"
    assert any("spills" in line for line in lines[6:])
    assert NVIDIA.many[2] != large
