"""What every process that plays clients has: the data, one model, the method. All made once."""

import os
from collections.abc import Container
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...class_sets import draw_negatives
from .. import private_retrieval, secure_sums
from ..algorithms import METHODS
from ..algorithms.checks import checked_loss, checked_passes, checked_penalty, checked_request
from ..algorithms.parts import Part, Parts
from ..algorithms.schedule import Schedule
from ..cohort import num_absent
from ..config import STICKY, Config, ConfigError
from ..data import FederatedData
from ..defaults import OWN
from ..files.fingerprint import Fingerprint
from ..files.half_file import half_of
from ..files.method_numbers import method_numbers
from ..files.schedule_numbers import schedule_numbers
from ..learning_rate import learning_rate
from ..ledger import FLOWS, Traffic, client_traffic
from ..messages import Request, Update, clipped, norm, numbers
from ..models import TAKES, build_model, refuse_batch_norm
from ..models.blocks import blocks_of
from ..models.bottleneck import Bottleneck, narrowed
from ..models.copies import copied
from ..models.layered import check_layered
from ..models.projection import projection_head
from ..models.vision import load_checkpoint
from ..randomness import NO_CLIENT, Purpose, generator, initial_rows
from .augment import Augmentation, as_input, centre_crop
from .client import Client
from .common_classes import CommonClassSets
from .contrastive import ContrastiveClient, MomentumClient
from .extractor import CPU, Extractor, as_embeddings, check_parameters
from .poison import poisoned
from .pooled import PooledClient
from .views import Views

EVALUATION_BATCH = 512  # test images
_ROWS = {  # as the ledger calls it
    Part.TRAINED: "travel",
    Part.KNOWN: "seed",
    Part.HOME: "home",
    Part.ABSENT: "none",
}
_NO_CLASSES = torch.empty(0, dtype=torch.int64)


class Player:
    """Plays any client in any round. What comes out is a function of the arguments alone, in any process."""

    def __init__(
        self,
        config: Config,
        data: FederatedData,
        model: nn.Module | None = None,
        device: torch.device = CPU,  # where clients train; what comes and goes is in main memory
    ):
        self.config, self.data = config, data
        self.method = METHODS[config.method].configured(config.settings)
        module = copied(model) if model is not None else _build_model(config)
        module = _to_be_cut(module, config, _check_model(module, config, data.images[:2]))
        blocks = [block for _, block in blocks_of(module)] if self.method.by_block else []
        head = projection_head(config.embedding_dim, config.seed) if self.method.contrastive else None
        self.extractor = Extractor(module, config.crop_size, device, blocks, head)
        options: dict[str, Any] = {
            "schedule": checked_passes(self.method, config.local_epochs, config.head_epochs),
            "batch_size": config.batch_size,
            "scale": config.scale,
            "seed": config.seed,
            "similarity": config.similarity,
            "momentum": config.client_momentum,
            "augmentation": Augmentation(config.crop_size, config.max_shift, config.flip),
            "loss": checked_loss(self.method),
            "penalty_gradient": checked_penalty(self.method),
        }
        self.client: Client
        if self.method.pooled and not self.method.split:
            self.client = PooledClient(self.extractor, data, cohort=config.cohort, **options)
        elif self.method.contrastive:
            options |= {"views": views_of(config, data), "temperature": config.temperature}
            if self.method.queued:
                options |= {"queue_size": config.queue_size, "ema": config.ema}
                self.client = MomentumClient(self.extractor, data, **options)
            else:
                self.client = ContrastiveClient(self.extractor, data, **options)
        else:
            self.client = Client(self.extractor, data, **options)

    def num_images(self, client: int) -> int:
        return len(self.client.data.clients[client])

    @cached_property
    def most_images(self) -> int:
        """That any client has; one that knows of itself alone is told."""
        return max(map(len, self.client.data.clients))

    def request(self, round: int, attempt: int, client: int) -> Request:
        """What the client asks for. Raises ConfigError, of the method, for what it cannot."""
        if self.config.shares:
            common = self.common.of(round, attempt)
            return replace(self.request_of(common.held, common.negatives), sends_ids=False)
        if self.method.contrastive:  # nobody reads a label
            return self.request_of(_NO_CLASSES, _NO_CLASSES)
        positives = self.client.positives(client)
        samples = self.method.samples
        negatives = self._negatives(round, attempt, client, positives) if samples else _NO_CLASSES
        request = self.request_of(positives, negatives)
        return replace(request, sends_ids=False) if self.config.private else request

    def request_of(self, positives: Tensor, negatives: Tensor) -> Request:
        """Of a client with these classes, for which these others were drawn. Raises ConfigError."""
        num_classes = self.data.num_classes
        found = self.method.request(num_classes, positives, negatives, self.config.correction)
        return checked_request(self.method, found, num_classes, positives)

    @cached_property
    def common(self) -> CommonClassSets:
        """The class sets of cohorts, where they have them in common."""
        data = self.data
        return CommonClassSets(self.config, data.num_classes, len(data.clients), self.client.positives)

    def _negatives(self, round: int, attempt: int, client: int, positives: Tensor) -> Tensor:
        """New ones, or a share of them that is the same in every round."""
        config, num_classes = self.config, self.data.num_classes
        m = num_negatives(config, len(positives), num_classes)
        kept = positives[:0]
        if STICKY[config.negatives]:
            rng = generator(config.seed, 0, 0, client, Purpose.STICKY_NEGATIVES)
            kept = draw_negatives(num_classes, positives, int(STICKY[config.negatives] * m), rng)
        rng = generator(config.seed, round, attempt, client, Purpose.NEGATIVES)
        others = torch.cat([positives, kept])
        return torch.cat([kept, draw_negatives(num_classes, others, m - len(kept), rng)])

    @cached_property
    def schedule(self) -> Schedule:
        """Where the parts of the model stand in a round."""
        return self.method.schedule(self.config, len(self.extractor.block_sizes))

    @property
    def num_projecting(self) -> int:
        """Numbers of the projection head; 0 where there is none."""
        return self.extractor.block_sizes[-1] if self.method.contrastive else 0

    def new_head(self, round: int) -> Tensor | None:
        """The projection head's numbers where a round begins with a new one."""
        config, stage = self.config, self.schedule.stage
        if config.projection == "kept" or stage(round) == stage(round - 1):
            return None
        head = projection_head(config.embedding_dim, config.seed, stage(round))
        return torch.cat([p.detach().flatten() for p in head.parameters()])

    def num_trained(self, round: int) -> int:
        """Numbers of the net that come back from each client of a round."""
        return self._num(self.schedule.whole(round), Part.TRAINED)

    def _num(self, parts: Parts, which: Part, without: Container[int] = ()) -> int:
        """Of the blocks that stand there, without those in some places."""
        sizes = zip(self.extractor.block_sizes, parts.blocks, strict=True)
        return sum(size for place, (size, part) in enumerate(sizes) if part is which and place not in without)

    @property
    def num_at_home(self) -> int:
        """Numbers that a client keeps from round to round: its rows, and its net where that stays too."""
        rows = self.data.num_classes * self.config.row_dim if self.method.personal else 0
        return rows + (len(self.extractor.flat) if self.method.alone else 0)

    @property
    def flows(self) -> tuple[str, ...]:
        """What moves between the server and a client, as the ledger has it."""
        flows = FLOWS[_ROWS[self.method.rows]]
        if self.config.shares:
            flows = (*(flow for flow in flows if flow != "up_ids"), *secure_sums.FLOWS)
        if self.config.private:
            named = "up_ids", "down_rows"
            others = (*private_retrieval.FLOWS, *secure_sums.SUM_FLOWS)
            flows = (*(flow for flow in flows if flow not in named), *others)
        last = self.schedule.whole(self.config.rounds - 1)
        return (*flows, "down_frozen") if self._num(last, Part.FROZEN) else flows

    def traffic(
        self,
        round: int,
        attempt: int,
        client: int,
        request: Request,
        *,
        answers: bool,
        has: Container[int] = (),
    ) -> Traffic:
        """Of one client in one round, which `has` frozen blocks in these places already."""
        if self.method.pooled:
            return Traffic()  # nothing leaves its place
        parts = self.schedule.parts(round, attempt, client)
        moved = client_traffic(
            self._num(parts, Part.TRAINED) - self.num_projecting,
            len(request.class_ids),
            self.config.row_dim,
            rows=_ROWS[self.method.rows],
            frozen=self._num(parts, Part.FROZEN, without=has),
            projection=self.num_projecting,
            sends_ids=request.sends_ids,
            answers=answers,
            dtype=self.config.wire_dtype,
        )
        if self.config.private:
            return self._in_private(moved, round, attempt, len(request.class_ids), answers=answers)
        return self._by_sums(moved, round, attempt, answers=answers) if self.config.shares else moved

    def _in_private(
        self, moved: Traffic, round: int, attempt: int, num_rows: int, *, answers: bool
    ) -> Traffic:
        """What moves where two servers are asked for rows, and changes of all rows are added by a sum."""
        config, num_classes = self.config, self.data.num_classes
        absent = num_absent(config, len(self.data.clients), round, attempt)
        up_rows = secure_sums.INTEGER_BYTES * num_classes * config.row_dim * answers
        kept = {flow: count for flow, count in moved.bytes.items() if flow not in ("up_ids", "down_rows")}
        return (
            Traffic(kept | {"up_rows": up_rows})
            + private_retrieval.traffic(num_classes, num_rows, config.row_dim)
            + secure_sums.of_one_sum(config.cohort, absent, answers=answers)
        )

    def _by_sums(self, moved: Traffic, round: int, attempt: int, *, answers: bool) -> Traffic:
        """What moves where changes are added by a secure sum, for what moves where they are sent."""
        config, common = self.config, self.common.of(round, attempt)
        left_out = config.row_dim * len(common.few(config.min_holders))
        num_ids = len(common.held) + len(common.negatives)
        sums = secure_sums.traffic(
            self.data.num_classes, num_ids, config.cohort, common.absent, answers=answers
        )
        up_rows = moved["up_rows"] - secure_sums.INTEGER_BYTES * left_out * answers
        bytes = {flow: count for flow, count in moved.bytes.items() if flow != "up_ids"}
        return Traffic(bytes | {"up_rows": up_rows}) + sums

    @property
    def store_size(self) -> tuple[int, int]:
        """(rows, numbers in each) of a class store: of the class matrix, or of what clients have at home."""
        if self.method.personal:
            return len(self.client.data.clients), self.num_at_home
        return self.data.num_classes, self.config.row_dim

    def num_given(self, request: Request) -> int:
        """Numbers that a client needs for its round beside phi: class rows, or what it has at home."""
        if self.method.personal:
            return self.num_at_home
        return 0 if self.method.rows is not Part.TRAINED else len(request.class_ids) * self.config.row_dim

    def known_rows(self, class_ids: Tensor) -> Tensor:  # (S,) -> (S, D)
        """Of the initial W, which every process draws from the seed for itself."""
        config = self.config
        return initial_rows(config.seed, class_ids, config.row_dim, config.weight_init_scale)

    def update(
        self, round: int, attempt: int, client: int, request: Request, phi: Tensor, given: Tensor
    ) -> Update:
        """What it sends back for phi (P,), and for its rows or what it has at home (num_given,)."""
        lr, parts = learning_rate(self.config, round), self.schedule.parts(round, attempt, client)
        rows = self.known_rows(request.class_ids) if parts.rows is Part.KNOWN else given
        if parts.net_at_home:
            rows, phi = given.tensor_split([len(given) - len(phi)])
        rows = rows.view(len(request.class_ids), self.config.row_dim)
        update = self.client.update(client, round, attempt, request, phi, rows, lr, parts)
        if self.config.poison_rate and not self.method.pooled:
            rng = generator(self.config.seed, round, attempt, client, Purpose.POISON)
            if rng.random() < self.config.poison_rate:
                return poisoned(update, self.data.num_classes, rng)
        return self._for_a_sum(update, round, attempt) if self.config.sums else update

    def _for_a_sum(self, update: Update, round: int, attempt: int) -> Update:
        """As the sum has it: without rows that few hold, clipped, rounded; not so where it is to be left out.

        Of a row that it did not ask for a client adds 0, which is a whole level: exactly nothing. Whoever
        adds it up sees the sum alone, so all of this is the client's to do.
        """
        config, few = self.config, _NO_CLASSES
        if config.shares:
            few = self.common.of(round, attempt).few(config.min_holders)
        kept = ~torch.isin(update.class_ids, few)
        update = replace(update, rows=update.rows.masked_fill(~kept[:, None], 0))
        if config.clip_norm is not None and norm(update) <= config.max_norm:
            update = clipped(update, config.clip_norm)
        if not all(secure_sums.fits(part) for part in numbers(update)):
            return update
        rng = generator(config.seed, round, attempt, update.client, Purpose.SECURE_SUM)
        weight = update.num_examples / self.most_images
        rows = update.rows  # its own by now
        rows[kept] = secure_sums.quantised(rows[kept], weight, rng)
        return replace(update, rows=rows, extractor=secure_sums.quantised(update.extractor, weight, rng))

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the data, the net as it begins and the method, which a resumed run must share."""
        return Fingerprint.of(self.data, self.extractor.module, self.extractor.embed, self.method_numbers)

    @property
    def method_numbers(self) -> list[float]:
        """Of the method in this run. Raises ConfigError for parts that cannot be."""
        method, config, by_round = self.method, self.config, self.method.by_round is not None
        numbers = method_numbers(method, config, self.data.num_classes)
        return numbers + schedule_numbers(self.schedule, config, len(self.data.clients), by_round=by_round)

    def embed(self, phi: Tensor, round: int, part: int = 0, parts: int = 1) -> list[Tensor]:
        """The test images' embeddings by the net of a round: batches, every `parts`-th, from `part` on."""
        self.extractor.flat.copy_(phi)
        batches, present = self.data.test_images.split(EVALUATION_BATCH), self.schedule.whole(round).present
        return [self.extractor.embed(batch, present=present) for batch in batches[part::parts]]

    def embedded(self, part: int, parts: int) -> list[tuple[int, int]]:
        """Shapes of what `embed` makes."""
        batches = self.data.test_images.split(EVALUATION_BATCH)
        return [(len(batch), self.config.embedding_dim) for batch in batches[part::parts]]


def num_negatives(config: Config, held: int, num_classes: int) -> int:
    """min(m, C - |P|): what a client with so many classes asks for besides them."""
    more = held - 1 if config.equal_pushes and not METHODS[config.method].own_push else 0
    return min(config.num_negatives + more, num_classes - held)


def training_device(config: Config, rank: int = 0) -> torch.device:
    """Of the worker of this rank on its machine. Raises ConfigError where there is no GPU."""
    if config.device == "cpu":
        return CPU
    if not torch.cuda.is_available():
        raise ConfigError("device", "expected cpu, as torch finds no GPU here, got 'cuda'")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())


def _build_model(config: Config) -> nn.Module:
    if config.model == OWN:
        raise ConfigError("model", f"{OWN!r} model is handed over in Python, as run(config, model=...)")
    built = build_model(config.model, config.embedding_dim, config.seed)
    if config.init_checkpoint is None:
        return built
    try:
        return load_checkpoint(built, config.init_checkpoint)
    except ValueError as error:
        raise ConfigError("init_checkpoint", str(error)) from None


def check_model(config: Config, shape: tuple[int, ...]) -> None:
    """Raises ConfigError where the named model can't be made or take images (channels, height, width)."""
    try:
        module = _build_model(config)
        _to_be_cut(module, config, _check_model(module, config, torch.zeros(2, *shape, dtype=torch.uint8)))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError("model", str(error).removeprefix("model: ")) from None


def _narrowed(module: nn.Module, config: Config, images: Tensor) -> nn.Module:
    """With the bottleneck at its cut, if there is to be one. Raises ConfigError where it does not fit."""
    if config.bottleneck is None:
        return module
    rng = generator(config.seed, 0, 0, NO_CLIENT, Purpose.BOTTLENECK)
    seed = int(rng.integers(2**63))
    try:
        return narrowed(module, config.cut, Bottleneck.read(config.bottleneck), images, seed)
    except ValueError as error:
        raise ConfigError("bottleneck", str(error).removeprefix("bottleneck: ")) from None


def _to_be_cut(module: nn.Module, config: Config, images: Tensor) -> nn.Module:
    """As split learning begins with it. Raises ConfigError where it cannot."""
    if not METHODS[config.method].split:
        return module
    module, half = _narrowed(module, config, images), half_of(config)
    if half is not None:
        try:
            module.load_state_dict(half.net)
        except RuntimeError:
            raise ConfigError("half_checkpoint", f"{config.half_checkpoint} is of another net") from None
    return module


def _check_model(module: nn.Module, config: Config, pixels: Tensor) -> Tensor:
    """These images as the module takes them.

    Raises ValueError unless it maps them to (B, D) and can be averaged.
    """
    refuse_batch_norm(module)
    check_parameters(module)
    module.eval()
    images = as_input(pixels)
    if config.crop_size:
        if config.crop_size > min(images.shape[2:]):
            raise ConfigError(
                "crop_size",
                f"expected at most {min(images.shape[2:])}, the images' pixels, got {config.crop_size}",
            )
        images = centre_crop(images, config.crop_size)
    if config.max_shift >= min(images.shape[2:]) and not METHODS[config.method].rowless:
        raise ConfigError(
            "max_shift",
            f"expected less than {min(images.shape[2:])}, the pixels on a side that the net sees, got "
            f"{config.max_shift}",
        )
    try:
        with torch.no_grad():
            returned = module(images)
    except Exception as error:  # a module of one's own may raise anything
        shape = "x".join(map(str, images.shape[1:]))
        others = "" if config.model == OWN else f"; {_who_takes_what()}"
        raise ValueError(
            f"model: {config.model} can't take images of {shape} (channels, height, width): "
            f"{type(error).__name__}: {error}{others}"
        ) from None
    embeddings = as_embeddings(returned)
    expected = (len(images), config.embedding_dim)
    if tuple(embeddings.shape) != expected or not embeddings.is_floating_point():
        raise ValueError(
            f"model: expected floating embeddings of shape {expected} for {expected[0]} images "
            f"(embedding_dim {config.embedding_dim}), got {tuple(embeddings.shape)} {embeddings.dtype}"
        )
    method = METHODS[config.method]
    if method.by_round:
        one_shape = config.depth_budget is not None
        check_layered(module, images, one_shape=one_shape, needed_by=method.name)
        method.schedule(config, len(blocks_of(module)) + method.contrastive)
    return images


def views_of(config: Config, data: FederatedData) -> Views:
    """What a method without labels sees of the images, as large as the net takes them."""
    method, size = METHODS[config.method], config.crop_size or min(data.images.shape[2:])
    return Views("moco" if method.queued or method.split else "simclr", size, config.smallest_box)


def _who_takes_what() -> str:
    sizes = [
        f"{name} {channels}x{least}x{least} to {channels}x{most}x{most}"
        for name, (channels, least, most) in TAKES.items()
    ]
    return (
        f"nets take: {', '.join(sizes)}, vit those of its setting side, the others any, as isotropic with an "
        "embedding_dim that is a multiple of 32"
    )
