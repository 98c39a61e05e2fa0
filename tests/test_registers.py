"""The script that says what a call's kernels need of a GPU, without one."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from registers import entry, main, report
from test_ahead_of_time import TABLES

from fedss_kernels.triton_kernels.configurations import AMD, NVIDIA, Blocks


def test_the_entry_of_the_table_is_named():
    assert entry(100, 820, 64, torch.bfloat16, "sm_90") == f"small: NVIDIA.many[2] = {NVIDIA.many[2]}"
    assert entry(32, 820, 64, torch.float32, "gfx942") == f"small: AMD.few[4] = {AMD.few[4]}"
    assert entry(4096, 8192, 512, torch.bfloat16, "sm_90").startswith("in chunks")


def test_a_shape_that_is_none_is_told(capsys):
    with pytest.raises(SystemExit):
        main(["100x820"])
    assert "expected BxSxDxC, as 100x820x64x1000000, got '100x820'" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_a_tile_that_is_too_large_for_registers_is_seen_to_spill():
    shape = 100, 820, 64, 10_000, torch.bfloat16, "sm_90"
    found = [line.split() for line in report(*shape)[2:]]
    assert [line[0] for line in found] == ["partial_terms", "merge_splits", "small_tiles", "small_results"]
    assert all(line[3] == "0" for line in found)
    large = replace(NVIDIA, many=NVIDIA.many | {2: Blocks(128, 128, 64, 4, 1)})
    with mock.patch.dict(TABLES, sm_90=large):
        lines = report(*shape)
    assert lines[0] == f"small: NVIDIA.many[2] = {large.many[2]}"
    assert any("spills" in line and line.startswith("    ") for line in lines[2:])
