"""XOR of rows by bit vectors: the bits of the definition at every block's edge; the bad call, by name."""

import itertools

import pytest
import torch
from torch import Tensor

from fedss_kernels import _C
from fedss_kernels.xor_rows import xor_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def definition(table: Tensor, bits: Tensor) -> Tensor:
    """Row by row, on the bits of the numbers."""
    words = table.contiguous().view(WORDS[table.element_size()])
    answers = words.new_zeros(len(bits), table.shape[1])
    for q, j in itertools.product(range(len(bits)), range(len(table))):
        if bits[q, j // 8] >> j % 8 & 1:
            answers[q] ^= words[j]
    return answers.view(table.dtype)


def problem(C: int, D: int, Q: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A table of any bits, NaN and infinities among them."""
    g = torch.Generator().manual_seed(0)
    bytes = torch.randint(256, (C, D * dtype.itemsize), dtype=torch.uint8, generator=g)
    return bytes.view(dtype), torch.randint(256, (Q, -(-C // 8)), dtype=torch.uint8, generator=g)


def same(got: Tensor, expected: Tensor) -> bool:
    """Bit for bit."""
    alike = got.dtype == expected.dtype and got.shape == expected.shape
    return alike and torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def test_hand_worked_table():
    """0b101 asks for 1 ^ 4, 0b110 for 2 ^ 4; of words, not of numbers."""
    table = torch.tensor([[1], [2], [4]], dtype=torch.int32).view(torch.float32)
    bits = torch.tensor([[0b101], [0b110], [0]], dtype=torch.uint8)
    assert xor_rows(table, bits).view(torch.int32).tolist() == [[5], [6], [0]]


# Rows: of a group of 4, of a byte of bits, of a block of 32, and one more or less. Columns: of vectors of 16,
# 32 and 64 bytes and strips of four, and one more or less. The last: more than one block of queries.
EDGES = [
    *((C, 5, 3) for C in (1, 3, 4, 5, 7, 8, 9, 31, 32, 33, 65)),
    *((37, D, 3) for D in (1, 3, 4, 5, 8, 9, 15, 16, 17, 32, 33, 48, 63, 64, 65, 80, 96, 129, 160)),
    (9, 3, 300),
]


@pytest.fixture(params=_C.instruction_sets())
def isa(request):
    before = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(before)


def test_bits_of_the_definition_at_every_edge(isa):
    for C, D, Q in EDGES:
        table, bits = problem(C, D, Q)
        assert same(xor_rows(table, bits), definition(table, bits)), (C, D, Q)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_any_floating_dtype(dtype, isa):
    table, bits = problem(45, 37, 5, dtype)
    assert same(xor_rows(table, bits), definition(table, bits))


@pytest.mark.parametrize("C, D, Q", [(0, 3, 2), (3, 0, 2), (3, 3, 0), (0, 0, 0)])
def test_of_nothing(C, D, Q):
    table, bits = torch.empty(C, D), torch.full((Q, -(-C // 8)), 255, dtype=torch.uint8)
    answers = xor_rows(table, bits)
    assert answers.shape == (Q, D) and not answers.view(torch.int32).any()


def test_bits_behind_the_last_row_ask_for_nothing():
    table, bits = problem(11, 5, 4)
    cleared = bits.clone()
    cleared[:, 1] &= 0b111
    assert (bits != cleared).any() and same(xor_rows(table, bits), xor_rows(table, cleared))


def test_same_bits_for_any_number_of_threads(set_threads):
    """More rows than one task has."""
    table, bits = problem(2500, 65, 20)
    one = xor_rows(table, bits)
    chosen = torch.arange(2500)[(bits[7, torch.arange(2500) // 8] >> torch.arange(2500) % 8 & 1).bool()]
    column = table[chosen, 64].view(torch.int32).tolist()
    assert one[7, 64].view(torch.int32).item() == xor_of(column)
    for threads in (2, 3, 4):
        set_threads(threads)
        assert same(xor_rows(table, bits), one)


def xor_of(words: list[int]) -> int:
    result = 0
    for word in words:
        result ^= word
    return result


def test_strided_tensors_are_used_as_they_are():
    table, bits = problem(40, 20, 6)
    expected = definition(table, bits)
    room, room_of_bits = torch.zeros(40, 30), torch.zeros(6, 9, dtype=torch.uint8)
    room[:, 3:23], room_of_bits[:, 2:7] = table, bits
    assert same(xor_rows(room[:, 3:23], room_of_bits[:, 2:7]), expected)
    assert same(xor_rows(table.T.contiguous().T, bits.T.contiguous().T), expected)


def test_two_servers_answers_differ_by_the_row_that_is_wanted():
    table, bits = problem(100, 33, 100, torch.bfloat16)
    other, wanted = bits.clone(), torch.arange(100)
    other[wanted, wanted // 8] ^= (1 << wanted % 8).to(torch.uint8)
    answers = [xor_rows(table, of).view(torch.int16) for of in (bits, other)]
    assert torch.equal(answers[0] ^ answers[1], table.view(torch.int16))


GOOD = torch.zeros(20, 7), torch.zeros(4, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"table": [[1.0]]}, TypeError, "table: expected a tensor, got list"),
        ({"table": torch.zeros(20, 7, dtype=torch.int32)}, TypeError, "table: expected float16 or"),
        ({"table": torch.zeros(20)}, ValueError, r"table: expected shape \(C, D\), got \(20,\)"),
        (
            {"table": torch.zeros(20, 7, device="meta")},
            ValueError,
            "table: expected a CPU tensor, got one on",
        ),
        ({"bits": torch.zeros(4, 3)}, TypeError, "bits: expected uint8, got float32"),
        (
            {"bits": torch.zeros(4, 2, dtype=torch.uint8)},
            ValueError,
            r"bits: expected shape \(Q, 3\), a bit for each of 20 rows, got \(4, 2\)",
        ),
        ({"bits": torch.zeros(3, dtype=torch.uint8)}, ValueError, r"bits: expected shape \(Q, 3\)"),
        (
            {"bits": torch.zeros(4, 3, dtype=torch.uint8, device="meta")},
            ValueError,
            "bits: expected a CPU tensor, got one on meta",
        ),
    ],
)
def test_a_bad_call_is_refused_by_name(changed, error, message):
    arguments = dict(zip(("table", "bits"), GOOD, strict=True)) | changed
    with pytest.raises(error, match=message):
        xor_rows(**arguments)


def test_the_binding_refuses_what_would_leave_memory():
    table, bits = GOOD
    out = torch.empty(4, 7)
    for name, arguments in {
        "bits: expected 3 bytes": (table, bits[:, :2], out),
        "bits: expected a matrix of uint8": (table, table, out),
        "table: expected rows": (table.T, bits, out),
        "answers: expected a contiguous tensor": (table, bits, out[:3]),
    }.items():
        with pytest.raises(ValueError, match=name):
            _C.xor_rows(*arguments)
