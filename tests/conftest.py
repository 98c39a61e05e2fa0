import contextlib
import importlib
import importlib.util
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from faster_interpreter import interpret_faster
from loss_cases import GPU_IMPLEMENTATIONS, blocks_of_16

import fedss_kernels
from fedss_kernels.triton_kernels.configurations import forced

# Where there is no GPU its kernels run on CPU tensors, interpreted. Read when triton is first imported, which
# nothing above does.
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if TRITON_DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    interpret_faster()

# Under nohup, or in the background of a script, the tests' processes would ignore what is sent to them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tests of bits over several threads ask for them; the others are too small to gain from any.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Skips what no interpreter stands in for: graphs, waits for the device, its memory, sizes past 2^31."""
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA or ROCm device, and torch finds none")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class _Moved(torch.autograd.Function):
    """tensor.cuda(), whose gradient may be sparse."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.cuda()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.cpu()


def _on_the_gpu(*arguments, **options):
    """The loss of tensors moved to the GPU, moved back."""

    def move(value):
        return _Moved.apply(value) if isinstance(value, torch.Tensor) else value

    moved = {name: move(value) for name, value in options.items()}
    return fedss_kernels.sampled_softmax_loss(*map(move, arguments), **moved).cpu()


@pytest.fixture
def gpu_loss():
    """The loss by the GPU kernels as they are shipped; without a GPU interpreted."""
    return (
        _on_the_gpu if TRITON_DEVICE == "cuda" else partial(fedss_kernels.sampled_softmax_loss, impl="triton")
    )


@pytest.fixture(params=["cpp", *GPU_IMPLEMENTATIONS])
def sampled_softmax_loss(request):
    """The function under test, by each implementation. Without a GPU its kernels run interpreted."""
    if request.param == "cpp":
        yield fedss_kernels.sampled_softmax_loss
        return
    if request.param == "gpu":
        yield _on_the_gpu
    else:
        with forced(partial(blocks_of_16, request.param == "triton in two launches")):
            yield partial(fedss_kernels.sampled_softmax_loss, impl="triton")


@pytest.fixture(params=["cpp", "triton"])
def impl(request):
    """Each implementation; tensors are made where it runs: on a GPU, or the GPU's kernels interpreted."""
    with torch.device(TRITON_DEVICE if request.param == "triton" else "cpu"):
        yield request.param


@pytest.fixture
def peak_memory():
    """Bytes by which a run raises a fresh process' peak memory above what it was after the set-up."""

    def measure(setup: str, run: str) -> int:
        measure_it = """
            def peak():
                with open("/proc/self/status") as status:
                    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
            with open("/proc/self/clear_refs", "w") as clear:
                clear.write("5")  # the peak starts again from what is resident now
            before = peak()
            {run}
            print(peak() - before)
        """
        code = textwrap.dedent(setup) + textwrap.dedent(measure_it).format(run=run)
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
        )
        return int(result.stdout)

    return measure


@pytest.fixture(scope="session")
def torchvision():
    """The module. Beside another torch than its own it lacks its operators: then they are defined by name."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        pytest.skip("needs torchvision, of the extra vision, which is not installed")
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    registrations = Path(spec.origin).with_name("_meta_registrations.py").read_text(encoding="utf-8")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in sorted(set(re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"', registrations))):
        library.define(f"{name}(Tensor unused) -> Tensor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that images cannot be decoded, which is not asked for
        yield importlib.import_module("torchvision")


@pytest.fixture(scope="session")
def transformers(request):
    """The module, which imports torchvision where that is there."""
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("torchvision"):
        request.getfixturevalue("torchvision")
    missing = "needs transformers, of the extra integrations, which is not installed"
    return pytest.importorskip("transformers", reason=missing)


@pytest.fixture
def room_for_files_of():
    """room_for_files_of(count), a context in which no file can be longer than so many bytes."""

    @contextlib.contextmanager
    def room(count: int):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (count, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return room
