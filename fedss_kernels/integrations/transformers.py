"""Causal language models of transformers, trained without logits: on all classes or on a sample of them.

`attach(model)` gives the model and its head classes of their own that differ in one thing: a training step
with labels hands the hidden states past the head to the loss. Every other call, and every parameter, is as it
was.
"""

import functools
import inspect
from collections.abc import Callable
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
    PEFT and resize_token_embeddings do not notice. To attach again changes the settings. A `forward` that is
    set on the model, as by accelerate's mixed precision and hooks, is called with the rest; one of your own
    is to be set after `attach` and made of the attached model's, so that it meets no hidden states.

    Args:
        model: a causal language model whose head is an nn.Linear and whose forward calls `loss_function`,
            itself or by `super().forward`.
        num_sampled: m, uniform negatives beside the batch's own labels (`draw_batch_class_set`). None: all
            classes, the model's own loss; so too where labels and negatives are as many as the classes.
        generator: source of the negatives. None: torch's default one, which the Trainer seeds, saves and
            restores; the state of another is for you to save.
        impl: as for `sampled_softmax_loss`.

    Raises TypeError for another kind of model, head or forward, ValueError for a loss of the model's own that
    is not cross-entropy of the next token. In training, RuntimeError for a model that changes its logits
    after the head (soft caps, scaling) or does not take its loss from them, and for a weight in shards.

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
    passed_by = _passed_by(model)
    _drop_own_forward(head)
    handle = None if generator is None else GeneratorHandle(generator)
    settings: Any = _Settings(num_sampled, handle, impl)
    model._fedss_settings = settings
    if not isinstance(model, _WithoutLogits):
        own: Any = type(model)
        model.__class__ = _class_without_logits(own)
    if passed_by:
        model._fedss_passed_by = passed_by
        for name in passed_by:
            del vars(model)[name]
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
    model.__class__ = attached._fedss_own
    vars(model).pop("_fedss_settings", None)
    if "forward" not in vars(model):  # else that one calls what it was set over
        vars(model).update(vars(model).pop("_fedss_passed_by", {}))
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
        if not getattr(self, "passes", False):  # detached, it may still be called by what wraps it
            return nn.Linear.forward(self, input)
        self.passed = input
        return input


class _WithoutLogits(nn.Module):
    """What a model's class gains beside its `forward`.

    One that `attach` did not give settings, as `type(model)(config)` makes it, is as those of its own class.
    """

    _fedss_settings: _Settings
    _fedss_own: Any  # the model's own class

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
        if not isinstance(head, _Head) or not head.passes:
            passed = head.passed if isinstance(head, _Head) else None
            if passed is not None and logits.shape[-1] == passed.shape[-1]:
                raise RuntimeError(
                    "model: expected a forward that calls self.loss_function once on what its head gives, "
                    "got one that does so again; detach(model) trains it with its own loss"
                )
            if "forward" in vars(self) and self.training and _is_attached(self):
                raise RuntimeError(
                    "model: expected a forward that calls the attached model's, got one set on the model, "
                    "which calls its class's past it; del model.forward, then set one made of model.forward"
                )
            named: dict[str, Any] = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
            return ForCausalLMLoss(logits, labels, vocab_size, shift_labels=shift_labels, **named, **kwargs)
        if head.passed is None:
            raise RuntimeError(
                "model: expected a forward that calls its head, got one that makes logits in another way, or "
                "a head with a forward set on it; detach(model) trains it with its own loss"
            )
        _check_unchanged(logits, head.passed)
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        target, reduction = shift_labels.to(logits.device), "mean" if num_items_in_batch is None else "sum"
        loss = _loss(head.passed, head, target, ignore_index, reduction, self._fedss_settings)
        head.passes = False
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / (num_items_in_batch + (num_items_in_batch == 0))  # 0 / 1 where there is no label

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Its class is made by `attach`, so that pickle would not find it by name."""
        return _new_without_logits, (self._fedss_own,), self.__dict__


@functools.cache
def _class_without_logits(own: Any) -> Any:
    """A class of own's name, which passes by the head in training with labels."""
    inner = _passing_by(_takes_loss(own))
    bases = (own, inner) if own is not inner.__base__ else (inner,)
    return type(own.__name__, (_WithoutLogits, *bases), {**_names(own), "_fedss_own": own})


@functools.cache
def _passing_by(own: Any) -> Any:
    """own, whose forward takes the loss, with one past the head.

    It stands right before own among the bases of what is attached, so that a `super().forward` of a class of
    own's meets outputs without logits.
    """
    signature = inspect.signature(own.forward)
    position: Any = _labels_position(signature)

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        passed_by = vars(self).get("_fedss_passed_by")
        call = passed_by["forward"] if passed_by else functools.partial(own.forward, self)
        positional = position is not None and len(args) > position
        labels = args[position] if positional else kwargs.get("labels")
        if labels is None or not self.training or not _is_attached(self):
            return call(*args, **kwargs)
        return _past_head(self, call, args, kwargs)

    function: Any = forward
    function.__signature__ = signature
    del function.__wrapped__  # or accelerate's unwrap_model would go past it
    return type(own.__name__, (own,), {**_names(own), "forward": forward})


def _names(own: type) -> dict[str, Any]:
    return {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}


def _labels_position(signature: inspect.Signature) -> int | None:
    """Where labels may stand among a forward's arguments after self; None: by name alone."""
    names = list(signature.parameters)
    return names.index("labels") - 1 if "labels" in names else None


def _forwards(own: type) -> dict[type, Any]:
    """The functions `forward` of a class and its bases, in the order in which super() finds them."""
    return {each: vars(each)["forward"] for each in own.__mro__ if "forward" in vars(each)}


def _takes_loss(own: type) -> type:
    """The innermost class whose forward calls self.loss_function, of those that super().forward leads to."""
    found = None
    for each, forward in _forwards(own).items():
        names = inspect.unwrap(forward).__code__.co_names
        found = each if "loss_function" in names else found
        if "super" not in names:
            break
    if found is None:
        raise TypeError(
            "model: expected one whose forward calls self.loss_function, itself or by super().forward, got "
            f"{own.__name__}, whose {inspect.unwrap(forward).__qualname__} does not"
        )
    return found


def _passed_by(model: Any) -> dict[str, Any]:
    """The forward that was set on the model itself if it calls the class's own, past the attached one.

    And what accelerate keeps of it. Raises TypeError where others' code may take hidden states for logits.
    """
    forward: Any = vars(model).get("forward")
    if forward is None:
        return {}
    own_class: Any = model._fedss_own if isinstance(model, _WithoutLogits) else type(model)
    forwards, inner = _forwards(_class_without_logits(own_class)), _takes_loss(own_class)
    hook = vars(model).get("_hf_hook")
    hooks = [] if hook is None else [hook, *getattr(hook, "hooks", ())]
    known = all(map(_is_librarys, hooks))
    while known and forward is not None:
        forward = getattr(forward, "__func__", forward)
        for each, own in forwards.items():
            if forward in (own, inspect.unwrap(own)):
                names = ("forward", "_original_forward") if each is inner else ()
                return {name: vars(model)[name] for name in names if name in vars(model)}
        known, forward = _is_librarys(forward), getattr(forward, "__wrapped__", None)
    if _is_attached(model):  # it is seen in training whether it calls the attached one
        return {}
    raise TypeError(
        "model: expected no forward set on it but accelerate's or torch's, got one that could take hidden "
        "states for logits; del model.forward, attach, then set it again, made of the attached model's"
    )


def _is_librarys(code: Any) -> bool:
    """Whether a function, a class or an object that is called is one of accelerate's, torch's, transformers'.

    functools.wraps gives a function another's __module__, but not its __globals__.
    """
    function = getattr(code, "func", code)  # of a partial
    of = function if isinstance(function, type) else type(function)
    module = getattr(function, "__globals__", {}).get("__name__", of.__module__)
    return module.partition(".")[0] in ("accelerate", "torch", "transformers")


def _is_attached(model: nn.Module) -> bool:
    return "_fedss_settings" in vars(model)


def _past_head(self: Any, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a call of the model returns in training with labels: a loss and no logits."""
    head: Any = _head(self)
    if not isinstance(head, _Head):
        head.__class__ = _Head  # a new one, of resize_token_embeddings
    as_dict = kwargs.pop("return_dict", None)
    head.passes = True
    try:
        outputs = call(*args, **kwargs, return_dict=True)
        if head.passes:
            raise RuntimeError(
                "model: expected a forward that calls self.loss_function where it is given labels, got one "
                "that does not; detach(model) trains it with its own loss"
            )
    finally:
        head.passes, head.passed = False, None
    outputs["logits"] = None
    return outputs if (self.config.return_dict if as_dict is None else as_dict) else outputs.to_tuple()


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


def _drop_own_forward(head: nn.Linear) -> None:
    """Raises TypeError for a forward that was set on the head, and would be called in place of `_Head`'s."""
    own = vars(head).get("forward")
    if isinstance(head, _Head) or own is None:
        return
    if getattr(own, "__func__", None) not in (nn.Linear.forward, _Head.forward):
        raise TypeError(
            "model: expected a head whose forward is nn.Linear's, got one with a forward set on it, as by "
            "accelerate's hooks; attach before, or after accelerate.hooks.remove_hook_from_module(head)"
        )
    vars(head).pop("forward")  # what remove_hook_from_module leaves


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
    _takes_loss(type(model))


def _check_unchanged(logits: Tensor, passed: Tensor) -> None:
    """A model may cast what its head gives, and do no more, before the loss."""
    if logits is passed:
        return
    if logits.dtype == passed.dtype or not torch.equal(logits.to(passed.dtype), passed):
        raise RuntimeError(
            "model: expected logits to go from the head to the loss as they are, got a model that changes "
            "them between (soft caps, scaling, slices); detach(model) trains it with its own loss"
        )
