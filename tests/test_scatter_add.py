"""The aggregator: the definition's bits for any layout, dtype and number of threads; no bad call writes."""

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from compilers import COMPILERS
from fedss_kernels.reference import scatter_add_ as reference_scatter_add_
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedss_kernels import implementations, inplace, scatter_add_
from fedss_kernels.scatter_add import OPERATOR

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = "fedss_kernels.triton_kernels.scatter_add"


def problem(C=20, M=50, D=7, out_dtype=torch.float32, rows_dtype=None, scaled=True, seed=0):
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    out = torch.randn(C, D, generator=g).to(out_dtype)
    ids = torch.randint(C, (M,), generator=g) if C else torch.empty(0, dtype=torch.int64)
    rows = torch.randn(len(ids), D, generator=g, dtype=torch.float64).to(rows_dtype or out_dtype)
    return out, ids, rows, torch.randn(len(ids), generator=g).to(out_dtype) if scaled else None


def test_hand_worked_table(impl):
    """Class 2 gets 0.5 * (1, 10) and then 2 * (3, 30); class 0 gets -1 * (2, 20); class 1 nothing."""
    out = torch.tensor([[100.0, 0.0], [7.0, 7.0], [0.0, 0.0]])
    rows = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    result = scatter_add_(out, torch.tensor([2, 0, 2]), rows, torch.tensor([0.5, -1.0, 2.0]), impl=impl)
    assert result is out
    assert out.tolist() == [[98.0, -20.0], [7.0, 7.0], [6.5, 65.0]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    C=st.integers(1, 30),
    M=st.integers(0, 40),
    D=st.integers(0, 40),
    out_dtype=st.sampled_from([torch.float32, torch.float64]),
    rows_dtype=st.sampled_from([None, torch.float16, torch.bfloat16]),
    scaled=st.booleans(),
    elements=st.sampled_from([128, 1024]),
    seed=st.integers(0, 99),
)
def test_bits_of_the_definition(impl, C, M, D, out_dtype, rows_dtype, scaled, elements, seed):
    """elements: of a tile of the GPU's kernel; a smaller one has fewer positions than there are rows."""
    out, ids, rows, scale = problem(C, M, D, out_dtype, rows_dtype, scaled, seed)
    expected = reference_scatter_add_(out.clone(), ids, rows, scale)
    with mock.patch(f"{TRITON}.ELEMENTS", elements):
        assert torch.equal(scatter_add_(out, ids, rows, scale, impl=impl), expected)


def test_rows_longer_than_a_tile_of_the_gpu_kernel():
    with torch.device(TRITON_DEVICE), mock.patch(f"{TRITON}.ELEMENTS", 16):
        out, ids, rows, scale = problem(C=3, M=8, D=35)
        expected = reference_scatter_add_(out.clone(), ids, rows, scale)
        assert torch.equal(scatter_add_(out, ids, rows, scale, impl="triton"), expected)


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


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of NaN, in Triton's interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read_as_it_is(impl, dtype):
    rows = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)[None]
    if dtype == torch.bfloat16 and impl == "triton" and TRITON_DEVICE == "cpu":
        rows[rows.abs() < torch.finfo(dtype).tiny] = 0  # subnormal: Triton's interpreter reads them wrongly
    out = torch.full((1, 2**16), -0.0)  # -0 + x is x, for x = -0 too
    scatter_add_(out, torch.tensor([0]), rows, impl=impl)
    expected = rows.float()
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    number = ~expected.isnan()
    assert torch.equal(out[number].signbit(), expected[number].signbit())


def test_order_of_addition_is_the_order_of_the_rows(impl):
    """(2^24 + 1) + 1 = 2^24 in float32, (1 + 1) + 2^24 = 2^24 + 2."""
    big, ids = 2.0**24, torch.zeros(3, dtype=torch.int64)
    for rows, expected in (([big, 1, 1], big), ([1, 1, big], big + 2)):
        out = scatter_add_(torch.zeros(1, 1), ids, torch.tensor(rows)[:, None], impl=impl)
        assert out.item() == expected


def test_multiplies_and_rounds_before_it_adds(impl):
    """(1 + e)^2 - (1 + 2e) is e^2 if fused, and 0 once the product was rounded; e = 2^-12, so e^2 = 2^-24."""
    e = 2.0**-12
    out = torch.full((1, 16), -(1 + 2 * e))
    scatter_add_(out, torch.tensor([0]), torch.full((1, 16), 1 + e), torch.tensor([1 + e]), impl=impl)
    assert not out.any()


def test_strided_tensors_are_used_as_they_are(impl):
    out, ids, rows, scale = problem()
    expected = reference_scatter_add_(out.clone(), ids, rows, scale)
    room = torch.zeros(out.shape[1] * 2, out.shape[0] + 3)
    strided_out = room[::2, 1:-2].T.copy_(out)
    strided_rows = rows.T.contiguous().T
    strided_ids, strided_scale = torch.stack([ids, ids], 1)[:, 1], torch.stack([scale, scale], 1)[:, 0]
    scatter_add_(strided_out, strided_ids, strided_rows, strided_scale, impl=impl)
    assert torch.equal(strided_out, expected)
    assert not room[1::2].any() and not room[:, 0].any() and not room[:, -2:].any()


def test_expanded_rows_are_welcome(impl):
    rows = torch.ones(1, 2).expand(3, 2)
    out = scatter_add_(torch.zeros(3, 2), torch.tensor([1, 1, 2]), rows, impl=impl)
    assert out.tolist() == [[0, 0], [2, 2], [1, 1]]


BAD = [
    (lambda: {"out": torch.zeros(20, 7, dtype=torch.float16)}, TypeError, "out: expected float32 or float64, got float16"),
    (lambda: {"out": torch.zeros(20)}, ValueError, r"out: expected shape \(C, D\), got \(20,\)"),
    (lambda: {"out": torch.zeros(1, 7).expand(20, 7)}, ValueError, "out: expected a tensor whose elements do not share memory"),
    (lambda: {"out": torch.zeros(20, 7, requires_grad=True)}, ValueError, "out: expected a tensor that does not require grad"),
    (lambda: {"class_ids": torch.zeros(50)}, TypeError, "class_ids: expected int64, got float32"),
    (lambda: {"class_ids": torch.zeros(50, 1, dtype=torch.int64)}, ValueError, r"class_ids: expected shape \(M,\)"),
    (lambda: {"class_ids": torch.full((50,), 20)}, IndexError, r"class_ids\[0\] = 20, expected a class in \[0, 20\)"),
    (lambda: {"class_ids": torch.tensor([0] * 49 + [-1])}, IndexError, r"class_ids\[49\] = -1"),
    (lambda: {"rows": torch.zeros(50, 8)}, ValueError, r"rows: expected shape \(50, 7\) = \(M, D\), got \(50, 8\)"),
    (lambda: {"rows": torch.zeros(50, 7, dtype=torch.float64)}, TypeError, "rows: expected float32 or float16 or bfloat16, got"),
    (lambda: {"rows": torch.zeros(50, 7, requires_grad=True)}, ValueError, "rows: expected a tensor that does not require grad"),
    (lambda: {"scale": torch.zeros(49)}, ValueError, r"scale: expected shape \(50,\) = \(M,\), got \(49,\)"),
    (lambda: {"scale": torch.zeros(50, dtype=torch.int64)}, TypeError, "scale: expected float"),
    (lambda: {"impl": "cuda"}, ValueError, 'impl: expected "auto" or "cpp" or "triton", got \'cuda\''),
    (lambda: {"out": torch.zeros(20, 7, device="meta")}, ValueError, "out: expected a CPU or CUDA tensor, got one on meta"),
]  # fmt: skip


@pytest.mark.parametrize("changed, error, message", BAD, ids=[message for *_, message in BAD])
def test_bad_call_leaves_out_untouched(impl, changed, error, message):
    out, ids, rows, scale = problem()
    arguments = {"out": out, "class_ids": ids, "rows": rows, "scale": scale, "impl": impl}
    arguments |= changed()
    before = arguments["out"].clone()
    with pytest.raises(error, match=message):
        scatter_add_(**arguments)
    assert before.is_meta or torch.equal(arguments["out"], before)


def test_names_the_first_of_several_bad_ids(impl, set_threads):
    out, ids, rows, scale = problem(M=40_000, D=2)
    ids[[39_999, 10_001, 30_000]] = torch.tensor([-5, 20, 21])
    set_threads(4)
    for _ in range(5):  # whichever thread is first
        with pytest.raises(IndexError, match=r"class_ids\[10001\] = 20, expected a class in \[0, 20\)"):
            scatter_add_(out, ids, rows, scale, impl=impl)


def test_overlap_is_refused_and_neighbours_are_not(impl):
    buffer = torch.zeros(20, 14)
    ids = torch.arange(20)
    with pytest.raises(ValueError, match="rows: expected memory of its own, got a tensor that overlaps out"):
        scatter_add_(buffer[:, :7], ids, buffer[:, 3:10], impl=impl)
    with pytest.raises(ValueError, match="scale: expected memory of its own"):
        scatter_add_(buffer[:, :7], ids, torch.ones(20, 7), buffer[:, 0], impl=impl)
    with pytest.raises(ValueError, match="rows: expected memory of its own"):
        scatter_add_(buffer, ids, buffer, impl=impl)
    buffer[:, 7:] = 1
    scatter_add_(buffer[:, :7], ids, buffer[:, 7:], impl=impl)  # of each row, no element in common
    assert (buffer == 1).all()


@pytest.mark.exhaustive
def test_triton_is_imported_when_asked_for_and_runs_on_the_cpu_only_interpreted():
    code = """
import sys, torch
from fedss_kernels import scatter_add_
arguments = torch.zeros(2, 1), torch.tensor([1]), torch.ones(1, 1)
print(scatter_add_(*arguments).sum().item(), "triton" in sys.modules)
try:
    scatter_add_(*arguments, impl="triton")
except ValueError as error:
    print(error, arguments[0].sum().item())
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    first, second = result.stdout.splitlines()
    assert first == "1.0 False"
    assert second.startswith('impl: expected "auto" or "cpp" for CPU tensors, or TRITON_INTERPRET=1')
    assert second.endswith('got "triton" 1.0')


def test_unchecked_ids_out_of_range_are_passed_over():
    """As while a CUDA graph is captured, when nothing can be checked; ids do not wrap around at 4 bytes."""
    with torch.device(TRITON_DEVICE):
        out, ids, rows, scale = problem()
        expected = reference_scatter_add_(out.clone(), ids, rows, scale)
        room = torch.zeros(22, 7)
        room[1:-1] = out
        some = torch.tensor([-1, 20, 2**32 + 3, 3 - 2**32])
    ids, order = inplace.sorted_ids(torch.cat([some, ids]), 20, check=False)
    kernels = implementations.triton_kernels("scatter_add", ids.device)
    kernels.scatter_add(room[1:-1], ids, order, torch.cat([rows[:4], rows]), torch.cat([scale[:4], scale]))
    assert torch.equal(room[1:-1], expected) and not room[[0, -1]].any()


def test_opcheck(impl):
    torch.library.opcheck(OPERATOR.default, (*problem(), impl))


@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_equals_eager(impl, backend):
    out, ids, rows, scale = problem()

    def add(out):
        return scatter_add_(out.clone(), ids, rows, scale, impl=impl) * 2

    assert torch.equal(torch.compile(add, fullgraph=True, backend=backend)(out), add(out))


def test_autograd_sees_that_a_saved_tensor_changed(impl):
    p, saved = torch.ones(3, 1, requires_grad=True), torch.ones(3, 1)
    product = (p * saved).sum()
    scatter_add_(saved, torch.tensor([0]), torch.full((1, 1), 9.0), impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_negated_views(impl):
    negated = torch.view_as_complex(torch.ones(3, 2, 2)).conj().imag  # -1 everywhere, by a flag
    assert negated.is_neg()
    assert scatter_add_(torch.zeros(3, 2), torch.arange(3), negated, impl=impl).sum() == -6
    with pytest.raises(ValueError, match="out: expected a plain tensor"):
        scatter_add_(negated, torch.arange(3), torch.ones(3, 2), impl=impl)


def test_forward_mode_is_refused_not_zero():
    rows = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda r: scatter_add_(torch.zeros(2, 3), torch.arange(2), r), (rows,), (rows,))


@pytest.mark.exhaustive
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


@pytest.mark.gpu
@pytest.mark.parametrize("hot", [0, 3000])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float64, torch.bfloat16)], ids=str)
def test_a_gpu_has_the_bits_of_the_cpu_every_time(dtypes, hot):
    out, ids, rows, scale = problem(100_000, 64_000, 64, *dtypes)
    ids[:hot] = 7
    expected = scatter_add_(out.clone(), ids, rows, scale)
    out, ids, rows, scale = (t.cuda() for t in (out, ids, rows, scale))
    for _ in range(20):
        assert torch.equal(scatter_add_(out.clone(), ids, rows, scale).cpu(), expected)


@pytest.mark.gpu
def test_more_than_2_31_elements_on_a_gpu():
    C, D = 2**25 + 3, 64
    if torch.cuda.mem_get_info()[0] < 2 * C * D * 4:
        pytest.skip("a matrix of 2^31 float32 elements and one more to check it take 17 GB of GPU memory")
    out, ids = torch.zeros(C, D, device="cuda"), torch.tensor([C - 1, 0, C - 1, 2**25], device="cuda")
    scatter_add_(out, ids, torch.ones(4, D, device="cuda"))
    assert out.sum(1).nonzero().flatten().tolist() == [0, 2**25, C - 1]
    assert (out[-1] == 2).all() and (out[0] == 1).all() and (out[2**25] == 1).all()


@pytest.mark.gpu
def test_cuda_graph():
    """Captured once, replayed with other ids: those out of range are passed over."""
    with torch.device("cuda"):
        out, ids, rows, scale = problem()
    scatter_add_(out.clone(), ids, rows, scale)  # compiles
    result, graph = out.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scatter_add_(result, ids, rows, scale)
    expected = reference_scatter_add_(out.clone(), ids[1:], rows[1:], scale[1:])
    ids[0] = 20
    graph.replay()
    assert torch.equal(result, expected)
