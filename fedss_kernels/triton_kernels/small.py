"""The loss of a small problem, a client's say: two launches each way. Equations: forward.py, backward.py."""

from collections.abc import Sequence
from typing import Any

import torch
import triton

from . import backward, forward
from .backward import Parts, Results
from .calls import KEPT, LOSS, Calls, Outputs, Wanted
from .configurations import Configuration, table_of
from .launch import TORCH_TYPES, TYPES, variant
from .plan import FACTOR, Given, Plan
from .problem import Problem
from .tiles import Stacked, sums_of


class SmallCalls(Calls):
    spreads = True

    def __init__(
        self,
        p: Problem,
        configuration: Configuration,
        problems: Sequence[int] = (),
        steps: Sequence[int] = (),
    ):
        """p: the problem, or the first of as many of one size, which take one launch of each kernel.

        steps: elements from one's tensor to the next one's.
        """
        super().__init__(p, problems)
        self.configuration = configuration
        if problems:
            matrices = zip(self.matrices, steps, strict=False)
            self.matrices = tuple(matrix._replace(step=step) for matrix, step in matrices)
            vectors = zip(self.vectors._asdict().items(), steps[2:], strict=False)
            own = {name: Stacked(vector, step) for (name, vector), step in vectors if vector is not None}
            self.vectors = self.vectors._replace(**own)
        traits, table = p.traits, table_of(p.input.device)
        rows, classes, columns, warps, stages = configuration.blocks
        operand = TYPES[traits.operand]
        self.accumulator, self.exact = TYPES[traits.accumulator], sums_of(operand, traits.precision)
        self.constants = {"COSINE": traits.cosine, "PER_ROW": traits.reduction == "none", "OPERAND": operand}
        self.constants |= {"enable_fp_fusion": True, **table.all_registers}
        self.multiplying = self.constants | {"PRECISION": traits.precision, **table.products}
        self.multiplying |= {"BLOCK_B": rows, "BLOCK_S": classes, "BLOCK_D": columns}
        self.multiplying |= {"BLOCK_PAIRED": max(32 * warps * table.paired // rows, 16)}
        self.multiplying |= {"num_warps": warps, "num_stages": stages}

    def plan_loss(self, given_so: Any) -> Plan:
        (B, C, S, _), c, v, reduction = self.sizes, self.configuration, self.vectors, self.traits.reduction
        plan, kept = Plan(self.device), Given(KEPT)
        partials = plan.empty(*self.leading, 2, c.splits, B, dtype=self.traits.accumulator)
        plan.launch(
            variant(forward.partial_terms, **self.multiplying),
            (c.splits + 1, 1, *self.leading),
            *(*self.matrices, v.target, v.class_ids, v.counts, v.bias, v.learned),
            *(v.entry_labels, v.target_labels, partials, kept),
            *(B, C, S, self.ignore_index, FACTOR),
        )
        merging = self.constants | {"ACC": self.accumulator, "REDUCTION": reduction}
        merging |= {
            "STACKED": bool(self.leading),
            "BLOCK_B": c.merged_rows,
            "BLOCK_SPLITS": c.merged_splits,
            "num_warps": c.merge_warps,
        }
        plan.launch(
            variant(forward.merge_splits, **merging),
            (max(triton.cdiv(B, c.merged_rows), 1) if reduction == "none" else 1, 1, *self.leading),
            *(v.target, v.target_counts, v.bias, v.learned, v.target_logit),
            *(partials, kept, Given(LOSS)),
            *(B, C, c.splits, self.ignore_index, 0, B, FACTOR),
        )
        return plan

    def plan_gradients(self, wanted: Wanted, to: Outputs, given_so: Any) -> Plan:
        plan, (B, C, S, D), c, v = Plan(self.device), self.sizes, self.configuration, self.vectors
        tiles, entries = triton.cdiv(S, c.blocks.classes), self.entries
        upstream, kept = Given(LOSS), Given(KEPT)

        def part(is_wanted: bool, *shape: int, dtype: torch.dtype = self.traits.accumulator) -> Any:
            return plan.empty(*self.leading, *shape, dtype=dtype) if is_wanted else None

        parts = Parts(
            to.rows or part(wanted.needed[1], entries, D),
            to.row_bias or part(wanted.needed[2], entries),
            part(wanted.needed[0], tiles, B, D),
            part(wanted.needed[0] and self.cosine, tiles, c.column_groups, B, dtype=TORCH_TYPES[self.exact]),
            part(wanted.needed[3], tiles, dtype=torch.float64),
        )
        plan.launch(
            variant(backward.small_tiles, **self.multiplying),
            (tiles + self.targets_apart, c.column_groups, *self.leading),
            *(*self.matrices, v.target, v.class_ids, v.counts, v.bias, v.learned),
            *(v.entry_labels, v.target_labels, upstream, kept, parts),
            *(B, C, S, self.ignore_index, FACTOR),
        )
        spread = 0 if to.weight is None and to.bias is None and to.ids is None else entries
        adding = self.constants | {
            "ACC": self.exact,
            "BLOCK_D": c.result_columns,
            "num_warps": c.result_warps,
        }
        adding |= {"BLOCK_TILES": c.result_tiles, "BLOCK_ENTRIES": c.result_entries}
        plan.launch(
            variant(backward.small_results, **adding),
            (B + 1 + spread, triton.cdiv(max(D, 1), c.result_columns), *self.leading),
            *(*self.matrices, v.target, v.class_ids, v.counts, v.learned, upstream, kept, parts),
            *(Results(to.input, to.weight, to.bias, to.scale, to.ids), B, C, S),
            *(self.ignore_index, tiles, c.column_groups, FACTOR),
        )
        return plan
