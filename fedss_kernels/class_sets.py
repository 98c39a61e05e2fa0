"""Class sets: which rows of the class matrix a loss sees, and how often each was expected to be there.

The denominator of the full softmax is a sum over C classes. A class set estimates it from S of them: the
positives P, always present (expected count 1), and negatives N drawn uniformly from the others (expected
count |N| / (C - |P|)). Subtracting log_expected_count from each logit makes the expected denominator the full
one.
"""

import copy
import itertools
import math
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .checks import check_choice, check_ignore_index, check_integer, check_tensor


@dataclass(frozen=True)
class ClassSet:
    """The classes S = P u N a federated client asks for, in an order that says nothing of which is which."""

    class_ids: Tensor  # (S,) int64, ascending
    is_negative: Tensor  # (S,) bool: True on N
    log_expected_count: Tensor  # (S,) float64: 0 on P, log(|N| / (C - |P|)) on N


def draw_negatives(
    num_classes: int,
    positives: Tensor,  # (P,) int64, unique
    num_negatives: int,
    rng: np.random.Generator,
) -> Tensor:
    """min(m, C - |P|) classes outside `positives`, uniform without replacement, ascending, in O(m + |P|).

    Draws ranks among the C - |P| classes that are not held; the r-th of these is r + #{i : P_i - i <= r}, P
    ascending, as P_i - i of them lie below P_i. Raises ValueError if a positive is repeated or outside [0,
    C), RuntimeError in the backward pass, as `draw_batch_class_set` does.

    >>> draw_negatives(5, torch.tensor([1, 3]), 10, np.random.default_rng(0))
    tensor([0, 2, 4])
    """
    num_classes = check_integer("num_classes", num_classes, 0)
    num_negatives = check_integer("num_negatives", num_negatives, 0)
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng: expected a numpy.random.Generator, got {type(rng).__name__}")
    _refuse_in_backward("rng", "draw before")
    held = _sorted_positives(num_classes, positives)
    others = num_classes - len(held)
    m = min(num_negatives, others)
    ranks = np.arange(others) if m == others else np.sort(rng.choice(others, m, replace=False, shuffle=False))
    negatives = ranks + np.searchsorted(held - np.arange(len(held)), ranks, side="right")
    return torch.from_numpy(negatives.astype(np.int64, copy=False))


def draw_class_set(
    num_classes: int,
    positives: Tensor,  # (P,) int64, unique
    num_negatives: int,
    rng: np.random.Generator,
    correction: str = "negatives",
) -> ClassSet:
    """The class set of one client in one round: its positives and min(m, C - |P|) fresh negatives.

    `correction="negatives"` subtracts log(|N| / (C - |P|)) from each negative's logit; `"none"` is the
    reading in which one constant stands on every member, the target included, and cancels. Raises as
    `draw_negatives` does.
    """
    check_correction(correction)
    num_classes = check_integer("num_classes", num_classes, 0)
    negatives = draw_negatives(num_classes, positives, num_negatives, rng)
    return class_set_of(num_classes, positives, negatives, correction)


def class_set_of(
    num_classes: int,
    positives: Tensor,  # (P,) int64, unique
    negatives: Tensor,  # (m,) int64, unique, each with the same chance to be drawn
    correction: str = "negatives",
) -> ClassSet:
    """The class set of positives and negatives that are drawn already."""
    check_correction(correction)
    m, others = len(negatives), num_classes - len(positives)
    class_ids, order = torch.cat([positives, negatives]).sort()
    is_negative = order >= len(positives)
    log_count = math.log(m / others) if m and correction == "negatives" else 0.0
    log_expected_count = torch.zeros(len(class_ids), dtype=torch.float64, device="cpu").masked_fill_(
        is_negative, log_count
    )
    return ClassSet(class_ids, is_negative, log_expected_count)


def check_correction(correction: str) -> None:
    check_choice("correction", correction, ("negatives", "none"))


def draw_batch_class_set(
    target: Tensor,  # (B,) int64
    num_classes: int,
    num_sampled: int,
    generator: "torch.Generator | GeneratorHandle | None" = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """(class_ids (B + m,), log_expected_count (B + m,) float32): a batch's own classes, m uniform negatives.

    For centralised training: no size depends on the data and nothing is read back to the host, so it compiles
    and never stalls a GPU. A repeated or ignored target stays as a placeholder whose log_expected_count is
    +inf: the loss leaves it out. The negatives are a stratified sample: the C - |P| other classes are cut
    into m equal strata and one class is drawn from each, so every class has expected count m / (C - |P|)
    exactly, few are drawn twice, and m = C - |P| draws each once. O((B + m) log B).

    A torch.Generator cannot be traced by torch.compile; a GeneratorHandle of it can. With either, to run in
    the backward pass is refused (RuntimeError): what torch.utils.checkpoint runs again would draw others, as
    it restores the state of torch's default generators only. Raises TypeError and ValueError for a target
    that is no (B,) int64 tensor, num_classes < 1, num_sampled < 0 or an ignore_index that is no integer.
    """
    check_tensor("target", target, (torch.int64,))
    if target.dim() != 1:
        raise ValueError(f"target: expected shape (B,), got {tuple(target.shape)}")
    num_classes = check_integer("num_classes", num_classes, 1)
    num_sampled = check_integer("num_sampled", num_sampled, 0)
    if num_classes * num_sampled > 2**62 or num_classes > 2**62:
        raise ValueError(
            "num_classes: expected at most 2**62, and num_classes * num_sampled too, as 64-bit integers are "
            f"drawn, got {num_classes} and num_sampled {num_sampled}"
        )
    ignore_index = check_ignore_index(ignore_index)
    B = target.shape[0]
    ignored = num_classes  # a rank past every class, so that ignored rows sort last
    held = torch.where(target == ignore_index, ignored, target).sort().values
    # No tensor of size B - 1, which for B = 2 would be 1: traced code takes that for a case of its own.
    first = held != torch.cat([held.new_full((1,), -1), held])[:-1]
    positive = first & (held != ignored)
    others = num_classes - positive.sum()

    # rank = floor((i * others + v) / m), v uniform in [0, others): of the m * others equally likely (i, v),
    # exactly m give each rank.
    if isinstance(generator, GeneratorHandle):
        uniform = torch.ops.fedss_kernels.random_integers(generator.draws, target, num_sampled, generator.key)
    else:
        check_generator(generator)
        if generator is not None:
            _refuse_in_backward("generator", "take generator=None")
        uniform = torch.randint(2**62, (num_sampled,), device=target.device, generator=generator)
    stratum = torch.arange(num_sampled, device=target.device)
    rank = (stratum * others + uniform % others.clamp(min=1)) // max(num_sampled, 1)
    # The r-th class outside P is r + #{i : P_i - i <= r}; what is not a first occurrence must count for
    # nothing.
    below = torch.where(positive, held - (positive.cumsum(0) - 1), torch.iinfo(torch.int64).max).sort().values
    negatives = rank + torch.searchsorted(below, rank, right=True)

    # +inf when there is no other class: then all draws are left out.
    log_count = torch.log(num_sampled / others.to(torch.float32))
    class_ids = torch.cat([torch.where(positive, held, 0), negatives.clamp(max=num_classes - 1)])
    log_expected_count = torch.cat(
        [torch.where(positive, 0.0, torch.inf).to(torch.float32), log_count.expand(num_sampled)]
    )
    assert class_ids.shape[0] == B + num_sampled
    return class_ids, log_expected_count


class GeneratorHandle:
    """A torch.Generator that compiled code can draw from: known to an operator by a number.

    Copies and unpickled handles have generators of their own, in the state of the original's. To go on after
    a pause as if there had been none, save `get_state()`, and give it to `set_state` later. Raises TypeError
    for what is no torch.Generator.
    """

    def __init__(self, generator: torch.Generator) -> None:
        check_generator(generator)
        self.generator = generator
        with torch.inference_mode(False):  # what is made in it could not be counted up outside
            self.draws = torch.zeros((), dtype=torch.int64, device="cpu")  # so far
        self.key = next(_keys)
        _generators[self.key] = generator

    def get_state(self) -> Tensor:
        """The generator's state, a uint8 tensor on the CPU."""
        return self.generator.get_state()

    def set_state(self, state: Tensor) -> None:
        """Sets the generator to a state that `get_state` gave."""
        self.generator.set_state(state)

    def __reduce__(self):
        return GeneratorHandle, (self.generator,)

    def __deepcopy__(self, memo: dict) -> "GeneratorHandle":
        return GeneratorHandle(copy.deepcopy(self.generator, memo))


def check_generator(generator: object) -> None:
    """Raises TypeError unless it is a torch.Generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")


_keys = itertools.count()
_generators: "weakref.WeakValueDictionary[int, torch.Generator]" = weakref.WeakValueDictionary()
_library = torch.library.Library("fedss_kernels", "FRAGMENT")
# That each draw changes `draws` keeps compilers from taking two draws for one; the tag alone does not.
_library.define(
    "random_integers(Tensor(a!) draws, Tensor like, int size, int generator) -> Tensor",
    tags=[torch.Tag.nondeterministic_seeded],
)


def _random_integers(draws: Tensor, like: Tensor, size: int, generator: int) -> Tensor:
    """(size,) uniform in [0, 2^62), on like's device, from the generator of that number."""
    _refuse_in_backward("generator", "take generator=None")
    draws += 1
    return torch.randint(2**62, (size,), device=like.device, generator=_generators[generator])


def _refuse_in_backward(name: str, instead: str) -> None:
    """What runs there is run again, by torch.utils.checkpoint, and should draw what it drew before."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{name}: expected a class set to be drawn in the forward pass, not in the backward pass, in "
            "which torch.utils.checkpoint would draw another one: it restores torch's default generators "
            "only. Leave the loss out of what is checkpointed (it keeps no logits) and of hooks on "
            f"gradients, or {instead}"
        )


_library.impl("random_integers", _random_integers, "CompositeExplicitAutograd")


@torch.library.register_fake("fedss_kernels::random_integers", lib=_library)
def _random_integers_fake(draws: Tensor, like: Tensor, size: int, generator: int) -> Tensor:
    return like.new_empty((size,), dtype=torch.int64)


def _sorted_positives(num_classes: int, positives: Tensor) -> np.ndarray:
    check_tensor("positives", positives, (torch.int64,))
    if positives.dim() != 1:
        raise ValueError(f"positives: expected shape (P,), got {tuple(positives.shape)}")
    held = np.sort(positives.numpy())
    if len(held) and not (0 <= held[0] and held[-1] < num_classes):
        bad = held[0] if held[0] < 0 else held[-1]
        raise ValueError(f"positives: expected classes in [0, {num_classes}), got {bad}")
    if len(held) > 1 and (held[1:] == held[:-1]).any():
        raise ValueError(
            f"positives: expected each class once, got {held[1:][held[1:] == held[:-1]][0]} twice"
        )
    return held
