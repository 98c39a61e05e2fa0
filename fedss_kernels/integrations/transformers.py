"""Causal language models of transformers, trained without logits: on all classes or on a sample of them.

`attach(model)` gives the model and its head classes of their own that differ in one thing: a training step
with labels hands the hidden states past the head to the loss. Every other call, and every parameter, is as it
was.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from transformers import PreTrainedModel
    from transformers.loss.loss_utils import ForCausalLMLoss
except ImportError as error:
    raise ImportError(
        f"fedss_kernels.integrations.transformers needs transformers: pip install transformers ({error})"
    ) from error

from ..checks import check_choice, check_integer
from ..class_sets import GeneratorHandle, check_generator, draw_batch_class_set
from ..data_parallel import check_whole
from ..sampled_softmax import IMPLS, sampled_softmax_loss

Model = TypeVar("Model", bound=PreTrainedModel)


def attach(
    model: Model,
    num_sampled: int | None = None,
    *,
    generator: torch.Generator | None = None,
    impl: str = "auto",
) -> Model:
    """The same causal language model, whose loss in training stores no logits. `detach` undoes it.

        loss_i = -h_i . w_t + logsumexp over t and the class set of (h_i . w_j - log_expected_count_j)

    In training mode, where labels are given, the loss is made of the hidden states and the head's weight:
    memory O(tokens x D), not tokens x C. `outputs.logits` is None there, so that nothing takes hidden states
    for logits. Without labels (generate, preferences, label smoothing by the Trainer) and in eval mode the
    model gives logits and its own loss. `num_items_in_batch`, `shift_labels` and labels of -100 mean what
    they mean to the model's own loss; where every label is -100 the loss is 0 and not NaN.

    No parameter is added, renamed or copied: tied weights, save_pretrained, from_pretrained, checkpoints,
    PEFT and resize_token_embeddings do not notice. To attach again changes the settings.

    Args:
        model: a causal language model whose head is an nn.Linear and whose forward calls `loss_function`.
        num_sampled: m, uniform negatives beside the batch's own labels (`draw_batch_class_set`). None: all
            classes, the model's own loss; so too where labels and negatives are as many as the classes.
        generator: source of the negatives. None: torch's default one, which the Trainer seeds, saves and
            restores; the state of another is for you to save.
        impl: as for `sampled_softmax_loss`.

    Raises TypeError for another kind of model or head, ValueError for a loss of the model's own that is not
    cross-entropy of the next token. In training, RuntimeError for a model that changes its logits after the
    head (soft caps, scaling), and for a weight in shards.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=1000, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                      num_attention_heads=2, num_key_value_heads=2)
    >>> model = attach(LlamaForCausalLM(config), num_sampled=100).train()
    >>> tokens = torch.randint(1000, (2, 8))
    >>> outputs = model(input_ids=tokens, labels=tokens)
    >>> outputs.loss.backward()
    >>> outputs.logits is None, model.lm_head.weight.grad.shape
    (True, torch.Size([1000, 16]))
    >>> detach(model).eval()(input_ids=tokens).logits.shape
    torch.Size([2, 8, 1000])
    """
    check_choice("impl", impl, IMPLS)
    check_generator(generator)
    if num_sampled is not None:
        num_sampled = check_integer("num_sampled", num_sampled, 0)
    _check_model(model)
    head = _head(model)
    handle = None if generator is None else GeneratorHandle(generator)
    settings: Any = _Settings(num_sampled, handle, impl)
    model._fedss_settings = settings
    if not isinstance(model, _WithoutLogits):
        own: Any = type(model)
        model.__class__ = _class_without_logits(own)
    head.__class__ = _Head
    return model


def detach(model: Model) -> Model:
    """The model as it was before `attach`, with the parameters it has now. Returns it."""
    attached = type(model)
    if attached.__bases__[0] is not _WithoutLogits:
        raise TypeError(f"model: expected one that attach(model) returned, got {attached.__name__}")
    head = _head(model)
    for name in ("passes", "passed"):
        vars(head).pop(name, None)
    head.__class__ = nn.Linear
    model.__class__ = attached.__bases__[1]
    del model._fedss_settings
    return model


@dataclass
class _Settings:
    num_sampled: int | None
    generator: GeneratorHandle | None
    impl: str


class _Head(nn.Linear):
    """The model's head, which lets hidden states through while the loss is made of them."""

    passes = False
    passed: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not self.passes:
            return super().forward(input)
        self.passed = input
        return input


class _WithoutLogits(nn.Module):
    """What a model's class gains beside its `forward`; the model's own class is the base after it."""

    _fedss_settings: _Settings

    def loss_function(
        self,
        logits: Tensor,  # (..., D): hidden states, in training
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        head = _head(self)
        if not isinstance(head, _Head) or head.passed is None:
            named: dict[str, Any] = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
            return ForCausalLMLoss(logits, labels, vocab_size, shift_labels=shift_labels, **named, **kwargs)
        _check_unchanged(logits, head.passed)
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        target, reduction = shift_labels.to(logits.device), "mean" if num_items_in_batch is None else "sum"
        loss = _loss(head.passed, head, target, ignore_index, reduction, self._fedss_settings)
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / (num_items_in_batch + (num_items_in_batch == 0))  # 0 / 1 where there is no label

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Its class is made by `attach`, so that pickle would not find it by name."""
        return _new_without_logits, (type(self).__bases__[1],), self.__dict__


@functools.cache
def _class_without_logits(own: Any) -> Any:
    """A class of own's name, which passes by the head in training with labels."""
    position = list(inspect.signature(own.forward).parameters).index("labels") - 1  # without self

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = args[position] if len(args) > position else kwargs.get("labels")
        if labels is None or not self.training:
            return own.forward(self, *args, **kwargs)
        head: Any = _head(self)
        if not isinstance(head, _Head):
            head.__class__ = _Head  # a new one, of resize_token_embeddings
        as_dict = kwargs.pop("return_dict", None)
        head.passes = True
        try:
            outputs = own.forward(self, *args, **kwargs, return_dict=True)
        finally:
            head.passes, head.passed = False, None
        outputs["logits"] = None
        return outputs if (self.config.return_dict if as_dict is None else as_dict) else outputs.to_tuple()

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (_WithoutLogits, own), {**names, "forward": forward})


def _new_without_logits(own: type) -> Any:
    attached = _class_without_logits(own)
    return attached.__new__(attached)


def _loss(
    passed: Tensor,  # (..., D)
    head: _Head,
    target: Tensor,  # (...,)
    ignore_index: int,
    reduction: str,
    settings: _Settings,
) -> Tensor:
    if type(head.weight) is not nn.Parameter:
        check_whole(head.weight)
    C, m = head.weight.shape[0], settings.num_sampled
    class_ids = log_expected_count = None
    if m is not None and target.numel() + m < C:
        class_ids, log_expected_count = draw_batch_class_set(
            target.reshape(-1), C, m, settings.generator, ignore_index
        )
    return sampled_softmax_loss(
        passed,
        head.weight,
        target,
        class_ids,
        log_expected_count,
        bias=head.bias,
        scale=1.0,
        similarity="dot",
        ignore_index=ignore_index,
        reduction=reduction,
        impl=settings.impl,
    )


def _head(model: Any) -> nn.Linear:
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear, _Head):
        raise TypeError(
            f"model: expected a head that is an nn.Linear, got a {type(head).__module__}."
            f"{type(head).__name__}; adapters and quantised weights may stand everywhere but on the head"
        )
    return head


def _check_model(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: expected a causal language model of transformers, got {type(model).__name__}; attach "
            "before it is compiled, distributed or given adapters"
        )
    if isinstance(model, _WithoutLogits):
        return
    if getattr(model, "loss_function", None) is not ForCausalLMLoss:
        raise ValueError(
            f"model: expected one whose loss_function is ForCausalLMLoss, got {type(model).__name__} with "
            f"{getattr(model.loss_function, '__name__', model.loss_function)}"
        )
    forward = inspect.unwrap(type(model).forward)
    if "loss_function" not in forward.__code__.co_names:
        raise TypeError(
            f"model: expected one whose forward calls self.loss_function, got {type(model).__name__}, which "
            "computes its loss itself"
        )


def _check_unchanged(logits: Tensor, passed: Tensor) -> None:
    """A model may cast what its head gives, and do no more, before the loss."""
    if logits is passed:
        return
    if logits.dtype == passed.dtype or not torch.equal(logits.to(passed.dtype), passed):
        raise RuntimeError(
            "model: expected logits to go from the head to the loss as they are, got a model that changes "
            "them between (soft caps, scaling, slices); detach(model) trains it with its own loss"
        )
