"""A tensor's numbers as they lie in memory."""

import torch
from torch import Tensor


def memory_bytes(tensor: Tensor) -> Tensor:  # (n,) uint8, in main memory
    """Of any dtype and any strides: one of a single number, or of none, may have some that no view takes."""
    content = tensor.detach().cpu().contiguous()
    return content.as_strided((content.numel(),), (1,)).view(torch.uint8)
