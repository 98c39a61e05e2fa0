"""Losses for sentence-transformers: over very many classes, and over a batch whose items may repeat."""

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import all_gather, all_gather_with_grad
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "fedss_kernels.integrations.sentence_transformers needs sentence-transformers: "
        f"pip install sentence-transformers ({error})"
    ) from error

from ..checks import check_choice, check_flag, check_shape, check_tensor
from ..data_parallel import is_held_by_fsdp
from ..sampled_softmax import as_float, check_scale, sampled_softmax_loss
from ..sampled_softmax_module import SampledSoftmaxLoss

_FILES_OF_TRAINER = ("optimizer", "scheduler", "scaler")  # of its checkpoints
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_NO_ITEM = torch.iinfo(torch.int64).min  # the label of what is nobody's positive


class ClassSoftmaxLoss(nn.Module):
    """Softmax over the classes that sentences belong to, sampled in training: products, users, intents.

        loss_i = SampledSoftmaxLoss(embedding of sentence i, label i)

    `criterion`, a `SampledSoftmaxLoss`, owns the class matrix; the trainer optimises it with the model. While
    the model is in eval mode the loss is over all classes; `criterion.topk(embeddings, k)` gives the best.

    The trainer's checkpoints hold the model alone: with `callbacks=[loss.checkpoints()]` they hold the class
    matrix too, and a run that is resumed, or ends with its best model, has the one that belongs to it.

    In several processes, where the model alone is under DistributedDataParallel, as the trainer puts it, or
    FSDP, all have the first one's class matrix from the first batch on, and its gradient is the mean of
    theirs. A trainer with several losses has its processes in different ones at a time: there it takes
    `callbacks=[loss.checkpoints(name=...)]` of each, by which a process in another loss has a gradient of
    zeros. The trainer's own FSDP2 takes no loss that has parameters: accelerate's KeyError says that one
    "couldn't be switched to its sharded version".

    Args:
        model: the SentenceTransformer.
        num_classes: C; the data set has one column of texts and a label column with classes in [0, C).
        num_sampled: m, negatives for each batch; None: all classes.
        embedding_dim: D; None: what the model says.
        options: as for `SampledSoftmaxLoss`: scale, learn_scale, similarity, bias, generator and others.

    Raises ValueError for more than one column of texts, for a trainer with several losses and processes
    that has not this loss' callback, and as `SampledSoftmaxLoss` does.

    >>> from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> words = {"red": 0, "green": 1, "blue": 2}
    >>> tokenizer = Tokenizer(models.WordLevel(words, unk_token="red"))
    >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    >>> loss = ClassSoftmaxLoss(model, num_classes=1000, num_sampled=50)
    >>> loss([model.preprocess(["red", "blue green"])], torch.tensor([3, 141])).shape
    torch.Size([])
    """

    def __init__(
        self,
        model: SentenceTransformer,
        num_classes: int,
        num_sampled: int | None = None,
        *,
        embedding_dim: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.model = model
        if embedding_dim is None:
            embedding_dim = _embedding_dim(model)
        self.criterion = SampledSoftmaxLoss(num_classes, embedding_dim, num_sampled, **options)
        self._has_hooks = self._is_averaged_in_steps = False

    def forward(
        self,
        sentence_features: Iterable[dict[str, Tensor]],  # one
        labels: Tensor,  # (B,) integers
    ) -> Tensor:
        columns = list(sentence_features)
        if len(columns) != 1:
            raise ValueError(
                f"sentence_features: expected one column of texts beside the labels, got {len(columns)}"
            )
        if dist.is_initialized():
            self._share()
        embeddings = self.model(columns[0])["sentence_embedding"]
        labels, training = _as_classes(labels, len(embeddings)), self.criterion.training
        self.criterion.train(training and self.model.training)  # the trainer evaluates the model alone
        try:
            return self.criterion(embeddings, labels)
        finally:
            self.criterion.train(training)

    def _share(self) -> None:
        """Where the model is wrapped for several processes, the criterion too is one for all of them.

        Where each process is in this loss in every step a hook averages a gradient as it is made; else this
        loss' callback averages before a step.
        """
        trainer = _trainer()
        self._is_averaged_in_steps = any(each.groups for each in _callbacks(trainer) if each.loss is self)
        several_losses = _has_several_losses(trainer)
        if self._is_averaged_in_steps or (self._has_hooks and not several_losses):
            return
        groups = _groups(self.model)
        several = [group for group in groups if dist.get_world_size(group) > 1]
        if several and several_losses:
            if torch.is_grad_enabled():
                raise ValueError(
                    "callbacks: expected a loss.checkpoints(name=...) of each ClassSoftmaxLoss, as this "
                    "trainer has several losses and processes, which are in different losses at a time, got "
                    f"none of the one over {self.criterion.num_classes} classes"
                )
            return  # an evaluation, after a training that has averaged
        self._has_hooks = bool(groups)
        self._send_first(several)
        for group in several:
            for parameter in self._own_parameters():
                parameter.register_post_accumulate_grad_hook(partial(self._average_unless_in_steps, group))

    def _average_unless_in_steps(self, group: Any, parameter: Tensor) -> None:
        if not self._is_averaged_in_steps:
            _average(group, parameter)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_has_hooks": False}  # a copy's parameters have none

    def _send_first(self, groups: list[Any]) -> None:
        for group in groups:
            first = dist.get_global_rank(group, 0) if group else 0
            for tensor in (*self._own_parameters(), *self.criterion.buffers()):
                dist.broadcast(tensor.detach(), first, group)

    def _own_parameters(self) -> list[Tensor]:
        return [each for each in self.criterion.parameters() if not is_held_by_fsdp(each)]

    def checkpoints(
        self, resumed_from: str | Path | None = None, name: str = "class_softmax_loss"
    ) -> TrainerCallback:
        """A callback by which the trainer's checkpoints save and restore the class matrix.

        With `load_best_model_at_end` it is in the end that of the best model. The state of a `generator` is
        saved and restored too, each process' own. Where a run is resumed from another folder than
        `output_dir`, `resumed_from` is that checkpoint. As training begins it raises ValueError where another
        loss' callback has this `name`, and in float16 with several losses and processes; FileNotFoundError
        where a run is resumed from a checkpoint without the class matrix. A `name` that is no file's, or the
        trainer's own, is refused at once.
        """
        if not name or Path(name).name != name or name in _FILES_OF_TRAINER:
            raise ValueError(f"name: expected a file's name, none of {_FILES_OF_TRAINER}, got {name!r}")
        return _KeepsClasses(self, resumed_from, name)

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        criterion = self.criterion
        return {
            "num_classes": criterion.num_classes,
            "num_sampled": criterion.num_sampled,
            "scale": torch.as_tensor(criterion.scale).item(),
            "similarity": criterion.similarity,
        }


class InBatchSoftmaxLoss(nn.Module):
    """In-batch negatives without a similarity matrix, and without taking a row's own item for a negative.

        loss_i = -z(i, i) + logsumexp(z(i, i), z(i, j) for every document j of another item)
        z(i, j) = scale * cos(anchor_i, document_j)

    The documents are the batch's positives and its hard negatives. Where no item repeats this is
    MultipleNegativesRankingLoss, which takes a positive that stands in the batch twice for a negative of
    itself. Memory O(batch x D), so that large batches need no caching for the logits' sake.

    Args:
        model: the SentenceTransformer.
        scale: multiplies the similarity: 1 / temperature.
        similarity: "cosine", or "dot" (scale=1 then).
        same_item: what tells that two documents are one item. "text": their tokens, hard negatives' too.
            "label": a label column of integers, which positives of one item share (its id, or the id of a
            query that has several positives); a hard negative is no item.
        gather_across_devices: the negatives are those of all processes. Batches must be of one size.

    The data set has columns (anchor, positive) or (anchor, positive, negative, ...). Raises ValueError for
    fewer columns, for inputs without tokens under "text", and where labels are missing under "label".

    >>> from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> words = {"red": 0, "green": 1, "blue": 2}
    >>> tokenizer = Tokenizer(models.WordLevel(words, unk_token="red"))
    >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    >>> loss = InBatchSoftmaxLoss(model)
    >>> columns = [model.preprocess(["red", "blue"]), model.preprocess(["green", "green"])]
    >>> loss(columns).item()  # no negative is left, of two that are one
    0.0
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        scale: float = 20.0,
        similarity: str = "cosine",
        same_item: str = "text",
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__()
        check_choice("similarity", similarity, ("cosine", "dot"))
        check_choice("same_item", same_item, ("text", "label"))
        self.model = model
        self.scale = as_float(scale)
        check_scale(self.scale, torch.device("cpu"))
        self.similarity, self.same_item = similarity, same_item
        self.gather_across_devices = check_flag("gather_across_devices", gather_across_devices)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        columns = list(sentence_features)
        if len(columns) < 2:
            raise ValueError(
                f"sentence_features: expected columns (anchor, positive, ...), got {len(columns)} column"
            )
        anchors, *documents = (self.model(dict(column))["sentence_embedding"] for column in columns)
        B = anchors.shape[0]
        weight, items = torch.cat(documents), self._items(columns[1:], documents, labels)
        own, first = items[:B], 0
        if self.gather_across_devices:
            if dist.is_initialized():
                self._check_gathers()
                first = dist.get_rank() * weight.shape[0]
            weight, items = all_gather_with_grad(weight), all_gather(items)
        return sampled_softmax_loss(
            anchors,
            weight,
            torch.arange(first, first + B, device=anchors.device),
            scale=self.scale,
            similarity=self.similarity,
            entry_labels=items,
            target_labels=own,
        )

    def _check_gathers(self) -> None:
        several = dist.get_world_size() > 1 and torch.is_grad_enabled()
        if several and _has_several_losses(_trainer()):
            raise ValueError(
                "gather_across_devices: expected False, as the trainer has several losses and processes, "
                "which are in different losses at a time, got True; or give one loss for all data sets"
            )

    def _items(
        self, columns: list[dict[str, Tensor]], documents: list[Tensor], labels: Tensor | None
    ) -> Tensor:
        """(documents,) int64: equal for what is one item."""
        if self.same_item == "text":
            return torch.cat([_token_hash(column) for column in columns])
        if labels is None:
            raise ValueError('labels: expected a label column for same_item="label", got None')
        positives, hard = _as_classes(labels, len(documents[0])), sum(len(d) for d in documents[1:])
        return torch.cat([positives, positives.new_full((hard,), _NO_ITEM)])

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {
            "scale": float(self.scale),
            "similarity": self.similarity,
            "same_item": self.same_item,
            "gather_across_devices": self.gather_across_devices,
        }


class _KeepsClasses(TrainerCallback):
    """Saves and restores a class matrix; of several losses and processes it makes each step one of all."""

    def __init__(self, loss: ClassSoftmaxLoss, resumed_from: str | Path | None, name: str) -> None:
        self.loss, self.criterion, self.resumed_from, self.name = loss, loss.criterion, resumed_from, name
        self.groups: list[Any] = []  # over whose processes gradients are averaged before a step

    def _folder(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder, generator = self._folder(args, state), self.criterion.generator
        if state.is_world_process_zero:
            torch.save(self.criterion.state_dict(), folder / f"{self.name}.pt")
        if generator is not None:
            folder.mkdir(parents=True, exist_ok=True)  # another process may not have made it yet
            torch.save(generator.get_state(), self._of_generator(folder, args))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = _trainer()
        self._check_name(trainer)
        if state.global_step > 0:
            self._resume(args, state)
        self.groups = []
        if dist.is_initialized() and _has_several_losses(trainer):
            groups = _groups(trainer.model_wrapped)
            self.groups = [group for group in groups if dist.get_world_size(group) > 1]
        if self.groups:
            if args.fp16:  # infinite gradients are looked for before they are averaged
                raise ValueError(
                    "fp16: expected False in a trainer with several losses and processes, got True; take bf16"
                )
            self.loss._send_first(self.groups)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _average_where_any(self.groups, self.loss._own_parameters())

    def _check_name(self, trainer: Any) -> None:
        for other in _callbacks(trainer):
            if other.name == self.name and other.loss is not self.loss:
                raise ValueError(
                    f"name: expected another for each of a trainer's losses, got {self.name!r} twice, of "
                    f"{other.criterion.num_classes} and {self.criterion.num_classes} classes: give "
                    "loss.checkpoints(name=...)"
                )

    def _resume(self, args: Any, state: Any) -> None:
        folder = Path(self.resumed_from or args.resume_from_checkpoint or self._folder(args, state))
        path, generator = folder / f"{self.name}.pt", self.criterion.generator
        if not path.exists():
            raise FileNotFoundError(
                f"resumed_from: expected the checkpoint with the class matrix, found no {path}; give its "
                "folder as checkpoints(resumed_from=...)"
            )
        self.criterion.load_state_dict(torch.load(path, map_location="cpu"))
        if generator is not None and (drawn := self._of_generator(folder, args)).exists():
            generator.set_state(torch.load(drawn))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint:
            path = Path(state.best_model_checkpoint) / f"{self.name}.pt"
            self.criterion.load_state_dict(torch.load(path, map_location="cpu"))

    def _of_generator(self, folder: Path, args: Any) -> Path:
        return folder / f"{self.name}.generator-{args.process_index}.pt"


def _trainer() -> Any:
    """The trainer by which this is called, or None: it hands itself to no loss and no callback."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), Trainer):
            return found
        frame = frame.f_back
    return None


def _callbacks(trainer: Any) -> list[_KeepsClasses]:
    """Of losses over classes."""
    every = trainer.callback_handler.callbacks if trainer else ()
    return [each for each in every if isinstance(each, _KeepsClasses)]


def _has_several_losses(trainer: Any) -> bool:
    """One for each data set: a process' batch is of one, and another's may be of another."""
    losses = getattr(trainer, "loss", None)
    return isinstance(losses, dict) and len(set(losses.values())) > 1


def _groups(model: nn.Module) -> list[Any]:
    """Over whose processes its gradients are averaged, by one after the other; none if it is not wrapped."""
    if isinstance(model, SentenceTransformer):  # under fully_shard it is one still
        shards: list[Any] = [each for each in model.modules() if isinstance(each, FSDPModule)]
        for each in shards:
            each.reshard()  # a forward pass may have left it whole
        parameters = (parameter for each in shards for parameter in each.parameters())
        mesh = next((each.device_mesh for each in parameters if hasattr(each, "device_mesh")), None)
        return [] if mesh is None else mesh.get_all_groups()
    across = getattr(model, "_inter_node_pg", None)  # of FullyShardedDataParallel's HYBRID_SHARD
    return [getattr(model, "process_group", None), *([across] if across else [])]


def _average(group: Any, parameter: Tensor) -> None:
    """In place: the mean over the processes. What was accumulated before is alike on all of them."""
    grad = parameter.grad
    assert grad is not None
    if grad.is_sparse and dist.get_backend(group) == "nccl":
        raise RuntimeError(
            "sparse_grad: expected False in several processes over NCCL, which adds up dense gradients only"
        )
    grad = grad.coalesce() if grad.is_sparse else grad
    dist.all_reduce(grad, group=group)
    parameter.grad = grad.div_(dist.get_world_size(group))


_NO_GRADIENT, _DENSE, _SPARSE = range(3)


def _average_where_any(groups: list[Any], parameters: list[Tensor]) -> None:
    """In place: the mean over the processes, of which those without a gradient have zeros.

    Where none has one there is none, as in one process that has passed a loss over.
    """
    if not groups or not parameters:
        return
    grads = [parameter.grad for parameter in parameters]
    kinds = [_NO_GRADIENT if g is None else _SPARSE if g.is_sparse else _DENSE for g in grads]
    everywhere = torch.tensor(kinds, device=parameters[0].device)
    for group in groups:
        dist.all_reduce(everywhere, dist.ReduceOp.MAX, group)
    for parameter, kind in zip(parameters, everywhere.tolist(), strict=True):
        if kind == _NO_GRADIENT:
            continue
        if parameter.grad is None:
            layout = torch.sparse_coo if kind == _SPARSE else torch.strided
            parameter.grad = _zeros(parameter, layout)
        for group in groups:
            _average(group, parameter)


def _zeros(parameter: Tensor, layout: torch.layout) -> Tensor:
    """A gradient; a sparse one lists no row."""
    if layout == torch.strided:
        return torch.zeros_like(parameter)
    ids = torch.empty(1, 0, dtype=torch.int64, device=parameter.device)
    rows = parameter.detach()[:0]
    return torch.sparse_coo_tensor(ids, rows, parameter.shape, is_coalesced=True, check_invariants=False)


def _as_classes(labels: Tensor, B: int) -> Tensor:
    """(B,) int64; raises TypeError or ValueError for what is not an integer for each text."""
    check_tensor("labels", labels, _INTEGERS)
    labels = labels.reshape(-1).to(torch.int64)
    check_shape("labels", labels, (B,), "one for each text")
    return labels


def _embedding_dim(model: SentenceTransformer) -> int:
    getter = getattr(model, "get_embedding_dimension", None) or model.get_sentence_embedding_dimension
    found = getter()
    if found is None:
        raise ValueError("embedding_dim: expected a number, as the model does not say its own, got None")
    return found


def _token_hash(features: dict[str, Tensor]) -> Tensor:
    """(B,) int64: equal for equal texts, whatever padding; different ones are equal by a chance of 2**-64.

    The sum over a text's tokens of a mixed (token, position), in integers that wrap.
    """
    ids = features.get("input_ids")
    if ids is None:
        raise ValueError(
            'sentence_features: expected "input_ids" for same_item="text", got '
            f'{sorted(features)}; take same_item="label" and a label column'
        )
    starts = features.get("offsets")
    if starts is None and "cu_seq_lens_q" in features:
        starts = features["cu_seq_lens_q"][:-1]
    if starts is None:  # (B, L)
        mask = features.get("attention_mask", torch.ones_like(ids)).to(torch.int64)
        return (_mixed(ids, mask.cumsum(1)) * mask).sum(1)
    ids, starts = ids.reshape(-1), starts.to(torch.int64)  # all texts' tokens, one text after the other
    place = torch.arange(len(ids), device=ids.device)
    row = torch.searchsorted(starts, place, right=True) - 1
    mixed = _mixed(ids, place - starts[row] + 1)
    return torch.zeros(len(starts), dtype=torch.int64, device=ids.device).index_add(0, row, mixed)


def _mixed(token: Tensor, position: Tensor) -> Tensor:
    """Each pair's number as if at random: two rounds of a multiplication and a shift."""
    mixed = token.to(torch.int64) * 0x1E3779B97F4A7C15 + position * 0x3F58476D1CE4E5B9
    for _ in range(2):
        mixed = (mixed ^ (mixed >> 29)) * 0x14D049BB133111EB
    return mixed ^ (mixed >> 32)
