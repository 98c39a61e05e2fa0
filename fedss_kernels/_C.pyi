"""The C++ kernels. Internal: the functions of fedss_kernels check and explain what these only refuse."""

from torch import Tensor

def sampled_softmax(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    class_ids: Tensor | None,
    log_expected_count: Tensor | None,
    target_log_expected_count: Tensor | None,
    bias: Tensor | None,
    scale: float,
    similarity: str,
    ignore_index: int,
    rounding: str,
    reduction: str,
    grad_loss: Tensor | None = None,
    loss: Tensor | None = None,
    grad_input: Tensor | None = None,
    grad_rows: Tensor | None = None,
    row_ids: Tensor | None = None,
    grad_bias: Tensor | None = None,
    grad_scale: Tensor | None = None,
    threads: int = 1,
) -> int: ...
def scatter_add(
    out: Tensor, class_ids: Tensor, rows: Tensor, scale: Tensor | None, threads: int = 1
) -> None: ...
def xor_rows(table: Tensor, bits: Tensor, answers: Tensor, threads: int = 1) -> None: ...
def row_momentum_step(
    weight: Tensor,
    velocity: Tensor | None,
    class_ids: Tensor,
    rows: Tensor,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    threads: int = 1,
) -> None: ...
def row_adam_step(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_steps: Tensor,
    class_ids: Tensor,
    rows: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    threads: int = 1,
) -> None: ...
def lazy_momentum_read(
    weight: Tensor,
    velocity: Tensor,
    stepped: Tensor,
    now: int,
    lr: float,
    momentum: float,
    class_ids: Tensor,
    out: Tensor,
    threads: int = 1,
) -> None: ...
def lazy_momentum_step(
    weight: Tensor,
    velocity: Tensor,
    stepped: Tensor,
    now: int,
    lr: float,
    momentum: float,
    class_ids: Tensor,
    rows: Tensor,
    threads: int = 1,
) -> bool: ...
def scale_to_bfloat16(values: Tensor, factor: float, out: Tensor, threads: int = 1) -> None: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def fma_peak(threads: int) -> float: ...

class GpuLaunches:
    def __init__(self, library: str = "libcuda.so.1") -> None: ...
    def add(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        parameters: list[tuple[int, int, int]],
    ) -> None: ...
    def run(self, stream: int, factor: float, *memories: Tensor | None) -> None: ...
