"""Compiles Triton kernels without a GPU, as they would be launched, and reads what they need off the code.

The compiler runs in a process of its own: where TRITON_INTERPRET is set, as the tests of the kernels set it,
triton.jit makes interpreted functions, and the compiler takes none of those.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton.language as tl


@dataclass(frozen=True)
class Device:
    """What to compile for: a GPU, by Triton's name for it, and the shared memory a program may have there."""

    backend: str  # "cuda" or "hip"
    arch: int | str
    warp_size: int
    shared_limit: int  # bytes


DEVICES = {
    "sm_80": Device("cuda", 80, 32, 163 * 1024),
    "sm_90": Device("cuda", 90, 32, 227 * 1024),
    "sm_100": Device("cuda", 100, 32, 227 * 1024),
    "gfx942": Device("hip", "gfx942", 64, 64 * 1024),
}


Name = str | tuple[str, int]


@dataclass(frozen=True)
class Launch:
    """A kernel, specialized for the arguments that it is launched with.

    Every parameter is either in `signature` ("*bf16", "i64", "fp64" ..., or a tuple of such) or in
    `constants`: the constexprs, and the arguments that are None or the integer 1, of which Triton makes
    constants. What is in a tuple goes by the parameter's name and its place there. Kernels, and functions
    given as constants, must be importable by their names.
    """

    kernel: Any  # what triton.jit made
    signature: Mapping[str, Any]
    constants: Mapping[Name, Any] = field(default_factory=dict)
    aligned: Sequence[Name] = ()  # pointers and integers that are multiples of 16
    near: Sequence[Name] = ()  # pointers to less than 2 GiB, which AMD addresses in 32 bits
    options: Mapping[str, Any] = field(default_factory=dict)  # num_warps, num_stages ...

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs."""

    spills: int  # NVIDIA: bytes stored and loaded; AMD: vector registers
    scalar_spills: int  # AMD: scalar registers, kept in lanes of vector registers
    registers: int  # per thread; AMD: vector registers, accumulators among them
    scratch: int  # bytes of local memory per thread, spills among them
    shared: int  # bytes per program
    tensor_memory: int  # columns per program (sm_100, which has 512)
    matrix_instructions: tuple[str, ...]  # each kind once: "v_mfma_f32_32x32x8_bf16" ...
    matrix_operands: frozenset[str]  # the types multiplied: "bf16", "f16", "tf32", "f32" ...
    fuses: bool  # some product is added without having been rounded, outside the matrix units
    overtakes: bool  # see `overtakes`
    seconds: float  # the time to compile


class CompileError(Exception):
    """A kernel that does not compile; the message holds the compiler's own traceback."""


# ---- what is launched --------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded(a_kernel: Any) -> Iterator[list[Launch]]:
    """Notes the launches inside, each once, and runs none: tensors may be on the device "meta".

    a_kernel: any that triton.jit made, compiled or interpreted, like those launched.
    """
    launches: dict[tuple, Launch] = {}

    def at_grid(kernel, grid):
        def note(*arguments, **named):
            options = {name: named.pop(name) for name in list(named) if name not in kernel.arg_names}
            found = specialized(kernel, inspect.signature(kernel.fn).bind(*arguments, **named), options)
            parts = found.signature, found.constants, found.options
            key = kernel, *(tuple(part.items()) for part in parts), found.aligned, found.near
            launches[key] = found

        return note

    found: list[Launch] = []
    with mock.patch.object(type(a_kernel), "__getitem__", at_grid):
        yield found
    found += launches.values()


def specialized(kernel: Any, bound: inspect.BoundArguments, options: dict[str, Any]) -> Launch:
    """The launch as Triton specializes it."""
    options_of_jit = getattr(kernel, "kwargs", None) or vars(
        kernel
    )  # of an interpreted kernel, of a compiled
    plain = options_of_jit.get("do_not_specialize") or ()
    signature, constants, aligned, near = {}, {}, [], []

    def kind(name: Name, value: Any, annotation: Any, specializes: bool) -> str:
        is_one = type(value) is int and value == 1 and specializes
        if annotation is tl.constexpr or value is None or is_one:
            constants[name] = value
            return "constexpr"
        if isinstance(annotation, tl.dtype):
            return annotation.name
        if isinstance(value, torch.Tensor):
            aligned.extend([name] * (value.data_ptr() % 16 == 0 and specializes))
            near.extend([name] * (value.untyped_storage().nbytes() < 2**31 and specializes))
            return f"*{_TYPES[value.dtype]}"
        assert type(value) is int, (name, value)
        aligned.extend([name] * (value % 16 == 0 and specializes))
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for name, value in bound.arguments.items():
        if isinstance(value, tuple):  # what is in it is specialized for, whatever the kernel says
            kinds = (kind((name, at), each, None, True) for at, each in enumerate(value))
            signature[name] = type(value)(*kinds) if hasattr(value, "_fields") else tuple(kinds)
        else:
            found = kind(name, value, bound.signature.parameters[name].annotation, name not in plain)
            signature |= {} if found == "constexpr" else {name: found}
    return Launch(kernel, signature, constants, tuple(aligned), tuple(near), options)


_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.int64: "i64",
}


# ---- what it needs -----------------------------------------------------------------------------------------


def compile_all(requests: Sequence[tuple[Launch, str]]) -> list[Resources]:
    """Compiles launches, each for one of DEVICES, in a new process where nothing is interpreted or cached."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "asked"), Path(scratch, "answered")
        with asked.open("wb") as file:
            _Pickler(file).dump(list(requests))
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
        environment["TRITON_CACHE_DIR"] = str(Path(scratch, "cache"))
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        program = f"import {__name__} as module; module._main({str(asked)!r}, {str(answered)!r})"
        run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        if run.returncode:
            raise CompileError(run.stderr)
        outcomes: list[Resources | str] = pickle.loads(answered.read_bytes())
    failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if failures:
        raise CompileError("\n".join(failures))
    return [outcome for outcome in outcomes if isinstance(outcome, Resources)]


class _Pickler(pickle.Pickler):
    """Writes a Triton function, interpreted or not, as the name to import it by."""

    def persistent_id(self, obj: Any) -> tuple[str, str] | None:
        if type(obj).__name__ not in ("JITFunction", "InterpretedFunction"):
            return None
        module = obj.fn.__module__
        if module == "__main__":
            raise CompileError(f"{obj.fn.__qualname__} is not importable: it was defined in __main__")
        return module, obj.fn.__name__


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, pid: tuple[str, str]) -> Any:
        module, name = pid
        return getattr(importlib.import_module(module), name)


def _main(asked: str, answered: str) -> None:
    """In the new process: compiles what was asked for, on its share of the cores."""
    from triton import knobs

    # Triton calls ptxas with -v anyway, and with flags that differ between its versions: read its log.
    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.always_compile = True  # what comes from the cache has no log
    with open(asked, "rb") as file:
        requests = _Unpickler(file).load()
    global _requests
    _requests = requests  # forked workers find the kernels here, imported
    with multiprocessing.get_context("fork").Pool(_workers()) as pool:
        outcomes = pool.map(_outcome, range(len(requests)), chunksize=1)
    Path(answered).write_bytes(pickle.dumps(outcomes))


_requests: list[tuple[Launch, str]]


def _workers() -> int:
    """Cores, shared with the other test processes."""
    return max(len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), 1)


def _outcome(at: int) -> Resources | str:
    """Of what does not compile, the traceback."""
    launch, device = _requests[at]
    try:
        return _compile(launch, DEVICES[device])
    except Exception:
        return f"{launch.name} for {device}:\n{traceback.format_exc()}"


def _compile(launch: Launch, device: Device) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget(device.backend, device.arch, device.warp_size)
    log = io.StringIO()
    start = time.perf_counter()
    with contextlib.redirect_stdout(log):  # where ptxas' log goes
        compiled = triton.compile(
            _source(launch, device.backend == "hip"), target=target, options=dict(launch.options)
        )
    seconds = time.perf_counter() - start
    if device.backend == "cuda":
        usage, code = read_ptxas_log(log.getvalue()), read_ptx(compiled.asm["ptx"], compiled.asm["ttgir"])
    else:
        usage, code = read_amdgcn_metadata(compiled.asm["amdgcn"]), read_amdgcn(compiled.asm["amdgcn"])
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    return Resources(**usage, **code, shared=compiled.metadata.shared, tensor_memory=columns, seconds=seconds)


def _source(launch: Launch, near_matters: bool) -> Any:
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    missing = set(names) ^ {*launch.signature, *(name for name in launch.constants if isinstance(name, str))}
    if missing:
        raise TypeError(f"{launch.name}: parameters without a type or unknown: {sorted(missing)}")

    def place(name: Name) -> tuple[int, ...]:
        """A key must be a tuple: Triton ignores any other, without a word."""
        return (names.index(name),) if isinstance(name, str) else (names.index(name[0]), name[1])

    attributes: dict[tuple[int, ...], list] = {
        place(name): [["tt.divisibility", 16]] for name in launch.aligned
    }
    if near_matters:
        for name in launch.near:
            attributes.setdefault(place(name), []).append(["tt.pointer_range", 32])
    return ASTSource(
        launch.kernel,
        signature={name: launch.signature.get(name, "constexpr") for name in names},
        constexprs={place(name): value for name, value in launch.constants.items()},
        attrs=attributes,
    )


def read_ptxas_log(log: str) -> dict[str, int]:
    """What `ptxas -v` says.

    A function that is not inlined has a frame of its own, so the spills of all are summed.
    """
    stores, loads = (re.findall(rf"(\d+) bytes spill {what}", log) for what in ("stores", "loads"))
    registers, frames = re.findall(r"Used (\d+) registers", log), re.findall(r"(\d+) bytes stack frame", log)
    if not (stores and loads and registers and frames):
        raise ValueError(f"no resource usage in ptxas' log: {log!r}")
    return {
        "spills": sum(map(int, stores + loads)),
        "scalar_spills": 0,
        "registers": max(map(int, registers)),
        "scratch": sum(map(int, frames)),
    }


def read_amdgcn_metadata(assembly: str) -> dict[str, int]:
    keys = {
        "spills": "vgpr_spill_count",
        "scalar_spills": "sgpr_spill_count",
        "registers": "vgpr_count",
        "scratch": "private_segment_fixed_size",
    }
    found = {name: re.search(rf"^\s*(?:- )?\.{key}:\s*(\d+)", assembly, re.M) for name, key in keys.items()}
    missing = [keys[name] for name, match in found.items() if match is None]
    if missing:
        raise ValueError(f"not in the amdgcn metadata: {missing}")
    return {name: int(match[1]) for name, match in found.items() if match}


def read_ptx(ptx: str, ttgir: str) -> dict[str, Any]:
    """Matrix instructions in PTX, and their operands' types.

    tcgen05's kind::f16 means both 16-bit types (a descriptor made at run time tells them apart), so those are
    read from Triton's own operation.
    """
    instructions = set(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.[\w.:]+", ptx))
    operands = set()
    for instruction in instructions:
        if instruction.startswith("tcgen05"):
            types = re.findall(r"ttng\.tc_gen5_mma\w* .* : !ttg\.memdesc<(?:\d+x)+(\w+)", ttgir)
            operands |= {"tf32" if name == "f32" else name for name in types}
        else:  # ....row.col.D.A.B.C or ....mMnNkK.D.A.B
            types = re.findall(r"\.((?:bf|tf|[fsue])\d+(?:m\d)?)(?=\.|$)", instruction)
            operands.add(types[1])
    fused = re.search(r"\bfma\.r\w\.\S*f(16|32|64)", ptx)
    return _code(instructions, operands, fused) | {"overtakes": overtakes(ptx, ttgir)}


def overtakes(ptx: str, ttgir: str) -> bool:
    """Whether copies may overwrite a tile that a matrix instruction still reads: Hopper's run by themselves.

    Copies run ahead of the products by all copies of a tile but the one in the loop; while an instruction is
    left running, its tile needs a buffer more than that. Triton (3.6 to 3.9) has one too few for a tile that
    threads read as well: on a device, results that differ from run to run.
    """
    if "wgmma.mma_async" not in ptx or not re.search(r"warp_group_dot_wait .*pendings = [1-9]", ttgir):
        return False
    for name, count in re.findall(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", ttgir):
        places = re.findall(rf"(%\w+) = ttg\.memdesc_index {name}\[", ttgir)
        copies = [re.findall(rf"async_copy_global_to_local [^\n]*, {place}\b", ttgir) for place in places]
        if sum(map(len, copies)) > int(count):
            return True
    return False


def read_amdgcn(assembly: str) -> dict[str, Any]:
    instructions = set(re.findall(r"\bv_s?mfma[ci]?_\w+", assembly))
    operands = {re.sub(r".*\d+x\d+x\d+_(?:\d+b_)?", "", name) for name in instructions}
    fused = re.search(r"\bv_(pk_)?(fma|mad|mac)\w*_(f16|f32|f64)", assembly)
    operands = {"tf32" if name == "xf32" else name for name in operands}
    return _code(instructions, operands, fused) | {"overtakes": False}


def _code(instructions: set[str], operands: set[str], fused: re.Match | None) -> dict[str, Any]:
    return {
        "matrix_instructions": tuple(sorted(instructions)),
        "matrix_operands": frozenset(operands),
        "fuses": fused is not None,
    }
