"""Samplers with replacement: classes drawn by how frequent they are, and the probability of each.

They turn uniform numbers u in [0, UNIFORM) into classes, with whole numbers or in float64, on u's device and
without reading anything back to the host.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

from .checks import as_number, check_constant, check_dtype, check_tensor, refuse_meta
from .direct_route import holds_numbers

UNIFORM = 2**62  # uniform numbers are whole and below it
_NUMBERS = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)


def draw_log_uniform(
    uniform: Tensor,  # (m,) int64 in [0, UNIFORM)
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """(classes (m,) int64, log probability of each (m,) float64): Zipf's law, class 0 the most frequent.

        q_j = log((j + 2) / (j + 1)) / log(C + 1)

    as TensorFlow's LogUniformCandidateSampler: exp of a uniform number in [0, log(C + 1)), rounded down, - 1.
    """
    log_range = math.log(num_classes + 1)
    drawn = torch.exp(uniform.double() * (log_range / UNIFORM)).long() - 1
    drawn = drawn.clamp(0, num_classes - 1)  # rounding may step over either end
    return drawn, torch.log(torch.log1p(1 / (drawn.double() + 1)) / log_range)


class FrequencySampler(nn.Module):
    """Draws class j with a probability in proportion to frequencies_j ** power, in O(1) (alias method).

    C cells are equally likely; cell i gives class i where a coin, a whole number below the coins there are,
    lies below `kept_i`, and class `alias_i` otherwise. All is held in whole numbers: no cast of a module
    changes them, and the probability of a class, `ways_j` of coins * C, is exactly that with which it is
    drawn.

    Args:
        frequencies: (C,) positive numbers, whole ones or not, such as how many examples each class has. A
            class of frequency 0 would never be a negative.
        power: 1 draws by frequency, 0 each class equally often; word2vec's 0.75 lies between.
        device: where the (C,) tables lie; None: torch's default device.

    The tables are buffers, so they are in state_dict. `reset_parameters` makes them anew, as after to_empty.
    Averages of buffers, as torch.optim.swa_utils.AveragedModel makes them with use_buffers=True, are no
    tables, nor is what to_empty leaves: such a module evaluates, but draws nothing until `reset_parameters`
    or tables are loaded (RuntimeError), and an average's do not load.
    Raises TypeError and ValueError for frequencies that are no (C,) tensor of finite positive numbers and for
    a power that is no finite number of at least 0.

    >>> sampler = FrequencySampler(torch.tensor([1, 1, 2]), power=1.0)
    >>> sampler.draw(torch.arange(12) * (2**62 // 12))[1].exp().unique()
    tensor([0.2500, 0.5000], dtype=torch.float64)
    """

    kept: Tensor
    alias: Tensor
    ways: Tensor

    def __init__(
        self,
        frequencies: Tensor,  # (C,)
        power: float = 0.75,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.power = as_number("power", power, 0.0)
        self._shares = _shares(frequencies, self.power)
        self._watch = _Watch()
        for name in _TABLES:
            self.register_buffer(name, torch.empty(len(self._shares), dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The tables of the frequencies that were given."""
        for buffer, values in zip((self.kept, self.alias, self.ways), _tables(self._shares), strict=True):
            buffer.copy_(torch.from_numpy(values))
        self._watch.seen = self._versions()

    def draw(
        self,
        uniform: Tensor,  # (m,) int64 in [0, 2**62), as of torch.randint(2**62, (m,))
    ) -> tuple[Tensor, Tensor]:
        """(classes (m,) int64, log probability of each (m,) float64), on the tables' device."""
        check_dtype("uniform", uniform.dtype, (torch.int64,))
        plain = holds_numbers() and peek_interpreter_stack() is None
        if plain and (versions := self._versions()) != self._watch.seen:
            if self._watch.is_due() and (message := _why_no_tables(self.kept, self.alias, self.ways)):
                raise RuntimeError(message)
            self._watch.count(versions)
        C = self.kept.shape[0]
        coins = UNIFORM // C
        cell, coin = uniform % C, (uniform // C).clamp(max=coins - 1)
        drawn = torch.where(coin < self.kept[cell], cell, self.alias[cell])
        return drawn, torch.log(self.ways[drawn].double()) - math.log(coins * C)

    def of_classes(self, classes: range) -> "FrequencySampler":
        """One that draws among these as this one does among all, by its tables."""
        if message := _why_no_tables(self.kept, self.alias, self.ways):
            raise RuntimeError(message)
        return FrequencySampler(self.ways[classes.start : classes.stop], 1.0, device=self.kept.device)

    def extra_repr(self) -> str:
        return f"{self.kept.shape[0]}, power={self.power}"

    def _versions(self) -> list[int]:
        """Torch counts how often a tensor was changed in place, but not for every kind of tensor."""
        return [each._version for each in (self.kept, self.alias, self.ways) if not each.is_inference()]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_watch": _Watch(), **state})  # an earlier version's has none

    def _apply(self, fn: Any, recurse: bool = True) -> "FrequencySampler":
        before = list(self.buffers())
        super()._apply(fn, recurse)
        if any(new is not old for new, old in zip(self.buffers(), before, strict=True)):
            self._watch = _Watch()  # to_empty's are to be looked at
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        given = [state_dict.get(prefix + name) for name in _TABLES]
        tables = [each for each in given if isinstance(each, Tensor) and each.shape == self.kept.shape]
        if len(tables) == len(given) and (message := _why_no_tables(*tables)):
            *_, errors = arguments
            errors.append(f"{prefix}{message}")
            return
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class _Watch:
    """Says when tables that change are to be looked at again: at changes 1, 2, 4, 8, ...

    DistributedDataParallel writes buffers, with the same numbers, in each step. A copy has seen none, as the
    versions of tensors that are copied start anew.
    """

    def __init__(self) -> None:
        self.seen: list[int] | None = None
        self.changes = 0

    def is_due(self) -> bool:
        return self.changes & (self.changes + 1) == 0

    def count(self, versions: list[int]) -> None:
        self.seen, self.changes = versions, self.changes + 1

    def __reduce__(self) -> Any:
        return _Watch, ()


_TABLES = ("kept", "alias", "ways")


def _why_no_tables(kept: Tensor, alias: Tensor, ways: Tensor) -> str | None:
    """What is wrong with them, if anything is. Waits for the device."""
    if kept.is_meta or alias.is_meta or ways.is_meta:
        return None
    C = kept.shape[0]
    coins = UNIFORM // C
    whole = (kept >= 1) & (kept <= coins) & (alias >= 0) & (alias < C)
    if {kept.dtype, alias.dtype, ways.dtype} == {torch.int64} and whole.all():
        if torch.equal(kept.index_add(0, alias, coins - kept), ways):
            return None
    return (
        "tables: expected those of one FrequencySampler, got others, as an average of buffers makes them "
        "(torch.optim.swa_utils.AveragedModel with use_buffers=True) and to_empty leaves them; its "
        "reset_parameters() makes them anew"
    )


def check_frequencies(name: str, frequencies: object) -> np.ndarray:
    """(C,) float64; raises TypeError or ValueError unless they are finite positive numbers."""
    check_tensor(name, frequencies, _NUMBERS)
    assert isinstance(frequencies, Tensor)
    check_constant(name, frequencies)
    if frequencies.dim() != 1 or not len(frequencies):
        raise ValueError(f"{name}: expected shape (C,), C >= 1, got {tuple(frequencies.shape)}")
    if frequencies.device.type == "meta":
        refuse_meta(name)
    given = frequencies.to("cpu", torch.float64).numpy()
    bad = np.flatnonzero(~(np.isfinite(given) & (given > 0)))
    if len(bad):
        raise ValueError(
            f"{name}: expected finite positive numbers (a class of frequency 0 would never be a "
            f"negative; {name}.clamp(min=1) lets it be one), got {given[bad[0]]} at position {bad[0]}"
        )
    return given


def _shares(frequencies: object, power: float) -> np.ndarray:  # (C,) float64 of mean 1
    given = check_frequencies("frequencies", frequencies)
    shares = (given / given.max()) ** power
    return shares / shares.mean()


def _tables(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(kept, alias, ways), each (C,) int64: Vose's alias tables, made at once by sums instead of one by one.

    A light class (share < 1) leaves 1 - share of its cell; the heavy ones in order, each with share - 1 to
    give away, fill what the light ones in order leave. A heavy class that gives more than it has, to the last
    light one it fills, takes that from the next heavy one, in its own cell.
    """
    C = len(shares)
    heavy = shares >= 1
    heavy[shares.argmax()] = True  # whatever rounding did
    lights, heavies = np.flatnonzero(~heavy), np.flatnonzero(heavy)
    left = np.concatenate([[0.0], np.cumsum(1 - shares[lights])])  # by the first i light ones
    given = np.cumsum(shares[heavies] - 1)  # by heavies up to each

    own, alias = np.ones(C), np.arange(C)
    own[lights] = shares[lights]
    giver = np.searchsorted(given, left[:-1], side="right").clip(max=len(heavies) - 1)
    alias[lights] = heavies[giver]
    over = left[np.searchsorted(left[:-1], given)] - given
    own[heavies[:-1]] = 1 - over[:-1]
    alias[heavies[:-1]] = heavies[1:]

    coins = UNIFORM // C
    kept = np.rint(own.clip(0, 1) * coins).astype(np.int64).clip(1, coins)  # 1: the rarest can be drawn
    ways = kept.copy()
    np.add.at(ways, alias, coins - kept)
    return kept, alias, ways
