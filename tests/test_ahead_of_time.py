"""Kernels compile for every target, stay in registers and shared memory, and multiply on matrix units.

The launches are the real ones, recorded: the host's code runs on tensors without memory, for sizes and dtypes
that reach each entry of the table of configurations.
"""

import inspect
from dataclasses import replace
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from ahead_of_time import DEVICES, Launch, Resources, compile_all, recorded

from fedss_kernels.triton_kernels import (
    backward,
    chunk_kernels,
    configurations,
    forward,
    row_adam,
    row_momentum,
    sampled_softmax,
    scatter_add,
    tiles,
)
from fedss_kernels.triton_kernels.calls import Wanted
from fedss_kernels.triton_kernels.stacked import at_once, stacked_calls

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
MULTIPLYING = {"partial_terms", "small_tiles"}
UNITS = {
    "sm_80": ("mma.sync.",),
    "sm_90": ("wgmma.mma_async.", "mma.sync."),
    "sm_100": ("tcgen05.mma.", "mma.sync."),
    "gfx942": ("v_mfma_",),
}
TENSOR_MEMORY = 512  # columns


def call(
    B=32, S=1000, C=5000, D=512, dtype=BF16, weight_dtype=None, rounding=None, bias=True, learned=True,
    similarity="cosine", reduction="mean", counts=True, sparse=False, precision="highest", transposed=False,
    scale=20.0, offsets=F32, labels=False, given=None, problems=None,
):  # fmt: skip
    """The loss and all its gradients, on tensors that have no memory. S = None: every class.

    given: the dtype of the targets' given logits; problems: as many at once.
    """

    def empty(*shape, dtype=F32):
        return torch.empty((*([] if problems is None else [problems]), *shape), dtype=dtype, device="meta")

    def matrix(rows, dtype):
        return empty(D, rows, dtype=dtype).T if transposed else empty(rows, D, dtype=dtype)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        x, w = matrix(B, dtype), matrix(C, weight_dtype or dtype)
        ids = None if S is None else empty(S, dtype=torch.int64)
        scale = empty(dtype=offsets) if learned else torch.tensor(scale)
        plain = (
            *(x, w, empty(B, dtype=torch.int64), ids),
            *((empty(S or C, dtype=offsets), empty(B, dtype=offsets)) if counts else (None, None)),
            *(empty(C, dtype=w.dtype) if bias else None, scale),
        )
        options = (similarity, -100, reduction, rounding)
        wanted = Wanted((True, True, bias, learned), sparse, scale.dtype)
        if problems is not None and not at_once(B, S or C, D, x, w, rounding):
            return
        if problems is not None:
            calls, tensors, factor = stacked_calls(problems, [True] * 7 + [learned], plain, *options)
            loss, made = calls.loss(tensors, factor, None)
            calls.gradients(tensors, factor, made, torch.empty_like(loss), wanted)
            return
        problem = sampled_softmax.Problem.of(
            *plain,
            *options,
            *((empty(n, dtype=torch.int64) if labels else None) for n in (S or C, B)),
            None if given is None else empty(B, dtype=given),
        )
        loss, made = sampled_softmax.loss(problem, wanted)
        sampled_softmax.gradients(problem, made, torch.empty_like(loss), wanted)
    finally:
        torch.set_float32_matmul_precision(before)


DTYPES = [
    {"dtype": BF16},
    {"dtype": BF16, "weight_dtype": F32, "rounding": BF16},
    {"dtype": F16},
    {"dtype": F32},
    {"dtype": F32, "precision": "high"},
    {"dtype": F64},
]
SIZES = [{"B": 32}, {"B": 128}]  # for few rows, and for more
# the branches of the kernels that neither size nor dtype takes
EVERY_CLASS = {"S": None, "C": 1000}
DOT = {"similarity": "dot", "reduction": "none"}
PLAIN = EVERY_CLASS | DOT | {"bias": False, "counts": False}
FIXED_SCALE = {"learned": False, "sparse": True, "reduction": "sum"}
LABELS = {"labels": True}
GIVEN = {"given": F64, "reduction": "none", "counts": False, "sparse": True}
GIVEN_DOT = EVERY_CLASS | DOT | {"given": F32}
BRANCHES = [FIXED_SCALE, LABELS, LABELS | EVERY_CLASS, {"transposed": True}, GIVEN, GIVEN_DOT]
# labels fill registers: once in each dtype of products, beside corrections of each dtype
LABELLED = [
    {"labels": True, "dtype": F32, "S": 20, "offsets": BF16},
    {"labels": True, "dtype": F32, "B": 128, "offsets": F16},
    {"labels": True, "dtype": F64},
]
# in chunks: each dtype, and of odd length but one; each branch, beside one dtype
CHUNKED = [
    {"S": 3000},
    {"S": 3000, "D": 500} | DTYPES[1],
    {"S": 3000, "D": 500, "dtype": F16} | LABELS,
    {"S": 3000, "D": 500, "dtype": F32} | GIVEN,
    {"S": 3000, "D": 500, "dtype": F64},
    {"dtype": F32, "precision": "high"} | LABELS | EVERY_CLASS,
    {"dtype": F64} | GIVEN_DOT,
    FIXED_SCALE,
    PLAIN,
    EVERY_CLASS,
]
CHUNKED = [{"B": 256} | options for options in CHUNKED]
# the device's own, by its maker
TABLES = {name: configurations.AMD if name.startswith("gfx") else configurations.NVIDIA for name in DEVICES}


def launched(device: str, calls) -> list[Launch]:
    """Each launch of these calls once."""
    with (
        recorded(forward.partial_terms) as launches,
        mock.patch.object(configurations, "TABLE", TABLES[device]),
    ):
        for options in calls:
            call(**options)
    return launches


def shipped_calls() -> list[dict]:
    """Each entry of the table, for each dtype, and each branch; D = 500: rows that no vector loads fit.

    Pairs and not all combinations, which would be twice as many: each dtype with each size and with each D
    (and so each size with each D), each branch at one size, each dtype for 64 problems.
    """
    few, many = SIZES
    table = [dtype | few | {"D": (500, 512)[nth % 2]} for nth, dtype in enumerate(DTYPES)]
    table += [dtype | many | {"D": (512, 500)[nth % 2]} for nth, dtype in enumerate(DTYPES)]
    branches = [SIZES[nth % 2] | branch for nth, branch in enumerate(BRANCHES)]
    huge = [{"dtype": F16, "learned": False, "scale": 1e30, "S": 20}]  # 16 bits in float64
    stacks = [SIZES[nth % 2] | dtype | {"problems": 64} for nth, dtype in enumerate(DTYPES)]
    stacks += [many | PLAIN | {"problems": 64}]
    one = {"B": 1, "S": 1, "C": 1, "D": 1}
    # AMD's entry for few rows ends there, and its many have D = 512 alone
    fewer = [{"dtype": F64, "B": B, "D": D} for B, D in ((16, 512), (16, 500), (128, 512))]
    return [*table, *branches, *LABELLED, *huge, *stacks, one, *fewer, *CHUNKED]


def shipped(device: str) -> list[Launch]:
    return launched(device, shipped_calls())


def _entry(launch: Launch) -> tuple:
    chosen = {name: v for name, v in launch.constants.items() if str(name).startswith("BLOCK")}
    dtypes = (launch.constants.get(name) for name in ("OPERAND", "PRECISION", "ACC"))
    return launch.name, *chosen.items(), *map(str, dtypes), *launch.options.items()


def unfused(device: str) -> list[Launch]:
    """Of the aggregator and the optimisers: each dtype, rows of each length, rows far apart."""

    def empty(n, D, dtype, row=None):
        return torch.empty_strided((n, D), (row or D, 1), dtype=dtype, device="meta")

    ids = torch.empty(50, dtype=torch.int32, device="meta")
    order, counts = (torch.empty(n, dtype=torch.int64, device="meta") for n in (50, 300))
    with (
        recorded(forward.partial_terms) as launches,
        mock.patch.object(configurations, "TABLE", TABLES[device]),
    ):
        for dtype, of_rows, D, row in ((F32, F32, 64, 2**32), (F32, BF16, 7, None), (F64, F16, 4096, 2**32)):
            out, rows, scale = empty(300, D, dtype, row), empty(50, D, of_rows), empty(50, 1, dtype)[:, 0]
            scatter_add.scatter_add(out, ids, order, rows, scale if row else None)
            moves = (empty(300, D, dtype), 0.1, 0.9, 0.01) if row else (None, 0.1, 0.0, 0.0)
            row_momentum.row_momentum_step(out, moves[0], ids, order, rows, *moves[1:], dtype == F64)
            state = (out, out, empty(300, D, dtype), counts)
            row_adam.row_adam_step(*state, ids, order, rows, 0.1, 0.9, 0.99, 1e-8, 0.01)
        scatter_add.scatter_add(empty(300, 64, BF16), ids, order, empty(50, 64, F32), None)
    return launches


@triton.jit
def spilling(x, y, BLOCK: tl.constexpr):
    """Holds the whole block in registers across a reduction."""
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    tl.store(y + at, values - tl.max(values, 0))


@triton.jit
def multiply_add(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    tl.store(y + at, values * values + tl.load(y + at))


@triton.jit
def squares_beside_products(x, w, y, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """x @ w.T, and what the tiles of x hold besides: by threads, from where the matrix instructions read."""
    rows = tl.arange(0, BLOCK)
    sums, squares = tl.zeros((BLOCK, BLOCK), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK_D):
        at = rows[:, None] * D + start + tl.arange(0, BLOCK_D)[None, :]
        a, b = tl.load(x + at), tl.load(w + at)
        sums = tl.dot(a, tl.trans(b), sums)
        squares += tl.sum(a.to(tl.float32) * a.to(tl.float32), 1)
    tl.store(y + rows[:, None] * BLOCK + rows[None, :], sums * squares[:, None])


def control(kernel, block: int, **options) -> Launch:
    pointers = {"x": "*fp32", "y": "*fp32"}
    return Launch(kernel, pointers, {"BLOCK": block}, aligned=("x", "y"), options=options | {"num_warps": 1})


def divides_by_fusing(launch: Launch, device: str) -> bool:
    """AMD's instructions of a quotient or root that is rounded to nearest are fused multiply-adds."""
    return device.startswith("gfx") and launch.name == "row_adam_kernel"


def complaints(launch: Launch, device: str, found: Resources) -> list[str]:
    wrong = []
    if found.spills or found.scratch:
        wrong.append(f"{found.spills} spills, {found.scratch} bytes of scratch, {found.registers} registers")
    if found.scalar_spills:
        wrong.append(f"{found.scalar_spills} scalar registers spilled")
    if found.shared > DEVICES[device].shared_limit:
        wrong.append(f"{found.shared} bytes of shared memory")
    if found.tensor_memory > TENSOR_MEMORY:
        wrong.append(f"{found.tensor_memory} columns of tensor memory")
    if launch.name in MULTIPLYING and launch.constants["OPERAND"] == tl.bfloat16:
        on_units = all(name.startswith(UNITS[device]) for name in found.matrix_instructions)
        if not on_units or found.matrix_operands != {"bf16"}:
            wrong.append(f"multiplies by {found.matrix_instructions}")
    if found.overtakes:
        wrong.append("copies overtake matrix instructions")
    unfused = launch.options.get("enable_fp_fusion") is False
    if unfused and found.fuses and not divides_by_fusing(launch, device):
        wrong.append("a product is added unrounded")
    return [f"{_entry(launch)}: {complaint}" for complaint in wrong]


def check(launches: list[Launch], device: str) -> None:
    assert MULTIPLYING <= {launch.name for launch in launches}
    found = compile_all([(launch, device) for launch in launches])
    wrong = [c for launch, r in zip(launches, found, strict=True) for c in complaints(launch, device, r)]
    assert not wrong, "\n".join(wrong)


def test_kernels_are_short():
    """And what they call: with more arguments than this, nobody sees which is which."""
    for module in (backward, chunk_kernels, forward, tiles):
        for name, function in vars(module).items():
            if getattr(getattr(function, "fn", None), "__module__", None) != module.__name__:
                continue
            assert len(inspect.getsource(function.fn).splitlines()) <= 80, name
            assert len(inspect.signature(function.fn).parameters) <= 24, name


@pytest.mark.exhaustive
@pytest.mark.parametrize("device", DEVICES)
def test_every_shipped_kernel_fits(device):
    check([*shipped(device), *unfused(device)], device)


@pytest.mark.exhaustive
def test_what_is_wrong_is_seen():
    """As many values per thread as it has registers (NVIDIA's 255, AMD's 512), where all else needs some too.

    Many rows of odd length, which AMD's table leaves to chunks: the masks of all that a thread holds do not
    fit scalar registers.
    """
    requests = []
    for device in DEVICES:
        values = 512 if DEVICES[device].backend == "hip" else 256
        spills = control(spilling, values * DEVICES[device].warp_size)
        fuses = control(multiply_add, 128, enable_fp_fusion=True)
        apart = replace(fuses, options={"enable_fp_fusion": False})
        requests += [(launch, device) for launch in (spills, fuses, apart)]
    with mock.patch.dict(TABLES, gfx942=replace(configurations.AMD, many_of_odd_length=True)):
        many = launched("gfx942", [{"B": 128, "D": 500}])
    masks = next(launch for launch in many if launch.name == "small_tiles")
    types = {"x": "*bf16", "w": "*bf16", "y": "*fp32", "D": "i32"}
    beside = Launch(squares_beside_products, types, {"BLOCK": 128, "BLOCK_D": 64}, ("x", "w", "y", "D"))
    beside = replace(beside, options={"num_warps": 8, "num_stages": 3})
    *found, masked, raced = compile_all([*requests, (masks, "gfx942"), (beside, "sm_90")])
    assert raced.overtakes and not any(each.overtakes for each in found)
    assert masked.scalar_spills and complaints(masks, "gfx942", masked)
    for at, device in enumerate(DEVICES):
        spilled, fused, apart = found[3 * at : 3 * at + 3]
        assert spilled.spills > 0 and spilled.scratch > 0
        assert complaints(requests[3 * at][0], device, spilled)
        assert fused.fuses and not apart.fuses
