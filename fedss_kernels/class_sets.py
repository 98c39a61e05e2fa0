"""Class sets: which rows of the class matrix a loss sees, and how often each was expected to be there.

The denominator of the full softmax is a sum over C classes. A class set estimates it from S of them: the
positives P, always present (expected count 1), and negatives N drawn uniformly from the others (expected
count |N| / (C - |P|)). Subtracting log_expected_count from each logit makes the expected denominator the full
one.
"""

import copy
import itertools
import math
import reprlib
import weakref
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack

from .checks import check_choice, check_ids, check_ignore_index, check_integer, check_tensor
from .class_samplers import UNIFORM, FrequencySampler, draw_log_uniform
from .direct_route import holds_numbers, unobserved
from .operator_names import named_by_schema


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
    sampler: str | FrequencySampler = "uniform",
) -> tuple[Tensor, Tensor]:
    """(class_ids (B + m,), log_expected_count (B + m,) float32): a batch's own classes, m negatives.

    For centralised training: no size depends on the data and nothing is read back to the host, so it compiles
    and never stalls a GPU. A repeated or ignored target stays as a placeholder whose log_expected_count is
    +inf: the loss leaves it out. Every other class of the batch is there once, so its expected count is 1.

    sampler:
        "uniform"      a stratified sample: the C - |P| other classes are cut into m equal strata and one
                       class is drawn from each, so every class has expected count m / (C - |P|) exactly,
                       few are drawn twice, and m = C - |P| draws each once. O((B + m) log B)
        "log_uniform"  with replacement from all classes by Zipf's law, for ids in order of falling frequency;
                       see `draw_log_uniform`
        a FrequencySampler   with replacement from all classes by their frequencies

    With replacement class j has expected count m q_j exactly; a draw of one of the batch's own classes, which
    are there already, is left out by +inf. So the denominator is on average the full one with every sampler.

    A torch.Generator cannot be traced by torch.compile; a GeneratorHandle of it can, and only with one may
    num_sampled differ from call to call of what is compiled. With either, to run in the backward pass is
    refused (RuntimeError): what torch.utils.checkpoint runs again would draw others, as it restores the state
    of torch's default generators only. Raises TypeError and ValueError for a target that is no (B,) int64
    tensor, num_classes < 1, num_sampled < 0, an ignore_index that is no integer, an unknown sampler or one of
    another number of classes; on the CPU IndexError for a target that is no class.
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
    check_sampler(sampler, num_classes)
    ignore_index = check_ignore_index(ignore_index)
    ignored = num_classes  # a rank past every class, so that ignored rows sort last
    held = torch.where(target == ignore_index, ignored, target).sort().values
    if type(target) is Tensor and target.is_cpu and holds_numbers() and not _are_classes(held, num_classes):
        check_ids("target", target, num_classes, ignore_index)  # before anything is drawn
    # No tensor of size B - 1, which for B = 2 would be 1: traced code takes that for a case of its own.
    first = held != torch.cat([held.new_full((1,), -1), held])[:-1]
    positive = first & (held != ignored)
    uniform = _uniform(target, num_sampled, generator)
    if sampler == "uniform":
        negatives, log_count = _stratified(uniform, held, positive, num_classes)
    else:
        negatives, log_count = _with_replacement(uniform, held, num_classes, sampler)
    class_ids = torch.cat([torch.where(positive, held, 0), negatives])
    log_expected_count = torch.cat([torch.where(positive, 0.0, torch.inf).to(torch.float32), log_count])
    assert class_ids.shape[0] == target.shape[0] + num_sampled
    return class_ids, log_expected_count


def _are_classes(held: Tensor, C: int) -> bool:
    """Whether numbers in ascending order surely are: the first and the last, which takes no time."""
    if is_functorch_wrapped_tensor(held):
        return False
    ends = held.numpy()
    return len(ends) == 0 or bool(0 <= ends[0] and ends[-1] < C)


def check_sampler(sampler: object, num_classes: int) -> None:
    """Raises ValueError unless it is a known name or a FrequencySampler of so many classes."""
    if not isinstance(sampler, (str, FrequencySampler)):
        raise ValueError(
            f'sampler: expected "uniform" or "log_uniform", got {reprlib.repr(sampler)}; frequencies are '
            "given as FrequencySampler(torch.as_tensor(frequencies))"
        )
    if isinstance(sampler, str):
        check_choice("sampler", sampler, ("uniform", "log_uniform"))
    elif sampler.kept.shape[0] != num_classes:
        raise ValueError(
            f"sampler: expected frequencies of {num_classes} classes, got {sampler.kept.shape[0]}; for "
            "classes that were added assign a new one, FrequencySampler(frequencies)"
        )


def _uniform(
    target: Tensor,  # (B,) on the device that is wanted
    num_sampled: int,
    generator: "torch.Generator | GeneratorHandle | None",
) -> Tensor:  # (m,) int64 in [0, UNIFORM)
    if isinstance(generator, GeneratorHandle):
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "generator: expected None in torch.export, got a generator, which no saved program holds; "
                "export the module in eval mode, or with criterion.generator = None"
            )
        if not unobserved() or peek_interpreter_stack() is None:
            return _random_integers(generator.draws, target, num_sampled, generator.key)
        generator = generator.generator  # torch.vmap's randomness is for torch's own operators
    check_generator(generator)
    if generator is not None:
        _refuse_in_backward("generator", "take generator=None")
    return torch.randint(UNIFORM, (num_sampled,), device=target.device, generator=generator)


def _stratified(
    uniform: Tensor,  # (m,) int64 in [0, UNIFORM)
    held: Tensor,  # (B,) int64, ascending
    positive: Tensor,  # (B,) bool: where a class of P stands for the first time
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """(negatives (m,), log_expected_count (m,) float32), one from each of m strata of the other classes."""
    m = uniform.shape[0]
    others = num_classes - positive.sum()
    # rank = floor((i * others + v) / m), v uniform in [0, others): of the m * others equally likely (i, v),
    # exactly m give each rank.
    stratum = torch.arange(m, device=uniform.device)
    rank = (stratum * others + uniform % others.clamp(min=1)) // max(m, 1)
    # The r-th class outside P is r + #{i : P_i - i <= r}; what is not a first occurrence must count for
    # nothing.
    below = torch.where(positive, held - (positive.cumsum(0) - 1), torch.iinfo(torch.int64).max).sort().values
    negatives = rank + torch.searchsorted(below, rank, right=True)
    # +inf when there is no other class: then all draws are left out.
    log_count = torch.log(m / others.to(torch.float32))
    return negatives.clamp(max=num_classes - 1), log_count.expand(m)


def _with_replacement(
    uniform: Tensor,  # (m,) int64 in [0, UNIFORM)
    held: Tensor,  # (B,) int64, ascending
    num_classes: int,
    sampler: str | FrequencySampler,
) -> tuple[Tensor, Tensor]:
    """(negatives (m,), log_expected_count (m,) float32: log(m q_j), +inf for those that are held)."""
    if isinstance(sampler, FrequencySampler):
        negatives, log_probability = sampler.draw(uniform)
    else:
        negatives, log_probability = draw_log_uniform(uniform, num_classes)
    log_count = log_probability + math.log(max(uniform.shape[0], 1))
    is_held = torch.searchsorted(held, negatives, right=True) > torch.searchsorted(held, negatives)
    return negatives, torch.where(is_held, torch.inf, log_count).to(torch.float32)


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


def _generator(device: torch.device, state: bytes) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator


# To another process, in a module say, torch would hand a tensor of the state by memory that is gone by then.
ForkingPickler.register(
    torch.Generator, lambda given: (_generator, (given.device, given.get_state().numpy().tobytes()))
)


def check_generator(generator: object) -> None:
    """Raises TypeError unless it is a torch.Generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")


_keys = itertools.count()
_generators: "weakref.WeakValueDictionary[int, torch.Generator]" = weakref.WeakValueDictionary()
_library = torch.library.Library("fedss_kernels", "FRAGMENT")
# That each draw changes `draws` keeps compilers from taking two draws for one; the tag alone does not.
_RANDOM_INTEGERS, _schema = named_by_schema(
    "random_integers(Tensor(a!) draws, Tensor like, int size, int generator) -> Tensor"
)
_library.define(_schema, tags=[torch.Tag.nondeterministic_seeded])
_random_integers = getattr(torch.ops.fedss_kernels, _RANDOM_INTEGERS)


def _draw_integers(draws: Tensor, like: Tensor, size: int, generator: int) -> Tensor:
    """(size,) uniform in [0, UNIFORM), on like's device, from the generator of that number."""
    _refuse_in_backward("generator", "take generator=None")
    draws += 1
    return torch.randint(UNIFORM, (size,), device=like.device, generator=_generators[generator])


def _refuse_in_backward(name: str, instead: str) -> None:
    """What runs there is run again, by torch.utils.checkpoint, and should draw what it drew before."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{name}: expected a class set to be drawn in the forward pass, not in the backward pass, in "
            "which torch.utils.checkpoint would draw another one: it restores torch's default generators "
            "only. Leave the loss out of what is checkpointed (it keeps no logits) and of hooks on "
            f"gradients, or {instead}"
        )


_library.impl(_RANDOM_INTEGERS, _draw_integers, "CompositeExplicitAutograd")


@torch.library.register_fake(f"fedss_kernels::{_RANDOM_INTEGERS}", lib=_library)
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
