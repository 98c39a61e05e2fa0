"""What the processes of a group tell each other: whether all may go on, rows, numbers of rows, sums.

Each step of a data-parallel batch has rows of its own on every rank, maybe none; "own rows" below. Gradients
go by the rule of DistributedDataParallel: what is differentiated is the mean over the ranks of the losses
that they call backward on, and an input's gradient is the number of ranks times that, as the averaging of
the net's gradients divides it later. So each operation here but `gathered` and `total` passes the adjoint of
what it does, `to_own_rows` divides by the number of ranks and `gathered` multiplies by it.

Every rank makes the same calls in the same order, in the backward pass too: that the operations of one loss
hang on each other by their tensors sees to it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .sparse_rows import widened

SETTINGS = 28  # at most, in one agreement
# Older torch has them under other names, which newer torch warns of.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Said(NamedTuple):
    """What all ranks know of each other before they go on."""

    sizes: list[int]  # own rows of each rank
    wants: int  # bits that any rank has set


class Ranks:
    """The processes of a torch.distributed group; one that is alone where torch.distributed is not in use.

    Raises TypeError for what is no group, or one that this process is not in (a number in torch).
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            expected = "a ProcessGroup of torch.distributed with this process in it, or None"
            raise TypeError(f"process_group: expected {expected}, got {type(group).__name__}")
        self.group, self.rank, self.world = group, 0, 1
        if group is not None or (dist.is_available() and dist.is_initialized()):
            self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: dict) -> "Ranks":
        return self  # the same processes

    def agree(
        self,
        size: int,
        wants: int,
        settings: Mapping[str, Any],  # the same keys in the same order on all ranks that make the same call
        error: Exception | None,
        device: torch.device,
    ) -> Said:
        """Raises on every rank where one has an error or another setting; so none waits for one that raised.

        The rank's own error, RuntimeError where it is another's, ValueError for settings that differ. One
        all-gather of 31 numbers, and a wait for it.
        """
        assert len(settings) <= SETTINGS
        said = [int(error is not None), size, wants, *map(_digest, settings.values())]
        own = torch.tensor([*said, *[0] * (3 + SETTINGS - len(said))], device=device)
        rows = self.gather(own[None], [1] * self.world).tolist()
        if error is not None:
            raise error
        if failed := [r for r, row in enumerate(rows) if row[0]]:
            raise RuntimeError(
                f"rank {failed[0]} of {self.world} has raised an error, which says what is wrong there; "
                "no rank has gone on, and nothing has changed"
            )
        for place, (name, value) in enumerate(settings.items(), 3):
            if others := [r for r, row in enumerate(rows) if row[place] != rows[self.rank][place]]:
                raise ValueError(
                    f"{name}: expected the same on all ranks, got {value!r} on rank {self.rank} and "
                    f"something else on rank {others[0]}"
                )
        bits = 0
        for row in rows:
            bits |= row[2]
        return Said([row[1] for row in rows], bits)

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """(B, ...): everybody's rows, in the order of the ranks. Padded to the largest size on the way."""
        if self.world == 1:
            return rows
        most = max(sizes)
        everybody = rows.new_empty((self.world * most, *rows.shape[1:]))
        if most:
            _all_gather(everybody, _padded(rows, most), self.group)
        if sum(sizes) == len(everybody):
            return everybody
        return torch.cat([everybody[r * most : r * most + size] for r, size in enumerate(sizes)])

    def scatter_sum(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """(B, ...) on each rank -> (own rows, ...): their sums over the ranks. Padded on the way."""
        if self.world == 1:
            return rows
        most = max(sizes)
        own = rows.new_empty((most, *rows.shape[1:]))
        if most:
            if sum(sizes) < self.world * most:
                rows = torch.cat([_padded(part, most) for part in rows.split(list(sizes))])
            _reduce_scatter(own, rows.contiguous(), group=self.group)
        return own[: sizes[self.rank]]

    def exchange(self, columns: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """(sum of sent, n) -> (sum of received, n): sent[r] rows of it go to rank r, by order."""
        if self.world == 1:
            return columns.clone()
        result = columns.new_empty((sum(received), columns.shape[1]))
        dist.all_to_all_single(result, columns.contiguous(), list(received), list(sent), group=self.group)
        return result

    def sum(self, values: Tensor) -> Tensor:
        result = values.clone(memory_format=torch.contiguous_format)
        if result.numel() and self.world > 1:
            dist.all_reduce(result, group=self.group)
        return result

    # ---- differentiable ------------------------------------------------------------------------------------

    def gathered(
        self, input: Tensor, scale: Tensor | None, sizes: Sequence[int], wants: Sequence[bool]
    ) -> tuple[Tensor, Tensor | None]:
        """(everybody's `input` (B, D), `scale`): what all ranks make their losses of.

        wants: whether any rank wants the gradient of (input, scale). In the backward pass input's is
        reduce-scattered, in float32 or better, and scale's, of which all ranks hold a copy, summed.
        """
        if not any(wants):
            return self.gather(input.detach(), sizes), scale
        pairs = zip((input, scale), wants, strict=True)
        given = [_following(t) if wanted and t is not None else t for t, wanted in pairs]
        return _Gathered.apply(self, sizes, wants, *given)

    def summed(self, values: Tensor, wanted: bool) -> Tensor:
        """The sum over the ranks, which every rank then goes on from."""
        return _Summed.apply(self, _following(values)) if wanted else self.sum(values)

    def to_own_rows(self, columns: Tensor, sizes: Sequence[int], wanted: bool) -> Tensor:
        """(B, n) on each rank -> (world, own rows, n): what each rank has found of this rank's rows."""
        own = sizes[self.rank]
        if wanted:
            parts = _ToOwnRows.apply(self, sizes, _following(columns))
        else:
            parts = self.exchange(columns, sizes, [own] * self.world)
        return parts.reshape(self.world, own, columns.shape[1])

    def total(self, values: Tensor) -> Tensor:
        """The sum over the ranks of what each has of its own rows, for a loss that all ranks hold."""
        return _Total.apply(self, values)


def _digest(value: Any) -> int:
    """Equal for what is written alike."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big")


def _padded(rows: Tensor, most: int) -> Tensor:
    if len(rows) == most:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros((most - len(rows), *rows.shape[1:]))])


def _following(tensor: Tensor) -> Tensor:
    """The tensor, with a gradient that is dropped where nobody here wants it: others wait for this rank."""
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ranks: Ranks, sizes: Sequence[int], wants: Sequence[bool], input: Tensor, scale: Any):
        ctx.ranks, ctx.sizes, ctx.wants, ctx.dtype = ranks, sizes, wants, input.dtype
        everybody = ranks.gather(input, sizes)
        if not wants[0]:
            ctx.mark_non_differentiable(everybody)
        return everybody, scale if scale is None else scale.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows, grad_scale):
        grad_input = None
        if ctx.wants[0]:
            own = ctx.ranks.scatter_sum(widened(grad_rows), ctx.sizes)
            grad_input = (own * ctx.ranks.world).to(ctx.dtype)
        if ctx.wants[1]:
            grad_scale = ctx.ranks.sum(widened(grad_scale)).to(grad_scale.dtype)
        return None, None, None, grad_input, grad_scale if ctx.wants[1] else None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ranks: Ranks, values: Tensor):
        ctx.ranks = ranks
        return ranks.sum(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, ctx.ranks.sum(grad)


class _ToOwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ranks: Ranks, sizes: Sequence[int], columns: Tensor):
        ctx.ranks, ctx.sizes = ranks, sizes
        return ranks.exchange(columns, sizes, [sizes[ranks.rank]] * ranks.world)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ranks, sizes = ctx.ranks, ctx.sizes
        return None, None, ranks.exchange(grad / ranks.world, [sizes[ranks.rank]] * ranks.world, sizes)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ranks: Ranks, values: Tensor):
        ctx.world = ranks.world
        return ranks.sum(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, grad * ctx.world
