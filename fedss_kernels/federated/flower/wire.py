"""How numbers travel in Flower's records: as they lie in memory.

Nothing from outside is trusted: an array says its dtype and shape, and its bytes have to be as many.
"""

import math
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from ..ledger import WIRE_DTYPES
from ..memory_bytes import memory_bytes
from ..messages import Update

NUMBERS, WORDS = "numbers", "words"  # the two records of a message
_RAW = "raw"  # Array.stype: the bytes are the numbers alone, no header
_DTYPES = {"int64": torch.int64, "int32": torch.int32, **WIRE_DTYPES}


def message(words: dict[str, Any], numbers: dict[str, Tensor] | None = None) -> RecordDict:
    """The content of one: words are text and plain numbers."""
    arrays = {name: packed(tensor) for name, tensor in (numbers or {}).items()}
    return RecordDict({WORDS: ConfigRecord(words), NUMBERS: ArrayRecord(arrays)})


def packed(tensor: Tensor) -> Array:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Array(dtype, tuple(tensor.shape), _RAW, memory_bytes(tensor).numpy().tobytes())


def unpacked(array: Any) -> Tensor | None:
    """What was packed; None where it is no array of these."""
    if not isinstance(array, Array) or array.stype != _RAW or array.dtype not in _DTYPES:
        return None
    dtype = _DTYPES[array.dtype]
    if min(array.shape, default=0) < 0 or math.prod(array.shape) * dtype.itemsize != len(array.data):
        return None
    if not array.data:
        return torch.empty(array.shape, dtype=dtype)
    return torch.frombuffer(bytearray(array.data), dtype=dtype).view(array.shape)


def number_of(content: RecordDict, name: str) -> Tensor | None:
    """Of a message from outside: the tensor of this name; None where there is none."""
    record = content.get(NUMBERS)
    return unpacked(record.get(name)) if isinstance(record, ArrayRecord) else None


def word_of(content: RecordDict, name: str) -> Any:
    """The word of this name; None where there is none."""
    record = content.get(WORDS)
    return record.get(name) if isinstance(record, ConfigRecord) else None


def are_ids(ids: Tensor, num_classes: int) -> bool:
    """Whether these are class ids, ascending, each once."""
    if ids.dtype != torch.int64 or ids.dim() != 1:
        return False
    return bool(((ids >= 0) & (ids < num_classes)).all() and (ids.diff() > 0).all())


def update_message(update: Update, wire_dtype: str) -> RecordDict:
    """What a node sends back; its class ids the server knows."""
    dtype = WIRE_DTYPES[wire_dtype]
    numbers = {"rows": update.rows.to(dtype), "net": update.extractor.to(dtype)}
    return message({"images": update.num_examples, "loss": update.loss}, numbers)


def update_of(content: RecordDict, client: int, class_ids: Tensor, wire_dtype: str) -> Update:
    """What came back, of rows that were asked for; what is missing or of another kind is None in it.

    The server's inspection tells what is wrong with it.
    """
    dtype = WIRE_DTYPES[wire_dtype]

    def numbers(name: str) -> Any:
        found = number_of(content, name)
        return found.to(torch.float32) if found is not None and found.dtype == dtype else None

    images, loss = word_of(content, "images"), word_of(content, "loss")
    return Update(client, class_ids, numbers("rows"), numbers("net"), images, loss)
