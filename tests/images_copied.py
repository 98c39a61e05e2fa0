"""How many images are copied at a time out of an array, which may be a file larger than memory."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Copied(TorchDispatchMode):
    """Within `with Copied() as copied` the most images that an index took at once: copied.most."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        if func is torch.ops.aten.index.Tensor and found.dtype == torch.uint8:
            self.most = max(self.most, len(found))
        return found
