"""The sampled-softmax loss as a module: a classifier's last layer, which owns the class matrix."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checks import (
    FLOATING,
    as_number,
    check_choice,
    check_device,
    check_dtype,
    check_flag,
    check_ignore_index,
    check_integer,
    check_shape,
    check_tensor,
)
from .class_samplers import FrequencySampler, check_frequencies
from .class_sets import GeneratorHandle, check_generator, check_sampler, draw_batch_class_set
from .data_parallel import SparseRows, asked_by_ddp, check_sparse_communication, check_whole
from .direct_route import holds_numbers
from .loss_extras import check_class_weights, check_margin, check_smoothing, check_values, checked_extras
from .loss_operator import without_autocast
from .sampled_softmax import IMPLS, as_float, check_arguments, check_labels, check_scale, sampled_softmax_loss

_SHORT = 2.0**-32  # a power of two: it rounds nothing


class TopK(NamedTuple):
    """The k best classes of each row, best first."""

    values: Tensor  # (..., k) logits, float32 or float64
    indices: Tensor  # (..., k) int64 classes


class SampledSoftmaxLoss(nn.Module):
    """A classifier's last layer and its loss: trains on sampled classes, evaluates on all of them.

    In training mode each call's class set is the batch's own classes (expected count 1) and `num_sampled`
    negatives, by default uniform ones among the others (expected count num_sampled / others); see
    `draw_batch_class_set`. In eval mode, and for `num_sampled=None` or >= num_classes, it is the full
    softmax. No host synchronisation; compiles fullgraph.

    The sizes are the weight's: to assign `criterion.weight` a parameter of more rows (and `criterion.bias`
    one as long) adds classes.

    Args:
        num_classes: C.
        embedding_dim: D.
        num_sampled: m, negatives for each batch.
        sampler: how they are drawn: "uniform"; "log_uniform" by Zipf's law, for classes in order of falling
            frequency; or a (C,) tensor of the classes' frequencies, by their `sampler_power`-th power (see
            `FrequencySampler`, whose tables then are buffers).
        sampler_power: of the frequencies; word2vec's 0.75 lies between 1, as they are, and 0, all alike.
        scale: multiplies the cosine; with `learn_scale=True` the initial value of a parameter of shape (1,).
        similarity: "cosine" or "dot".
        bias: one learned number for each class, initially zero.
        angular_margin, cosine_margin, label_smoothing, class_weight, return_lse: as `sampled_softmax_loss`
            has them, in training and in eval mode. Margins of each row's own go to the call. class_weight is
            a buffer.
        sparse_grad: the gradients of weight and bias as sparse COO tensors over the classes that take part
            (`weight.grad.coalesce()` has `.indices()` and `.values()`; see `sampled_softmax_loss`).
            Under DistributedDataParallel it needs gloo, and none of torch's hooks that compress: NCCL adds
            up dense gradients only, as FSDP and replicate do.
        generator: source of the initial weight and the negatives; None: torch's default one. Its state is
            not in state_dict, as each process has its own: save `criterion.generator.get_state()` beside
            it, and give that to `criterion.generator.set_state` to go on with the same negatives (for None:
            torch.get_rng_state and set_rng_state, those of torch.cuda on a GPU). In several processes the
            seeds should differ: equal ones give equal negatives. RuntimeError under torch.utils.checkpoint,
            which would run the forward pass twice with different negatives.

    Raises TypeError and ValueError for sizes that are not positive or an unknown name, and as
    `sampled_softmax_loss` does; RuntimeError where sparse gradients cannot be communicated, and for a weight
    that FSDP holds in shards: fully_shard(criterion), then
    torch.distributed.fsdp.register_fsdp_forward_method(criterion, "topk"), lets `topk` see all of it.

    >>> criterion = SampledSoftmaxLoss(num_classes=1000, embedding_dim=16, num_sampled=50)
    >>> criterion(torch.randn(4, 16), torch.tensor([3, 1, 4, 1])).shape
    torch.Size([])
    """

    # What a module saved whole by an earlier version is without:
    initial_scale: float | None = None  # that of a learned one
    initial_class_weight: Tensor | None = None  # as given
    angular_margin = cosine_margin = label_smoothing = 0.0
    return_lse = False

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        num_sampled: int | None = None,
        *,
        sampler: str | Tensor = "uniform",
        sampler_power: float = 0.75,
        scale: float = 20.0,
        learn_scale: bool = False,
        similarity: str = "cosine",
        bias: bool = False,
        sparse_grad: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        angular_margin: float = 0.0,
        cosine_margin: float = 0.0,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,  # (C,)
        return_lse: bool = False,
        generator: torch.Generator | None = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("impl", impl, IMPLS)
        check_choice("similarity", similarity, ("cosine", "dot"))
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        learn_scale, bias = check_flag("learn_scale", learn_scale), check_flag("bias", bias)
        check_generator(generator)
        if dtype is not None:
            check_dtype("dtype", dtype, FLOATING)
        scale = as_float(scale)
        check_scale(scale, torch.empty(0, device=device).device)
        if learn_scale and isinstance(scale, Tensor) and scale.is_meta:
            raise ValueError("scale: expected a number to begin with, as it is learned, got a tensor on meta")
        held = dtype or torch.get_default_dtype()
        if learn_scale and not torch.as_tensor(scale, dtype=torch.float64, device="cpu").to(held).isfinite():
            raise ValueError(f"scale: expected a number that {held} holds, as it is learned, got {scale}")
        num_classes = check_integer("num_classes", num_classes, 1)
        embedding_dim = check_integer("embedding_dim", embedding_dim, 1)
        self.num_sampled = None if num_sampled is None else check_integer("num_sampled", num_sampled, 0)
        self.sampler = as_sampler(sampler, sampler_power, num_classes, device)
        self.similarity, self.sparse_grad = similarity, check_flag("sparse_grad", sparse_grad)
        self.ignore_index, self.reduction, self.impl = check_ignore_index(ignore_index), reduction, impl
        self.angular_margin = check_margin("angular_margin", angular_margin, similarity)
        self.cosine_margin = check_margin("cosine_margin", cosine_margin, similarity)
        self.label_smoothing = check_smoothing(label_smoothing)
        self.return_lse = check_flag("return_lse", return_lse)
        self.generator: GeneratorHandle | torch.Generator | None
        self.generator = None if generator is None else GeneratorHandle(generator)
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype)) if bias else None
        self.register_buffer("class_weight", None)
        if class_weight is not None:
            self._hold_class_weight(class_weight, num_classes)
        given = isinstance(scale, nn.Parameter) and not scale.is_meta
        if learn_scale or given:
            self.initial_scale = float(scale.detach() if isinstance(scale, Tensor) else scale)
        # of shape (1,), as FSDP takes no parameter of shape ()
        self.scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype)) if learn_scale else scale
        self.reset_parameters()

    @property
    def num_classes(self) -> int:
        """C, the rows of `weight`."""
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        """D, the columns of `weight`."""
        return self.weight.shape[-1]

    def reset_parameters(self) -> None:
        """Gaussian rows of about unit length; zero bias; a learned scale at the module's initial value.

        (Also one that was assigned since, as wrappers such as FSDP assign parameters of their own.) A
        sampler's tables are those of the frequencies it was given, class weights those that were given, or,
        where others of another number of classes were assigned since, these. Only what the constructor was
        given survives to_empty: load or assign again class weights, or a scale, that were assigned since.
        """
        with torch.no_grad():
            self.weight.normal_(std=self.embedding_dim**-0.5, generator=self._generator_of_rows())
            if self.bias is not None:
                self.bias.zero_()
            if isinstance(self.scale, Tensor) and self.initial_scale is not None:
                self.scale.fill_(self.initial_scale)
            held, initial = self._class_weight(), self.initial_class_weight
            if held is not None and initial is not None and held.shape == initial.shape:
                held.copy_(initial)
        sampler = getattr(self, "sampler", "uniform")
        if isinstance(sampler, FrequencySampler):
            sampler.reset_parameters()

    def _hold_class_weight(self, class_weight: Tensor, C: int) -> None:
        """With a copy of the numbers on the CPU, which survives to_empty."""
        check_class_weights(class_weight, C)
        self.initial_class_weight = class_weight.to(device="cpu", copy=True)
        self.class_weight = class_weight.to(device=self.weight.device, copy=True)

    def _class_weight(self) -> Tensor | None:
        """Also one that was assigned as a parameter, which is no buffer then."""
        held = self._buffers.get("class_weight")
        return self._parameters.get("class_weight") if held is None else held

    def _generator_of_rows(self) -> torch.Generator | None:
        """That of the initial weight."""
        generator = self.generator
        return generator.generator if isinstance(generator, GeneratorHandle) else generator

    def forward(
        self,
        input: Tensor,  # (..., D)
        target: Tensor,  # (...,) int64
        *,
        angular_margin: float | Tensor | None = None,  # (...,); None: the module's
        cosine_margin: float | Tensor | None = None,
        entry_labels: Tensor | None = None,  # (num_classes,) int64; None: each class its own number
        target_labels: Tensor | None = None,  # (...,) int64; None: target
    ) -> Any:
        """The loss, or (loss, lse) with `return_lse`.

        Labels tell which classes are no negatives of a row: those with entry_labels_c == target_labels_i,
        such as near duplicates of its class, which share a label; a row's is mostly
        entry_labels[target]. All classes have one, whichever are drawn: the class set and its expected
        counts are those of a call without labels, and estimate the full softmax over the row's own class and
        those of other labels.
        """
        check_tensor("target", target, (torch.int64,))
        weight = self._whole_weight()
        if self.sparse_grad:
            check_sparse_communication(weight, self.bias)
        class_ids = log_expected_count = None
        m, C = self._negatives() if self.training else None, weight.shape[0]
        if entry_labels is not None or target_labels is not None:
            check_labels(input, target, (C, "(num_classes,)"), entry_labels, target_labels)
        if m is not None and m < C:
            sampler = getattr(self, "sampler", "uniform")  # a module saved whole may be without
            self._refuse_before_drawing(input, weight, target, angular_margin, cosine_margin)
            class_ids, log_expected_count = draw_batch_class_set(
                target.reshape(-1), C, m, self.generator, self.ignore_index, sampler
            )
            if entry_labels is not None:
                entry_labels = entry_labels.index_select(0, class_ids)
        return sampled_softmax_loss(
            input,
            weight,
            target,
            class_ids,
            log_expected_count,
            bias=self.bias,
            scale=self.scale,
            similarity=self.similarity,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            sparse_grad=self.sparse_grad,
            impl=self.impl,
            angular_margin=self.angular_margin if angular_margin is None else angular_margin,
            cosine_margin=self.cosine_margin if cosine_margin is None else cosine_margin,
            label_smoothing=self.label_smoothing,
            class_weight=self._class_weight(),
            return_lse=self.return_lse,
            entry_labels=entry_labels,
            target_labels=target_labels,
        )

    @torch.no_grad()
    def topk(
        self,
        input: Tensor,  # (..., D)
        k: int,
        block_size: int = 16384,
    ) -> TopK:
        """The k largest logits scale * cos(input, weight_j) + bias_j of each row, and their classes.

        Goes over the classes in blocks: memory is rows x (block_size + k), never rows x C. The same under
        autocast as without. Logits that are NaN come first, as in torch.topk. Raises TypeError and ValueError
        for a wrong input, a bias that is not (C,), a block_size < 1 and a k outside [1, C].
        """
        weight, bias = self._whole_weight(), self.bias
        k, block_size, scale = self._check_topk(input, k, block_size)
        C, D = weight.shape
        dtype = torch.promote_types(torch.promote_types(input.dtype, weight.dtype), torch.float32)
        with without_autocast(input.device.type):
            rows = self._unit(input.reshape(-1, D).to(dtype))
            values = rows.new_empty((rows.shape[0], 0))
            indices = torch.empty_like(values, dtype=torch.int64)
            for first in range(0, C, block_size):
                block = slice(first, first + block_size)
                classes = weight[block].to(dtype)
                logits = (rows @ classes.T) * self._factor(classes, scale)
                if bias is not None:
                    logits = logits + bias[block]
                best = logits.topk(min(k, logits.shape[1]))
                values, order = torch.cat([values, best.values], 1).topk(
                    min(k, values.shape[1] + logits.shape[1])
                )
                indices = torch.cat([indices, best.indices + first], 1).gather(1, order)
        shape = (*input.shape[:-1], k)
        return TopK(values.reshape(shape), indices.reshape(shape))

    def _check_topk(self, input: Tensor, k: int, block_size: int) -> tuple[int, int, float | Tensor]:
        """(k, block_size, scale) as `topk` takes them."""
        weight, bias = self._whole_weight(), self.bias
        check_tensor("weight", weight, FLOATING)
        if weight.dim() != 2:
            raise ValueError(f"weight: expected shape (C, D), got {tuple(weight.shape)}")
        C, D = weight.shape
        check_tensor("input", input, FLOATING)
        block_size, k = check_integer("block_size", block_size, 1), check_integer("k", k, 1, self.num_classes)
        if input.dim() < 1 or input.shape[-1] != D:
            raise ValueError(f"input: expected shape (..., {D}), got {tuple(input.shape)}")
        check_device("input", input, weight.device, "weight")
        if bias is not None:
            check_tensor("bias", bias, FLOATING)
            check_shape("bias", bias, (C,), "(C,)")
        scale: float | Tensor = as_float(self.scale)
        check_scale(scale, weight.device)
        if isinstance(scale, Tensor):
            scale = scale.reshape(())  # on the CPU it may be beside a GPU's tensors then
        return k, block_size, scale

    def _refuse_before_drawing(
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        angular_margin: float | Tensor | None,
        cosine_margin: float | Tensor | None,
    ) -> None:
        """Raises for a call's arguments as the loss does, so that the generator stays as it was.

        And where the weight has grown and the bias, or the class weights, have not.
        """
        fits = isinstance(input, Tensor) and input.dtype in FLOATING and input.device == weight.device
        fits = fits and input.shape == (*target.shape, weight.shape[1])
        bias, of_classes = self.bias, self._class_weight()
        if not fits or (bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype)):
            none = (None, None, None)
            check_arguments(input, weight, target, *none, bias, as_float(self.scale))
        if of_classes is not None and of_classes.shape != weight.shape[:1]:
            check_class_weights(of_classes, weight.shape[0])
        if angular_margin is not None or cosine_margin is not None:
            angular, cosine = (0.0 if m is None else m for m in (angular_margin, cosine_margin))
            extras = checked_extras(weight, target, self.similarity, angular, cosine, 0.0, None, False)
            if target.is_cpu and holds_numbers():
                check_values(extras, target.reshape(-1), self.ignore_index)

    def _negatives(self) -> int | None:
        m = self.num_sampled
        return m if m is None or type(m) is int else check_integer("num_sampled", m, 0)  # assigned since

    def _whole_weight(self) -> Tensor:
        weight = self.weight
        if type(weight) is not nn.Parameter or weight.dim() != 2:
            check_whole(weight)
        return weight

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As any module's; with sparse gradients DistributedDataParallel gets `SparseRows` before the module.

        Under its name: it takes a parameter where it first meets it, and so expects a sparse gradient.
        """
        if memo is None:
            memo = set()
        if self.sparse_grad and remove_duplicate and self not in memo and asked_by_ddp():
            own = {name: self._parameters.get(name) for name in ("weight", "bias")}
            yield prefix, SparseRows({n: p for n, p in own.items() if p is not None}, self.training)
        yield from super().named_modules(memo, prefix, remove_duplicate)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Takes a learned scale of shape () too, which it had in earlier versions."""
        scale = state_dict.get(f"{prefix}scale")
        if isinstance(scale, Tensor) and scale.dim() == 0:
            state_dict[f"{prefix}scale"] = scale.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _unit(self, rows: Tensor) -> Tensor:
        """As unit rows but for _SHORT, so that products with finite rows of any length are finite."""
        if self.similarity == "dot":
            return rows
        length = _length(rows)[:, None]
        return torch.where(length < 1e-12 * _SHORT, 0.0, rows / length * _SHORT**2).to(rows.dtype)

    def _factor(self, classes: Tensor, scale: float | Tensor) -> float | Tensor:
        """What makes logits of products of `_unit` rows with those of `classes`: these stay as they are."""
        if self.similarity == "dot":
            return scale
        length = _length(classes)
        return torch.where(length < 1e-12 * _SHORT, 0.0, scale / length).to(classes.dtype)

    def extra_repr(self) -> str:
        scale = "learned" if isinstance(self.scale, nn.Parameter) else self.scale
        shown = (
            f"{self.num_classes}, {self.embedding_dim}, num_sampled={self.num_sampled}, scale={scale}, "
            f"similarity={self.similarity!r}, bias={self.bias is not None}, sparse_grad={self.sparse_grad}"
        )
        others = {name: getattr(self, name, usual) for name, usual in _UNSHOWN.items()}
        others = {
            name: value
            for name, value in others.items()
            if not isinstance(value, nn.Module) and value != _UNSHOWN[name]
        }
        if self._class_weight() is not None:
            others["class_weight"] = True
        return shown + "".join(f", {name}={value!r}" for name, value in others.items())


# Options that are not worth a word while they are these; frequencies are a module of their own.
_UNSHOWN: dict[str, Any] = {
    "sampler": "uniform",
    "angular_margin": 0.0,
    "cosine_margin": 0.0,
    "label_smoothing": 0.0,
    "ignore_index": -100,
    "reduction": "mean",
    "return_lse": False,
    "impl": "auto",
}


def as_sampler(
    sampler: str | Tensor, power: float, num_classes: int, device: torch.device | str | None
) -> str | FrequencySampler:
    power = as_number("sampler_power", power, 0.0)
    if isinstance(sampler, Tensor):
        check_frequencies("sampler", sampler)
    made = FrequencySampler(sampler, power, device=device) if isinstance(sampler, Tensor) else sampler
    check_sampler(made, num_classes)
    return made


def _length(rows: Tensor) -> Tensor:
    """(n,) float64: that of each row, times _SHORT."""
    norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    if rows.dtype == torch.float64:  # whose squares may overflow, as a float32's do not here
        smaller = torch.linalg.vector_norm(rows * 1e-160, dim=1)
        return torch.where(norm == torch.inf, smaller * (1e160 * _SHORT), norm * _SHORT)
    return norm * _SHORT
