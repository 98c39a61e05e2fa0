"""Whether a net of one's own can be sent to the processes of workers, which import what it is made of."""

import io
import pickle
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import nn

from .config_error import ConfigError

WAY_OUT = "define it in a module, import it from there, or set workers to 1"


def check_sendable(model: nn.Module) -> None:
    """Raises ConfigError, before anything is started, for a net that another process could not read."""
    if any(isinstance(part, torch.jit.ScriptModule) for part in model.modules()):
        raise ConfigError("workers", "a net of torch.jit cannot be sent to another process: set workers to 1")
    try:
        _Pickler(io.BytesIO()).dump(model)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            "workers", f"the net cannot be sent to another process: {error}; {WAY_OUT}"
        ) from None


class _Pickler(pickle.Pickler):
    def reducer_override(self, found: Any) -> Any:
        """Classes and functions are sent as their names, which are to be found where they come to."""
        if isinstance(found, type | FunctionType) and found.__module__ == "__main__" and not _script():
            raise pickle.PicklingError(f"{found.__qualname__} is defined in a notebook or at a prompt")
        return NotImplemented


def _script() -> bool:
    """Whether __main__ is a file or a module, which a new process reads again."""
    main = sys.modules["__main__"]
    if getattr(main, "__spec__", None) is not None:
        return True
    return Path(getattr(main, "__file__", None) or "").is_file()
