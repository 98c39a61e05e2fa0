"""The sampled softmax as a loss of RePlay's sequential and two-tower models (replay-rec)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import FLOATING, check_choice, check_tensor, refuse_meta
from ..sampled_softmax import as_float, check_scale, sampled_softmax_loss

# (embeddings (n, D), items (k,) or None) -> logits (n, k)
LogitsCallback = Callable[[Tensor, Tensor | None], Tensor]


class SampledSoftmaxCE(nn.Module):
    """RePlay's CESampled for negatives that a batch shares, with the correction log(m·q) and cosines.

    For each event that target_padding_mask marks, with h its embedding, t its positive and j the negatives:

        loss = -o(t) + logsumexp(o(t), o(j) for j != t),    o(t) = z(t), o(j) = z(j) - log_expected_count_j

    averaged. It equals CESampled without the correction; with it a uniform or any other sample estimates CE,
    the loss over all items. The item rows are read by the model's own `logits_callback`, so it follows
    RePlay's `LossProto` for SasRec and every model whose logits are linear in the embeddings.

    Args:
        log_expected_count: what is subtracted from a negative's logit: the log of how often `negative_labels`
            holds the item on average. A float is the same for all: log(num_negative_samples / cardinality)
            for RePlay's UniformNegativeSamplingTransform; a tensor (cardinality,) has each item's own.
        scale, similarity: "dot" is RePlay's own; "cosine" needs a scale such as 20.
        negative_labels_ignore_index: a padding value among the negatives, left out.

    Raises ValueError for negatives that are not (N,), for several positives of one event, and for an item
    past a `log_expected_count` of each item's own. (That it is longer than the items are many is not seen.)

    For a million items, of which UniformNegativeSamplingTransform(1_000_000, 512) takes 512:

        model = SasRec(body=body, loss=SampledSoftmaxCE(math.log(512 / 1_000_000)))
    """

    log_expected_count: Tensor

    def __init__(
        self,
        log_expected_count: float | Tensor = 0.0,
        *,
        scale: float = 1.0,
        similarity: str = "dot",
        negative_labels_ignore_index: int = -100,
    ) -> None:
        super().__init__()
        if isinstance(log_expected_count, Tensor) and log_expected_count.is_meta:
            refuse_meta("log_expected_count")
        device = "cpu" if torch.get_default_device().type == "meta" else None
        try:
            counts = torch.as_tensor(log_expected_count, dtype=torch.float32, device=device)
        except (TypeError, ValueError):
            raise TypeError(
                "log_expected_count: expected a number or a tensor (cardinality,), got "
                f"{type(log_expected_count).__name__}"
            ) from None
        if counts.dim() > 1:
            raise ValueError(
                "log_expected_count: expected a number or shape (cardinality,), got shape "
                f"{tuple(counts.shape)}"
            )
        self.register_buffer("log_expected_count", counts, persistent=False)
        scale = as_float(scale)
        check_scale(scale, getattr(scale, "device", counts.device))
        check_choice("similarity", similarity, ("cosine", "dot"))
        self.scale, self.similarity = scale, similarity
        self.negative_labels_ignore_index = negative_labels_ignore_index
        self._logits_callback: LogitsCallback | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SampledSoftmaxCE":
        """As any module's, but that the correction, which no state dict has, stays as it is on any device."""
        counts = self.log_expected_count
        super()._apply(fn, recurse)
        made = self.log_expected_count
        self.log_expected_count = counts if made.is_meta else counts.to(made.device)
        return self

    @property
    def logits_callback(self) -> LogitsCallback:
        """The model's function from embeddings and items to logits; the model sets it."""
        if self._logits_callback is None:
            raise AttributeError("The callback for getting logits is not defined")
        return self._logits_callback

    @logits_callback.setter
    def logits_callback(self, func: LogitsCallback | None) -> None:
        self._logits_callback = func

    def forward(
        self,
        model_embeddings: Tensor,  # (batch, events, D)
        feature_tensors: Any,
        positive_labels: Tensor,  # (batch, events, 1) int64
        negative_labels: Tensor,  # (N,) int64
        padding_mask: Any,
        target_padding_mask: Tensor,  # (batch, events, 1) bool
    ) -> Tensor:
        _check_labels(model_embeddings, positive_labels, negative_labels, target_padding_mask)
        marked = target_padding_mask.squeeze(-1)
        positives = positive_labels.squeeze(-1)[marked]
        negatives = negative_labels[negative_labels != self.negative_labels_ignore_index]
        items, places = torch.cat([negatives, positives]).unique(return_inverse=True)
        class_ids, target = places[: len(negatives)], places[len(negatives) :]
        counts = self.log_expected_count
        if counts.dim() and len(items) and items[-1] >= len(counts):
            raise ValueError(
                f"log_expected_count: expected a number for each item, got {len(counts)} and item {items[-1]}"
            )
        return sampled_softmax_loss(
            model_embeddings[marked],
            self._rows(items, model_embeddings),
            target,
            class_ids,
            counts[negatives] if counts.dim() else counts.expand(len(negatives)),
            scale=self.scale,
            similarity=self.similarity,
        )

    def _rows(self, items: Tensor, like: Tensor) -> Tensor:
        """(k, D) the items' rows: logits are linear, so those of the identity are the rows' columns."""
        identity = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
        return self.logits_callback(identity, items).t()


def _check_labels(embeddings: Tensor, positives: Tensor, negatives: Tensor, mask: Tensor) -> None:
    check_tensor("model_embeddings", embeddings, FLOATING)
    check_tensor("positive_labels", positives, (torch.int64,))
    check_tensor("negative_labels", negatives, (torch.int64,))
    if negatives.dim() != 1:
        raise ValueError(
            "negative_labels: expected shape (N,), the same negatives for the whole batch, got "
            f"{tuple(negatives.shape)}; RePlay's CESampled takes each row's own"
        )
    if positives.shape != (*embeddings.shape[:-1], 1):
        raise ValueError(
            f"positive_labels: expected shape {(*embeddings.shape[:-1], 1)}, one for each event, got "
            f"{tuple(positives.shape)}; RePlay's CESampled takes several"
        )
    if mask.shape != positives.shape:
        raise ValueError(
            f"target_padding_mask: expected positive_labels' shape {tuple(positives.shape)}, got "
            f"{tuple(mask.shape)}"
        )
