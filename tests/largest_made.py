"""How large the tensors are that operators make, to hold a call to what it says of its memory and time."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestMade(TorchDispatchMode):
    """The most elements of one tensor that an operator makes, in memory other than that of `held`."""

    def __init__(self, held):
        super().__init__()
        self.held, self.elements = {tensor.untyped_storage().data_ptr() for tensor in held}, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in tree_leaves(made):
            is_dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
            if is_dense and tensor.untyped_storage().data_ptr() not in self.held:
                self.elements = max(self.elements, tensor.numel())
        return made
