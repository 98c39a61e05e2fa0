"""The data that a configuration names, what is chosen to fit them, and whether the two fit."""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch

from . import private_retrieval
from .algorithms import METHODS, readers
from .clients.player import check_model, num_negatives
from .config import Config, ConfigError
from .config_error import raise_together
from .data import RESIZED, FederatedData, Found, Partition, load
from .data.class_folders import ClassFolders
from .data.holdout import held_out, number_held_out
from .data.images import OnProgress
from .data.partition import Undivided
from .defaults import OWN, PRESETS
from .ledger import WIRE_DTYPES
from .models import SIDES, TAKES, family_of
from .models.vision import unavailable

COHORT = 32  # clients, or all there are where they are fewer
NEGATIVES = PRESETS["sop"]["num_negatives"]  # or a quarter of the classes where that is fewer
WALKED = ("image_folder", "imagenet21k")  # whose classes are the folders that there are
NET = "mobilenet_v3_large"  # the paper's; where it cannot be made one of our own


def options_of_data() -> list[str]:
    """Names of those that say which data, and which client holds what of them."""
    names = [field.name for field in fields(Config)]
    return names[names.index("data") : names.index("method")]


def load_data(
    config: Config,
    on_found: Callable[[Found], None] | None = None,
    on_progress: OnProgress | None = None,
) -> FederatedData:
    """The data set that `config` names; on_found is told what it holds before images are read from files.

    Image files are decoded when they are first read, which may take hours: on_progress(what, done, total) is
    called from the first on, with total 0 where nobody knows it. Raises ConfigError for all that does not
    fit, before images are read, or ValueError and OSError about its files.
    """
    if config.data == OWN:
        raise ConfigError("data", f"{OWN!r} data is handed over in Python, as run(config, data=...)")
    if config.data_dir is not None and not config.data_dir.is_dir():
        raise ConfigError("data_dir", f"no such folder: {config.data_dir}")
    _check_out(config)
    config = with_a_net(config)
    if _resized(config) and config.image_size < 1:
        raise ConfigError("image_size", f"expected at least 1, got {config.image_size}")
    errors = _misfits_of_net(config, (3, config.image_size, config.image_size)) if _resized(config) else []

    def found(what: Found, shape: tuple[int, ...] = ()) -> None:
        """`shape` is of an image, where they are there already."""
        if config.holdout:
            out = number_held_out(what.clients, config.holdout)
            there = out if METHODS[config.method].alone else what.clients - out
            what = replace(what, clients=there)
        of_net = _misfits_of_net(config, shape) if shape else errors
        raise_together([*of_net, *_misfits(fitted(config, what), what)])
        if on_found:
            on_found(what)

    try:
        data = _loaded(config, found, on_progress)
    except ConfigError as error:
        too_many = _too_many(config, error.clients) if isinstance(error, Undivided) else []
        raise_together([error, *too_many, *errors])
        raise
    if not config.holdout:
        return data
    return held_out(data, config.holdout, config.data_seed, alone=METHODS[config.method].alone)


def _loaded(config: Config, on_found: Callable[..., None], on_progress: OnProgress | None) -> FederatedData:
    options: dict[str, Any] = {"skip_damaged": config.skip_damaged, "on_progress": on_progress}
    if config.data == "glyphs":  # drawn, not read
        options = {"num_classes": config.glyph_classes, "writers": config.glyph_writers}
    if _resized(config):
        options |= {"image_size": config.image_size, "on_found": on_found}
        if config.data == "image_folder":
            options["test_share"] = config.test_share
    elif config.image_size:
        raise ConfigError(
            "image_size",
            f"expected 0 for {config.data}, whose images keep their size, got {config.image_size}",
        )
    data = load(
        config.data,
        data_dir=config.data_dir,
        seed=config.data_seed,
        task=config.task,
        cache_dir=config.cache_dir,
        how=Partition(
            config.partition,
            num_clients=config.num_clients,
            images_per_client=config.images_per_client,
            classes_per_client=config.classes_per_client,
            alpha=config.dirichlet_alpha,
        ),
        **options,
    )
    if not _resized(config):
        on_found(data.found, tuple(data.images.shape[1:]))
    return data


def _check_out(config: Config) -> None:
    """Raises ConfigError where the next walk through the data would find the results."""
    if config.out is None or config.data_dir is None or config.data not in WALKED:
        return
    split = ClassFolders(config.data).split(config.data_dir) if config.data == "image_folder" else None
    out = config.out.resolve()
    for folder in split or (config.data_dir,):
        if folder.resolve() in (out, *out.parents):
            expected = f"expected a folder outside of {folder}, where its plots would be images of a class"
            raise ConfigError("out", f"{expected}, got {config.out}")


def _resized(config: Config) -> bool:
    return config.data in RESIZED


# ---- what is chosen to fit


def fitted(config: Config, found: Found) -> Config:
    """The configuration with every number: those that are FITTED are chosen for this data set."""
    config = with_a_net(config)
    chosen: dict[str, Any] = {}
    if config.num_negatives is None:
        chosen["num_negatives"] = min(NEGATIVES, max(1, found.classes // 4))
    if config.cohort is None:
        chosen["cohort"] = min(COHORT, found.clients)
    if found.how is not None and None in (config.images_per_client, config.classes_per_client):
        names = ("num_clients", "images_per_client", "classes_per_client")
        chosen |= {name: getattr(found.how, name) for name in names}
    chosen |= _pace(config)
    return replace(config, **chosen) if chosen else config


def _pace(config: Config) -> dict[str, Any]:
    """How fast it learns: a small net that begins from nothing as on CIFAR, others as the paper's."""
    small = family_of(config.model) in SIDES and config.init_checkpoint is None
    like = PRESETS["cifar10" if small else "sop"]
    pace = {name: like[name] for name in ("client_lr", "scale")}
    pace["warmup_rounds"] = min(like["warmup_rounds"], config.rounds // 10)
    return {name: value for name, value in pace.items() if getattr(config, name) is None}


def other_warmup(before: int, config: Config) -> list[str]:
    """A line where a run of `before` rounds has its default warm-up, and one of config's has another."""
    usual = {rounds: _usual_warmup(replace(config, rounds=rounds)) for rounds in (before, config.rounds)}
    if config.warmup_rounds != usual[before] or usual[before] == usual[config.rounds]:
        return []
    return [
        f"the run goes on with the warm-up it began with, of {usual[before]} rounds; by default one of "
        f"{config.rounds:,} rounds has {usual[config.rounds]}"
    ]


def _usual_warmup(config: Config) -> int:
    unsaid: dict[str, Any] = {"warmup_rounds": None}
    usual = replace(config, **unsaid)  # that of the data set, or None
    found = _pace(usual)["warmup_rounds"] if usual.warmup_rounds is None else usual.warmup_rounds
    assert isinstance(found, int)
    return found


def with_a_net(config: Config) -> Config:
    """With a net, and images of a size for it: of 8 pixels in training it sees 7, as 224 of 256."""
    model, size, crop = config.model, config.image_size, config.crop_size
    if None not in (model, size, crop):
        return config
    if model is None:
        seen = crop or (size if crop == 0 else size and 7 * size // 8)
        model = _small_net(seen) if unavailable(NET) else NET
    whole = SIDES.get(family_of(model), 256)
    if size is None:
        size = -(-8 * crop // 7) if crop else whole
    return replace(config, model=model, image_size=size, crop_size=7 * size // 8 if crop is None else crop)


def _small_net(seen: int | None) -> str:
    """Of our own, for images of so many pixels on a side, None: those it is for. Its grid is 8x8 or more."""
    small = "conv4_rgb"
    if seen is None or seen in range(TAKES[small][1], TAKES[small][2] + 1):
        return small
    return f"isotropic:depth=4,patch={min(8, max(1, seen // 8))}"


def choices(config: Config, found: Found) -> list[str]:
    """What `fitted` chooses, in words for a user, and where the data leave nothing to choose."""
    after = fitted(config, found)
    names = [
        name
        for name in vars(after)
        if getattr(after, name) != getattr(config, name) and config.method in (readers(name) or METHODS)
    ]
    words = ", ".join(f"{name} {getattr(after, name)}" for name in names)
    notes = [f"chosen to fit: {words}"] if words else []
    if METHODS[config.method].samples and after.num_negatives >= found.classes:
        notes.append(f"num_negatives {after.num_negatives}: all other classes, as with full_softmax")
    if METHODS[config.method].pooled:
        taken, images = after.cohort * after.batch_size, found.training
        whole = f": all {images:,}, so without chance" if taken >= images else ""
        of = f"as many images as {after.cohort} clients would, {after.batch_size} each"
        notes.append(f"no federation: a step takes {of}{whole}")
    if config.holdout:
        notes.append(_of_holdout(config, found))
    missing = config.model is None and unavailable(NET)
    return [*notes, f"{NET} needs torchvision (fedss doctor)"] if missing else notes


def _of_holdout(config: Config, found: Found) -> str:
    """`found`, of all the images, has the clients who train."""
    share = f"--holdout {config.holdout:g}: of the {found.training:,} images"
    if METHODS[config.method].alone:
        return f"{share} those of the clients held out are there alone, some of each in the test"
    return f"{share} those of the clients held out are the test, not the {found.test:,}"


# ---- whether they fit


def check_data(config: Config, data: FederatedData) -> None:
    """Raises ConfigError, of all that is wrong, if the run and the data do not fit."""
    errors = [*_misfits(config, data.found), *_lonely(config, data)]
    raise_together([*errors, *_misfits_of_net(config, tuple(data.images.shape[1:]))])


def trivial(config: Config, data: FederatedData, afar: bool = False) -> list[str]:
    """A line each on images that train or measure nothing; of clients' that are `afar` nobody knows."""
    lines = [] if config.holdout or afar else _unheld(data)
    return [*lines, *(_unrelated(data) if data.task == "retrieval" else [])]


def _unheld(data: FederatedData) -> list[str]:
    """Where images are no client's, or test images of classes of which no client has one."""
    held, lines = torch.zeros(len(data.images), dtype=torch.bool), list[str]()
    held[torch.cat(data.clients)] = True
    if lost := int((~held).sum()):
        lines.append(f"training images that are no client's, and are not there: {lost:,} of {len(held):,}")
    learned = torch.zeros(data.num_classes, dtype=torch.bool)
    learned[data.labels[held]] = True
    if data.task == "classification" and (lost := int((~learned[data.test_labels]).sum())):
        of = f"{lost:,} of {len(data.test_labels):,}"
        lines.append(f"test images of classes of which no client has an image: {of}")
    return lines


def _unrelated(data: FederatedData) -> list[str]:
    """Where all images of a retrieval's test are of one class, or some alone in theirs."""
    counts = data.test_labels.unique(return_counts=True)[1]
    if len(counts) == 1:
        words = "all test images are of one class, so every retrieval is right"
        return [f"{words}: MAP@10 and recall@1 mean nothing"]
    alone = int((counts == 1).sum())
    if not alone:
        return []
    of = f"test classes of one image, for which nothing right can be found: {alone:,} of {len(counts):,}"
    return [f"{of}; MAP@10 and recall@1 count them as misses"]


def dearer(config: Config, data: FederatedData) -> list[str]:
    """A line where clients ask in private for so many rows that all of them would be fewer bytes."""
    if not config.private:
        return []
    num_classes, clients = data.num_classes, len(data.clients)
    held = [len(data.labels[images].unique()) for images in data.clients]
    samples = METHODS[config.method].samples
    asked = sum(P + samples * num_negatives(config, P, num_classes) for P in held)
    moved = private_retrieval.traffic(num_classes, asked, config.row_dim, config.wire_dtype).total / clients
    whole = num_classes * config.row_dim * WIRE_DTYPES[config.wire_dtype].itemsize
    if moved < whole:
        return []
    rows = f"{asked / clients:.0f} of {num_classes:,} rows from two servers are {moved / 1000:,.0f} KB"
    cheaper = "full_softmax moves less and tells no more"
    return [f"requests pir: {rows} for a client and round, all rows {whole / 1000:,.0f} KB: {cheaper}"]


def _misfits(config: Config, found: Found) -> list[ConfigError]:
    errors = _too_many(config, found.clients)
    if found.test < 2:
        errors.append(ConfigError("data", f"expected at least 2 test images, got {found.test}"))
    return errors


def _too_many(config: Config, clients: int) -> list[ConfigError]:
    """Of a cohort, where that is no number chosen to fit."""
    if config.cohort is None or config.cohort <= clients:
        return []
    return [ConfigError("cohort", f"expected at most {clients}, the clients there are, got {config.cohort}")]


def _lonely(config: Config, data: FederatedData) -> Iterator[ConfigError]:
    """Clients who could never train: by a contrastive loss an image is told from the others of its client."""
    if METHODS[config.method].contrastive and (alone := sum(len(held) < 2 for held in data.clients)):
        expected = f"expected at least 2 images of each client with {config.method}"
        yield ConfigError("method", f"{expected}, got clients with one: {alone:,} of {len(data.clients):,}")


def _misfits_of_net(config: Config, shape: tuple[int, ...]) -> list[ConfigError]:
    """Of images of this shape, (channels, height, width)."""
    if config.model == OWN:
        return []
    try:
        check_model(config, shape)
    except ConfigError as error:
        return [error]
    return []
