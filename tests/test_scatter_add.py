"""The aggregator: the definition's bits for any layout, dtype and number of threads; no bad call writes."""

import subprocess
import sys

import pytest
import torch
from fedss_kernels.reference import scatter_add_ as reference_scatter_add_
from hypothesis import given
from hypothesis import strategies as st

from fedss_kernels import scatter_add_


def problem(C=20, M=50, D=7, out_dtype=torch.float32, rows_dtype=None, scaled=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = torch.randn(C, D, generator=g).to(out_dtype)
    ids = torch.randint(C, (M,), generator=g) if C else torch.empty(0, dtype=torch.int64)
    rows = torch.randn(len(ids), D, generator=g, dtype=torch.float64).to(rows_dtype or out_dtype)
    return out, ids, rows, torch.randn(len(ids), generator=g).to(out_dtype) if scaled else None


def test_hand_worked_table():
    """Class 2 gets 0.5 * (1, 10) and then 2 * (3, 30); class 0 gets -1 * (2, 20); class 1 nothing."""
    out = torch.tensor([[100.0, 0.0], [7.0, 7.0], [0.0, 0.0]])
    rows = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    result = scatter_add_(out, torch.tensor([2, 0, 2]), rows, torch.tensor([0.5, -1.0, 2.0]))
    assert result is out
    assert out.tolist() == [[98.0, -20.0], [7.0, 7.0], [6.5, 65.0]]


@given(
    C=st.integers(1, 30),
    M=st.integers(0, 60),
    D=st.integers(0, 40),
    out_dtype=st.sampled_from([torch.float32, torch.float64]),
    rows_dtype=st.sampled_from([None, torch.float16, torch.bfloat16]),
    scaled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_bits_of_the_definition(C, M, D, out_dtype, rows_dtype, scaled, seed):
    out, ids, rows, scale = problem(C, M, D, out_dtype, rows_dtype, scaled, seed)
    expected = reference_scatter_add_(out.clone(), ids, rows, scale)
    assert torch.equal(scatter_add_(out, ids, rows, scale), expected)


# More rows than one thread sorts by itself; rows of D elements that end inside a run, and inside a block of columns.
SIZES = [{"C": 300, "M": 40_000, "D": 5}, {"C": 300, "M": 5000, "D": 133}, {"C": 3, "M": 7, "D": 40_000}]


@pytest.mark.parametrize("threads", [2, 3, 4])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_same_bits_for_any_number_of_threads(sizes, threads, set_threads):
    out, ids, rows, scale = problem(**sizes)
    expected = scatter_add_(out.clone(), ids, rows, scale)  # conftest: one thread
    set_threads(threads)
    assert torch.equal(scatter_add_(out, ids, rows, scale), expected)


@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
def test_large_sizes_have_the_bits_of_the_definition(sizes, rows_dtype, set_threads):
    out, ids, rows, scale = problem(**sizes, rows_dtype=rows_dtype)
    expected = reference_scatter_add_(out.clone(), ids, rows, scale)
    set_threads(4)
    assert torch.equal(scatter_add_(out, ids, rows, scale), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read_as_it_is(dtype):
    rows = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)[None]
    out = scatter_add_(torch.full((1, 2**16), -0.0), torch.tensor([0]), rows)  # -0 + x is x, for x = -0 too
    expected = rows.float()
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    number = ~expected.isnan()
    assert torch.equal(out[number].signbit(), expected[number].signbit())


def test_order_of_addition_is_the_order_of_the_rows():
    """(2^24 + 1) + 1 = 2^24 in float32, (1 + 1) + 2^24 = 2^24 + 2."""
    big, ids = 2.0**24, torch.zeros(3, dtype=torch.int64)
    for rows, expected in (([big, 1, 1], big), ([1, 1, big], big + 2)):
        assert scatter_add_(torch.zeros(1, 1), ids, torch.tensor(rows)[:, None]).item() == expected


def test_multiplies_and_rounds_before_it_adds():
    """(1 + e)^2 - (1 + 2e) is e^2 if fused, and 0 once the product was rounded; e = 2^-12, so e^2 = 2^-24."""
    e = 2.0**-12
    out = torch.full((1, 16), -(1 + 2 * e))
    scatter_add_(out, torch.tensor([0]), torch.full((1, 16), 1 + e), torch.tensor([1 + e]))
    assert not out.any()


def test_strided_tensors_are_used_as_they_are():
    out, ids, rows, scale = problem()
    expected = reference_scatter_add_(out.clone(), ids, rows, scale)
    room = torch.zeros(out.shape[1] * 2, out.shape[0] + 3)
    strided_out = room[::2, 1:-2].T.copy_(out)
    strided_rows = rows.T.contiguous().T
    strided_ids, strided_scale = torch.stack([ids, ids], 1)[:, 1], torch.stack([scale, scale], 1)[:, 0]
    assert torch.equal(scatter_add_(strided_out, strided_ids, strided_rows, strided_scale), expected)
    assert not room[1::2].any() and not room[:, 0].any() and not room[:, -2:].any()


def test_expanded_rows_are_welcome():
    out = scatter_add_(torch.zeros(3, 2), torch.tensor([1, 1, 2]), torch.ones(1, 2).expand(3, 2))
    assert out.tolist() == [[0, 0], [2, 2], [1, 1]]


BAD = [
    ({"out": torch.zeros(20, 7, dtype=torch.float16)}, TypeError, "out: expected float32 or float64, got float16"),
    ({"out": torch.zeros(20)}, ValueError, r"out: expected shape \(C, D\), got \(20,\)"),
    ({"out": torch.zeros(1, 7).expand(20, 7)}, ValueError, "out: expected a tensor whose elements do not share memory"),
    ({"out": torch.zeros(20, 7, requires_grad=True)}, ValueError, "out: expected a tensor that does not require grad"),
    ({"class_ids": torch.zeros(50)}, TypeError, "class_ids: expected int64, got float32"),
    ({"class_ids": torch.zeros(50, 1, dtype=torch.int64)}, ValueError, r"class_ids: expected shape \(M,\)"),
    ({"class_ids": torch.full((50,), 20)}, IndexError, r"class_ids\[0\] = 20, expected a class in \[0, 20\)"),
    ({"class_ids": torch.tensor([0] * 49 + [-1])}, IndexError, r"class_ids\[49\] = -1"),
    ({"rows": torch.zeros(50, 8)}, ValueError, r"rows: expected shape \(50, 7\) = \(M, D\), got \(50, 8\)"),
    ({"rows": torch.zeros(50, 7, dtype=torch.float64)}, TypeError, "rows: expected float32 or float16 or bfloat16, got"),
    ({"rows": torch.zeros(50, 7, requires_grad=True)}, ValueError, "rows: expected a tensor that does not require grad"),
    ({"scale": torch.zeros(49)}, ValueError, r"scale: expected shape \(50,\) = \(M,\), got \(49,\)"),
    ({"scale": torch.zeros(50, dtype=torch.int64)}, TypeError, "scale: expected float"),
]  # fmt: skip


@pytest.mark.parametrize("changed, error, message", BAD, ids=[message for *_, message in BAD])
def test_bad_call_leaves_out_untouched(changed, error, message):
    out, ids, rows, scale = problem()
    arguments = {"out": out, "class_ids": ids, "rows": rows, "scale": scale} | changed
    before = arguments["out"].clone()
    with pytest.raises(error, match=message):
        scatter_add_(**arguments)
    assert torch.equal(arguments["out"], before)


def test_names_the_first_of_several_bad_ids(set_threads):
    out, ids, rows, scale = problem(M=40_000, D=2)
    ids[[39_999, 10_001, 30_000]] = torch.tensor([-5, 20, 21])
    set_threads(4)
    for _ in range(5):  # whichever thread is first
        with pytest.raises(IndexError, match=r"class_ids\[10001\] = 20, expected a class in \[0, 20\)"):
            scatter_add_(out, ids, rows, scale)


def test_overlap_is_refused_and_neighbours_are_not():
    buffer = torch.zeros(20, 14)
    ids = torch.arange(20)
    with pytest.raises(ValueError, match="rows: expected memory of its own, got a tensor that overlaps out"):
        scatter_add_(buffer[:, :7], ids, buffer[:, 3:10])
    with pytest.raises(ValueError, match="scale: expected memory of its own"):
        scatter_add_(buffer[:, :7], ids, torch.ones(20, 7), buffer[:, 0])
    with pytest.raises(ValueError, match="rows: expected memory of its own"):
        scatter_add_(buffer, ids, buffer)
    buffer[:, 7:] = 1
    scatter_add_(buffer[:, :7], ids, buffer[:, 7:])  # the other half of each row: no element in common
    assert (buffer == 1).all()


def test_opcheck():
    torch.library.opcheck(torch.ops.fedss_kernels.scatter_add_.default, problem())


def test_compiled_equals_eager():
    out, ids, rows, scale = problem()

    def add(out):
        return scatter_add_(out.clone(), ids, rows, scale) * 2

    assert torch.equal(torch.compile(add, fullgraph=True)(out), add(out))


def test_autograd_sees_that_a_saved_tensor_changed():
    p, saved = torch.ones(3, 1, requires_grad=True), torch.ones(3, 1)
    product = (p * saved).sum()
    scatter_add_(saved, torch.tensor([0]), torch.full((1, 1), 9.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_negated_views():
    negated = torch.view_as_complex(torch.ones(3, 2, 2)).conj().imag  # -1 everywhere, by a flag
    assert negated.is_neg()
    assert scatter_add_(torch.zeros(3, 2), torch.arange(3), negated).sum() == -6
    with pytest.raises(ValueError, match="out: expected a plain tensor"):
        scatter_add_(negated, torch.arange(3), torch.ones(3, 2))


def test_forward_mode_is_refused_not_zero():
    rows = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda r: scatter_add_(torch.zeros(2, 3), torch.arange(2), r), (rows,), (rows,))


def test_out_of_memory_changes_nothing():
    """All memory is taken before the first row is written, whatever the threads: an error, no crash, no change."""
    code = """
import resource, torch
from fedss_kernels import scatter_add_
torch.set_num_threads(2)
scatter_add_(torch.zeros(2, 50_000), torch.arange(2), torch.ones(2, 50_000))  # starts the threads
M = 40_000_000
out, ids, rows = torch.zeros(2, 1), torch.zeros(1, dtype=torch.int64).expand(M), torch.ones(1, 1).expand(M, 1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
everything = resource.getrlimit(resource.RLIMIT_AS)
for room in (200, 500):  # MiB: the checked ids, with their positions, take 610
    resource.setrlimit(resource.RLIMIT_AS, (used + room * 2**20, everything[1]))
    try:
        scatter_add_(out, ids, rows)
    except (MemoryError, RuntimeError):
        resource.setrlimit(resource.RLIMIT_AS, everything)
        print("raised; changed:", bool(out.any()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "raised; changed: False\n" * 2), result.stderr
