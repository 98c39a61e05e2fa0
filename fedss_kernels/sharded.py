"""The sampled-softmax loss with its classes over several processes: each holds a block of class rows.

    o(i, t)  = what the rank that holds row t makes of it, shared
    L(i, r)  = log(1 + sum of exp(o(i, j) - o(i, t)) over the class set's j in the block of rank r, j != t)
    loss_i   = log(1 + sum over r of (exp(L(i, r)) - 1))

which is the loss of one process over the union of the ranks' class sets. How the ranks talk: ranks.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checks import (
    check_choice,
    check_flag,
    check_ids,
    check_ignore_index,
    check_integer,
    check_shape,
    check_tensor,
)
from .class_samplers import FrequencySampler
from .class_sets import check_sampler, draw_batch_class_set
from .class_table import ClassTable, class_tables
from .composed_loss import reduced_loss
from .data_parallel import check_left_alone
from .given_target import row_losses
from .loss_extras import NONE, Extras, check_values, checked_extras
from .loss_operator import autocast_dtype, without_autocast
from .ranks import Ranks
from .sampled_softmax import as_float, check_arguments, check_labels, chosen_backend
from .sampled_softmax_module import SampledSoftmaxLoss, TopK, as_sampler
from .shard_state import follow_shards
from .smoothing import mean_logits
from .sparse_rows import check_takes_sparse
from .target_logits import target_logits, widened_rows

INPUT, SCALE, CLASSES = 1, 2, 4  # bits of what a gradient is wanted of


class Step(NamedTuple):
    """A batch of everybody's, as a rank sees it."""

    sizes: list[int]  # rows of each rank
    wants: int  # bits: what any rank wants a gradient of
    rows: Tensor  # (B, D) everybody's
    target: Tensor  # (B,) everybody's
    labels: Tensor  # (B,) everybody's, what accidental hits are told by
    margins: tuple[float | Tensor, float | Tensor]  # angular and cosine: numbers, or (B,) everybody's
    scale: float | Tensor
    entry_labels: Tensor | None  # (own classes,) those of this rank's block
    extras: Extras  # own rows'
    rounding: torch.dtype | None  # autocast's


class Cut(NamedTuple):
    """A sampler of a block's classes, and what it was made of."""

    tables: Tensor | None  # of all classes; None: Zipf's law
    state: tuple[range, Any]
    sampler: FrequencySampler


class ShardedSampledSoftmaxLoss(SampledSoftmaxLoss):
    """`SampledSoftmaxLoss` with the class matrix cut into blocks of rows, one for each process of a group.

    Every rank calls it with its own part of the batch, of any size, and holds its block alone: of C classes
    ceil(C / world) rows in `weight` and `bias`, the last ranks' fewer or none (`own_classes`). In training
    mode each call's class set is the whole batch's own classes (expected count 1) and in every block its
    share of num_sampled negatives, at least one, with their expected counts: the estimate is that of one
    process with the union of the ranks' class sets. Without torch.distributed, or in a group of one, it is
    `SampledSoftmaxLoss`.

        loss = criterion(net(images), labels)  # net: under DistributedDataParallel or fully_shard; it is not
        loss.backward()

    "mean" and "sum" are those of everybody's rows, the same number on all ranks; "none" gives the rank's own.
    Gradients go by DistributedDataParallel's rule: they are those of the mean over the ranks of the losses
    that backward is called on. So `weight`, `bias` and a learned scale, which all ranks keep equal, have the
    gradient of "mean" or "sum" itself, and `input` has it times the number of ranks, which the averaging of
    the net's gradients takes off again.

    What a rank sends for a step, of B rows in all and embeddings of D numbers, is (world - 1) / world of

        4 or 8 bytes x B x D   embeddings, all-gathered, in their dtype (2 bytes in 16 bits)
        4 or 8 bytes x B x D   their gradients, reduce-scattered in float32 or better
        90 bytes x B           targets, the targets' logits, the parts of the losses, and their gradients

    and 248 bytes of settings, whatever C is. Batches are padded to the largest on the way, and gloo's
    reduce-scatter is an all-reduce, which sends twice as much. It waits for the device for the sizes.

    No rank hangs where another raises in this call: first all hear whether each one's arguments are right
    and their settings alike, and else every rank raises. For a rank that never calls, the others wait for the
    group's timeout.

    state_dict() holds `weight` and `bias` as DTensors, which torch.distributed.checkpoint saves and loads
    into any number of processes, and into `SampledSoftmaxLoss`. So it does an optimiser's state of them after
    `shard_state_of(optimizer)`; else it takes one rank's for all. `state_dict()["weight"].full_tensor()` is
    the whole matrix, and `load_state_dict` cuts one. Class weights and the tables of a sampler's frequencies,
    24 bytes a class, are all classes' on every rank.

    Args:
        num_classes: C, of all ranks together.
        num_sampled: m, negatives for each batch of everybody's rows.
        process_group: None: the default one.
        generator: of this rank. The same seed on all ranks gives each a weight of its own.
        Others: as those of `SampledSoftmaxLoss`.

    An optimiser steps the rank's block: clip by no norm of all gradients (`max_norm`), which would be another
    on each rank, and with float16 take torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler.

    Raises as `SampledSoftmaxLoss` does; on all ranks RuntimeError where another one has raised, and
    ValueError where settings differ between ranks; RuntimeError where DistributedDataParallel or FSDP has
    taken hold of its parameters.

    >>> criterion = ShardedSampledSoftmaxLoss(num_classes=1000, embedding_dim=16, num_sampled=50)
    >>> criterion.own_classes  # in one process
    range(0, 1000)
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        num_sampled: int | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        # before the rows are drawn
        self._of_all_blocks = check_integer("num_classes", num_classes, 1)
        self.ranks = Ranks(process_group)
        own = _block(self._of_all_blocks, self.ranks.world, self.ranks.rank)
        # of all classes
        class_weight, sampler = options.pop("class_weight", None), options.pop("sampler", "uniform")
        super().__init__(len(own) or 1, embedding_dim, num_sampled, **options)
        if class_weight is not None:
            self._hold_class_weight(class_weight, self._of_all_blocks)
        power = options.get("sampler_power", 0.75)
        self.sampler = as_sampler(sampler, power, self._of_all_blocks, options.get("device"))
        self._cut: Cut | None = None
        if not own:
            for name in ("weight", "bias"):
                if (parameter := getattr(self, name)) is not None:
                    setattr(self, name, nn.Parameter(parameter.detach()[:0].clone()))

    @property
    def num_classes(self) -> int:
        """C, the rows of all blocks."""
        return self._of_all_blocks if self.ranks.world > 1 else super().num_classes

    @property
    def own_classes(self) -> range:
        """The classes of this rank's block: class own_classes[i] is row i of `weight`."""
        return _block(self.num_classes, self.ranks.world, self.ranks.rank)

    def _generator_of_rows(self) -> torch.Generator | None:
        generator = super()._generator_of_rows()
        if self.ranks.world == 1 or self.weight.is_meta:
            return generator
        device = None if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
        return torch.Generator(self.weight.device).manual_seed(seed + self.ranks.rank)

    # ---- the loss ------------------------------------------------------------------------------------------

    def forward(
        self,
        input: Tensor,  # (..., D) own rows
        target: Tensor,  # (...,) int64
        *,
        angular_margin: float | Tensor | None = None,  # (...,); None: the module's
        cosine_margin: float | Tensor | None = None,
        entry_labels: Tensor | None = None,  # (len(own_classes),) int64, of the block's classes
        target_labels: Tensor | None = None,  # (...,) int64
    ) -> Any:
        """The loss, or (loss, lse of own rows) with `return_lse`; labels as in `sampled_softmax_loss`."""
        labels = (entry_labels, target_labels)
        if self.ranks.world == 1:
            given: dict[str, Any] = {"angular_margin": angular_margin, "cosine_margin": cosine_margin}
            given |= {"entry_labels": entry_labels, "target_labels": target_labels}
            return super().forward(input, target, **given)
        margins = (
            self.angular_margin if angular_margin is None else angular_margin,
            self.cosine_margin if cosine_margin is None else cosine_margin,
        )
        extras = (*margins, self.label_smoothing, self._class_weight(), self.return_lse)
        step = self._step(input, target, extras, labels)
        with without_autocast(step.rows.device.type):
            return self._loss(step, target)

    def _loss(self, step: Step, target: Tensor) -> Any:
        own = self.ranks.to_own_rows(self._of_block(step), step.sizes, step.wants != 0)
        dtype = torch.float64 if step.rows.dtype == torch.float64 else torch.float32
        losses, logits, sums = combined(own[:, :, 0]), own[:, :, 1].sum(0), own[:, :, 2].sum(0)
        lse, t, extras = losses + logits, target.reshape(-1), step.extras
        counted = t != self.ignore_index
        mean = (logits + sums) / self.num_classes if extras.label_smoothing else None
        of_rows = (losses, lse, mean, t.where(counted, 0), counted)
        loss = reduced_loss(*of_rows, extras, self.reduction, self._sums_of_all).to(dtype)
        loss = loss.reshape(target.shape) if self.reduction == "none" else loss
        return (loss, lse.to(dtype).reshape(target.shape)) if extras.return_lse else loss

    def _step(self, input: Tensor, target: Tensor, given: tuple, labels: tuple) -> Step:
        """Raises on every rank where the arguments of one are wrong."""
        checked, error = None, None
        try:
            checked = self._checked(input, target, given, labels)
        except Exception as raised:
            error = raised
        size, wants, settings, extras = checked or (0, 0, {}, NONE)
        sizes, wants = self.ranks.agree(size, wants, settings, error, self.weight.device)
        learned = self.scale.reshape(()) if isinstance(self.scale, Tensor) else None
        rows, scale = self.ranks.gathered(
            input.reshape(size, input.shape[-1]), learned, sizes, (bool(wants & INPUT), bool(wants & SCALE))
        )
        targets = self.ranks.gather(target.reshape(-1), sizes)
        entry_labels, target_labels = labels
        of_targets = targets - self.own_classes.start
        if settings["labels"] != (False, False):  # the classes' own where none are given
            if entry_labels is None:
                entry_labels = torch.arange(self.own_classes.start, self.own_classes.stop, device=rows.device)
            own = target if target_labels is None else target_labels
            of_targets = self.ranks.gather(own.reshape(-1), sizes)
        margins = [
            self.ranks.gather(m.double(), sizes) if isinstance(m, Tensor) else m for m in extras.margins
        ]
        return Step(
            *(sizes, wants, rows, targets, of_targets, (margins[0], margins[1])),
            *(as_float(self.scale if scale is None else scale), entry_labels, extras),
            autocast_dtype(rows.device.type),
        )

    def _checked(
        self, input: Tensor, target: Tensor, given: tuple, labels: tuple
    ) -> tuple[int, int, dict[str, Any], Extras]:
        """(own rows, what a gradient is wanted of, what all ranks must have alike, ...)"""
        check_tensor("target", target, (torch.int64,))
        check_left_alone(self, self.weight, self.bias)
        check_arguments(input, self.weight, target, None, None, None, self.bias, as_float(self.scale))
        check_choice("similarity", self.similarity, ("cosine", "dot"))
        check_choice("reduction", self.reduction, ("mean", "sum", "none"))
        check_ids("target", target.reshape(-1), self.num_classes, self.ignore_index)
        check_shape("weight", self.weight, (len(self.own_classes), input.shape[-1]), "(own rows, D)")
        check_labels(input, target, (len(self.own_classes), "(own classes,)"), *labels)
        if check_flag("sparse_grad", self.sparse_grad):
            check_takes_sparse(weight=self.weight, bias=self.bias)
        if chosen_backend(self.impl, input.device) == "reference":
            raise ValueError('impl: expected "auto", "cpp" or "triton" for sharded classes, got "reference"')
        every_class = self.weight.new_empty((self.num_classes, 0))
        extras = checked_extras(every_class, target, self.similarity, *given)
        if target.is_cpu:
            check_values(extras, target.reshape(-1), self.ignore_index)
        if self._share() is not None:
            self._sampler_of_block()
        wants, grad = 0, torch.is_grad_enabled()
        if grad:
            classes = [p for p in (self.weight, self.bias) if p is not None]
            wants |= INPUT * input.requires_grad
            wants |= SCALE * (isinstance(self.scale, Tensor) and self.scale.requires_grad)
            wants |= CLASSES * any(p.requires_grad for p in classes)
        settings = {
            "call": "forward",
            "input": input.dtype,
            "torch.is_grad_enabled()": grad,
            "margins": [type(m) if isinstance(m, Tensor) else m for m in extras.margins],
            "label_smoothing": extras.label_smoothing,
            "class_weight": extras.class_weight is not None,
            "return_lse": extras.return_lse,
            "labels": tuple(each is not None for each in labels),
        }
        return target.numel(), wants, settings | self._settings(), extras

    def _settings(self) -> dict[str, Any]:
        """What all ranks must have alike; numbers as Python's, since it is compared as it is written."""
        return {
            "num_classes": self.num_classes,
            "embedding_dim": self.embedding_dim,
            "num_sampled": self._negatives(),
            "training": self.training,
            "scale": "learned" if isinstance(self.scale, Tensor) else as_float(self.scale),
            "similarity": self.similarity,
            "bias": self.bias is not None,
            "reduction": self.reduction,
            "ignore_index": check_ignore_index(self.ignore_index),
        }

    def _of_block(self, step: Step) -> Tensor:
        """(B, 3) of everybody's rows: losses beside this block, own targets' logits, sums of logits."""
        rows, rounding = widened_rows(step.rows, self.weight, step.rounding)
        counted = step.target != self.ignore_index
        local = step.target - self.own_classes.start
        is_own = counted & (local >= 0) & (local < len(self.own_classes))
        class_ids, counts = self._class_set(local.where(is_own, -1)) if self.own_classes else (None, None)
        listed = None if class_ids is None else len(class_ids) + len(rows)
        weight, bias = class_tables(self.weight, self.bias, bool(self.sparse_grad), listed)
        shared = (bias, step.scale, self.similarity)
        mine = self._logits_of_own_classes(step, weight, bias, rows, local, is_own, rounding)
        logits = self.ranks.summed(mine, step.wants != 0)
        nothing = torch.zeros_like(logits)
        if not self.own_classes:
            return torch.stack([logits.where(nothing > 0, 0.0), mine, nothing], 1)
        entries = step.entry_labels
        if entries is not None and class_ids is not None:
            entries = entries[class_ids]
        labels = step.labels.where(counted, _IGNORED)
        impl = chosen_backend(self.impl, rows.device)
        losses = row_losses(
            *(rows, weight, labels, (class_ids, counts, None), *shared),
            *(_IGNORED, impl, rounding, (entries, None, logits)),
        )
        sums = nothing
        if step.extras.label_smoothing and len(rows):
            sums = len(self.own_classes) * mean_logits(
                *(rows, weight, nothing, class_ids, counts, *shared),
                *(entries, labels, counted, rounding),
            )
        return torch.stack([losses.to(mine.dtype), mine, sums.to(mine.dtype)], 1)

    def _logits_of_own_classes(
        self,
        step: Step,
        weight: ClassTable,
        bias: ClassTable | None,
        rows: Tensor,
        local: Tensor,
        is_own: Tensor,
        rounding: torch.dtype | None,
    ) -> Tensor:
        """(B,) float64: the targets' logits of rows whose class is this rank's, 0 of others."""
        # Reaches every tensor whose gradient other ranks wait for, and adds 0.
        reached = [t.reshape(-1)[:0].sum() for t in (rows, step.scale) if isinstance(t, Tensor)]
        logits = rows.new_zeros(len(rows), dtype=torch.float64) + torch.stack(reached).sum()
        own = is_own.nonzero().flatten()
        if not len(own):
            return logits
        angular, cosine = (m[own] if isinstance(m, Tensor) else m for m in step.margins)
        found = target_logits(
            *(rows[own], weight, local[own], torch.ones_like(own, dtype=torch.bool), None, bias),
            *(step.scale, self.similarity, (angular, cosine), rounding),
        )
        return logits.index_add(0, own, found)

    def _class_set(self, held: Tensor) -> tuple[Tensor | None, Tensor | None]:
        share = self._share()
        if share is None:
            return None, None
        sampler = self._sampler_of_block()
        return draw_batch_class_set(held, len(self.own_classes), share, self.generator, -1, sampler)

    def _share(self) -> int | None:
        """Negatives among this block's classes; None: all of them."""
        C, own = self.num_classes, self.own_classes
        m = self._negatives() if self.training else None
        if m is None or m >= C:
            return None
        share = max(m * own.stop // C - m * own.start // C, min(m, 1))
        return share if share < len(own) else None

    def _sampler_of_block(self) -> str | FrequencySampler:
        """What draws among the block's classes as `sampler` does among all, made when that has changed."""
        given, own = self.sampler, self.own_classes
        check_sampler(given, self.num_classes)
        if given == "uniform":
            return "uniform"
        tables: Tensor | None = None
        state: tuple[range, Any] = own, self.weight.device
        if isinstance(given, FrequencySampler):
            tables, state = given.ways, (own, given._versions())
        if self._cut is None or self._cut.tables is not tables or self._cut.state != state:
            made = given.of_classes(own) if isinstance(given, FrequencySampler) else self._zipf_of(own)
            self._cut = Cut(tables, state, made)
        return self._cut.sampler

    def _zipf_of(self, own: range) -> FrequencySampler:
        ids = torch.arange(own.start, own.stop, dtype=torch.float64, device="cpu")
        return FrequencySampler(torch.log1p(1 / (ids + 1)), 1.0, device=self.weight.device)

    def _sums_of_all(self, losses: Tensor, shares: Tensor) -> Sequence[Tensor]:
        return self.ranks.total(torch.stack([losses.sum(), shares.sum()])).unbind()

    # ---- prediction ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def topk(
        self,
        input: Tensor,  # (..., D) own rows
        k: int,
        block_size: int = 16384,
    ) -> TopK:
        """As that of `SampledSoftmaxLoss`, over the classes of all ranks, each of which calls it.

        Sends the rows to every rank, and the k best of each block back.
        """
        if self.ranks.world == 1:
            return super().topk(input, k, block_size)
        rows, settings, error = None, {}, None
        try:
            k, block_size, _ = self._check_topk(input, k, block_size)
            check_left_alone(self, self.weight, self.bias)
            rows = input.detach().reshape(input.shape[:-1].numel(), input.shape[-1])
            settings = {"call": "topk", "input": rows.dtype, "k": k} | self._settings()
        except Exception as raised:
            error = raised
        sizes, _ = self.ranks.agree(0 if rows is None else len(rows), 0, settings, error, self.weight.device)
        assert rows is not None
        best = self._best_of_block(self.ranks.gather(rows, sizes), k, block_size)
        found = self._merged(best, sizes, k)
        shape = (*input.shape[:-1], k)
        return TopK(found.values.reshape(shape), found.indices.reshape(shape))

    def _best_of_block(self, rows: Tensor, k: int, block_size: int) -> TopK:
        """(B, k) of this rank's block, the last columns empty where it has fewer rows."""
        here = min(k, len(self.own_classes))
        dtype = torch.promote_types(torch.promote_types(rows.dtype, self.weight.dtype), torch.float32)
        values = rows.new_zeros((len(rows), k), dtype=dtype)
        indices = torch.zeros_like(values, dtype=torch.int64)
        if here:
            best = super().topk(rows, here, block_size)
            values[:, :here], indices[:, :here] = best.values, best.indices + self.own_classes.start
        return TopK(values, indices)

    def _merged(self, best: TopK, sizes: list[int], k: int) -> TopK:
        """The k best of every block for everybody's rows -> those of all blocks for own rows."""
        own, world = sizes[self.ranks.rank], self.ranks.world
        there = torch.arange(world * k, device=best.values.device).reshape(world, k)
        filled = torch.cat([there[r, : len(_block(self.num_classes, world, r))] for r in range(world)])
        values, indices = (
            self.ranks.exchange(columns, sizes, [own] * world).reshape(world, own, k).transpose(0, 1)
            for columns in best
        )
        values, indices = values.flatten(1)[:, filled], indices.flatten(1)[:, filled]
        values, order = values.topk(k)
        return TopK(values, indices.gather(1, order))

    # ---- state ---------------------------------------------------------------------------------------------

    def as_shard(self, own: Tensor) -> Tensor:
        """A tensor (own rows, ...) as this rank's part of a DTensor (C, ...), which shares its memory."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        if self.ranks.world == 1:
            return own
        group = self.ranks.group or dist.group.WORLD
        assert group is not None
        mesh = DeviceMesh.from_group(group, own.device.type)
        whole = own.new_empty((self.num_classes, *own.shape[1:]), device="meta")
        return DTensor.from_local(
            own, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def shard_state_of(self, optimizer: torch.optim.Optimizer) -> None:
        """From here on the optimiser's state of `weight` and `bias` is saved and loaded as these are.

        Of any torch.optim.Optimizer, before its state is saved or loaded: what there is of each row, averages
        and counts, is a DTensor in its state_dict(); load_state_dict takes such and tensors of all classes.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")

        def own_part(of_all: Tensor) -> Tensor:
            return self._own_part("state", of_all) if len(of_all) == self.num_classes else of_all

        if self.ranks.world > 1:
            follow_shards(optimizer, lambda: (self.weight, self.bias), self.as_shard, own_part)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key in (f"{prefix}weight", f"{prefix}bias"):
            if key in destination:
                destination[key] = self.as_shard(destination[key])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Takes shards, and cuts whole matrices."""
        for name in ("weight", "bias"):
            key = prefix + name
            if self.ranks.world > 1 and isinstance(state_dict.get(key), Tensor):
                state_dict[key] = self._own_part(name, state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _own_part(self, name: str, whole: Tensor) -> Tensor:
        if len(whole) != self.num_classes:
            raise ValueError(
                f"{name}: expected {self.num_classes} rows, those of all ranks, got {len(whole)}"
            )
        if hasattr(whole, "to_local"):
            return whole.to_local()
        return whole[self.own_classes.start : self.own_classes.stop]

    def extra_repr(self) -> str:
        blocks = f", rows of rank {self.ranks.rank} of {self.ranks.world}: {self.own_classes}"
        return super().extra_repr() + (blocks if self.ranks.world > 1 else "")


_IGNORED = -(2**63)


def _block(C: int, world: int, rank: int) -> range:
    """The classes of a rank: as many as others have but for the last ranks, as torch cuts a DTensor."""
    size = -(-C // world)
    return range(min(rank * size, C), min((rank + 1) * size, C))


def combined(losses: Tensor) -> Tensor:
    """(world, n) losses of one target beside parts of the others -> (n,): log(1 + sum_r (exp(L_r) - 1)).

    As m + log(exp(-m) + sum_r (1 - exp(-L_r)) exp(L_r - m)), m their maximum: right for L_r of any size.
    """
    m = losses.detach().amax(0)
    others = (-torch.expm1(-losses) * torch.exp(losses - m)).sum(0)
    return m + torch.log1p(torch.expm1(-m) + others)
