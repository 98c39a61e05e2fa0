"""The sampled softmax as a loss of pytorch-metric-learning, for very many classes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.losses import BaseMetricLossFunction
    from pytorch_metric_learning.losses.mixins import WeightRegularizerMixin
    from pytorch_metric_learning.utils import common_functions, loss_and_miner_utils
except ImportError as error:
    raise ImportError(
        "fedss_kernels.integrations.metric_learning needs pytorch-metric-learning: "
        f"pip install pytorch-metric-learning ({error})"
    ) from error

from ..sampled_softmax_module import SampledSoftmaxLoss


class _Criterion(SampledSoftmaxLoss):
    """Whose rows, where they are made anew, start as the library's."""

    weight_init_func: Any = None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.weight_init_func is not None:
            self.weight_init_func(self.weight.data.t())


class SampledSoftmax(WeightRegularizerMixin, BaseMetricLossFunction):
    """NormalizedSoftmaxLoss, ArcFaceLoss and CosFaceLoss on sampled classes; equals them to rounding on all.

    `criterion`, a `SampledSoftmaxLoss`, owns the class rows: `criterion.weight` (C, D), a parameter, of which
    `W` (D, C) is the library's view. A state dict of the library's loss, with `W`, is taken too. Where the
    embeddings are on another device, the rows move there with the first call, as the library's do.

    Args:
        num_classes, embedding_size: C and D.
        num_sampled: m, negatives for each batch in training mode; None: all classes, always.
        scale: multiplies the cosine: 1 / temperature.
        angular_margin: ArcFace's, in radians: math.radians(28.6) is ArcFaceLoss's own default.
        cosine_margin: CosFace's, 0.35 by default in CosFaceLoss.
        sparse_grad: the gradient of the rows over those that take part alone, for `RowSGD` or `RowAdam`.
        generator: source of the negatives; None: torch's default one.
        distance, reducer, collect_stats, embedding_regularizer, weight_regularizer, weight_init_func and the
            regularizers' weights: as for the library's losses. The distance is the CosineSimilarity, as it is
            by default. A weight_regularizer reads all C rows, so sparse_grad=True with one is a ValueError.

    Takes miners' tuples as weights of the batch's rows, as the library's classification losses do, and no
    ref_emb; works in DistributedLossWrapper. Raises ValueError and TypeError as `SampledSoftmaxLoss` does.

    >>> loss_func = SampledSoftmax(num_classes=1000, embedding_size=16, num_sampled=50)
    >>> loss_func(torch.randn(4, 16), torch.tensor([3, 1, 4, 1])).shape
    torch.Size([])
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        num_sampled: int | None = None,
        *,
        scale: float = 20.0,
        angular_margin: float = 0.0,
        cosine_margin: float = 0.0,
        sparse_grad: bool = False,
        generator: torch.Generator | None = None,
        **options: Any,  # the library's own
    ) -> None:
        super().__init__(**options)
        distance = {"p": 2, "power": 1, "normalize_embeddings": True}
        common_functions.assert_distance_type(self, CosineSimilarity, **distance)
        if sparse_grad and self.weight_regularizer is not None:
            raise ValueError(
                "sparse_grad: expected False with a weight_regularizer, which reads all class rows and makes "
                "their gradient dense, got True; take weight_decay of the optimiser instead"
            )
        self.criterion = _Criterion(
            num_classes,
            embedding_size,
            num_sampled,
            scale=scale,
            angular_margin=angular_margin,
            cosine_margin=cosine_margin,
            sparse_grad=sparse_grad,
            generator=generator,
            reduction="none",
        )
        self.add_to_recordable_attributes(
            list_of_names=[
                "num_classes",
                "embedding_size",
                "num_sampled",
                "scale",
                "angular_margin",
                "cosine_margin",
            ],
            is_stat=False,
        )
        self.weight_init_func(self.W.data)
        self.criterion.weight_init_func = self.weight_init_func

    def reset_parameters(self) -> None:
        """Class rows as those of a new loss."""
        self.criterion.reset_parameters()

    @property
    def W(self) -> Tensor:
        """(D, C): the class rows as the library's losses have them, a view."""
        return self.criterion.weight.t()

    @property
    def num_classes(self) -> int:
        return self.criterion.num_classes

    @property
    def embedding_size(self) -> int:
        return self.criterion.embedding_dim

    @property
    def num_sampled(self) -> int | None:
        return self.criterion.num_sampled

    @property
    def angular_margin(self) -> float:
        return self.criterion.angular_margin

    @property
    def cosine_margin(self) -> float:
        return self.criterion.cosine_margin

    @property
    def scale(self) -> float | Tensor:
        return self.criterion.scale

    def compute_loss(
        self,
        embeddings: Tensor,  # (B, D)
        labels: Tensor | None,  # (B,) integers
        indices_tuple: tuple[Tensor, ...] | None,  # a miner's
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """The library's dictionary: a loss for each row, weighed by how often the miner took it."""
        common_functions.labels_required(labels)
        common_functions.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
            found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"labels: expected integers, got {found}")
        self.criterion.to(embeddings.device)
        losses = self.criterion(embeddings, labels.long())
        weights = loss_and_miner_utils.convert_to_weights(indices_tuple, labels, dtype=losses.dtype)
        indices = common_functions.torch_arange_from_size(embeddings)
        result = {"loss": {"losses": losses * weights, "indices": indices, "reduction_type": "element"}}
        self.add_weight_regularization_to_loss_dict(result, self.criterion.weight)
        return result

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """(B, C) scale * cosine with every class, in the embeddings' dtype.

        `criterion.topk` has the best without storing all.
        """
        weight = self.criterion.weight.to(embeddings)
        return self.scale * F.normalize(embeddings, dim=-1) @ F.normalize(weight, dim=-1).t()

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Takes `W` (D, C) of the library's own losses too."""
        theirs = state_dict.pop(f"{prefix}W", None)
        if theirs is not None:
            state_dict[f"{prefix}criterion.weight"] = theirs.t()
        super()._load_from_state_dict(state_dict, prefix, *arguments)
