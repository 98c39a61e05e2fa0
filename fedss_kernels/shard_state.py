"""An optimiser's state of class rows of which a process holds a block: saved and loaded as all classes'."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .row_optimizer import State, with_keys


def follow_shards(
    optimizer: torch.optim.Optimizer,
    blocks: Callable[[], Sequence[Tensor | None]],  # the parameters that are blocks of rows
    as_shard: Callable[[Tensor], Tensor],  # (own rows, ...) -> a part of all rows
    own_part: Callable[[Tensor], Tensor],  # all rows, or a part of them -> (own rows, ...)
) -> None:
    """Its state_dict() has what there is of each row of `blocks` as parts of all rows' tensors.

    Its load_state_dict takes these, or whole tensors of all rows, and else what is as before.
    """

    def saved(_: Any, state_dict: State) -> State:
        return _changed(state_dict, lambda value, block: as_shard(value) if _is_of(block, value) else value)

    def loaded(_: Any, state_dict: State) -> State:
        return _changed(state_dict, lambda value, block: value if _is_of(block, value) else own_part(value))

    def _changed(state_dict: State, change: Callable[[Tensor, Tensor], Tensor]) -> State:
        """In new dicts: those of the state are the optimiser's own."""
        state = dict(state_dict["state"])
        for parameter, key in with_keys(optimizer, state_dict):
            if key in state and any(parameter is block for block in blocks()):
                state[key] = {
                    name: change(value, parameter) if isinstance(value, Tensor) and value.dim() else value
                    for name, value in state[key].items()
                }
        return {**state_dict, "state": state}

    optimizer.register_state_dict_post_hook(saved)
    optimizer.register_load_state_dict_pre_hook(loaded)


def _is_of(block: Tensor, value: Tensor) -> bool:
    """Whether it has a number, or a row of them, for each of the own rows."""
    return value.shape in (block.shape, block.shape[:1]) and not hasattr(value, "to_local")
