"""One federated run, described completely: what is learned, from which data, how, with which numbers.

`Config` is the only list of the simulator's options. Each is declared once, with its default, its bounds and
its help; the checks, the command line, the saved config.json and the report's table of settings are all made
from that.
"""

import dataclasses
import json
import types
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .algorithms import METHODS
from .algorithms.method import PIR, SHARED, STICKY
from .algorithms.mocosfl import CLIENT_GRADIENTS, MOMENTUM_COPIES, SYMMETRIC, VELOCITIES
from .algorithms.own_numbers import check_known, own_numbers
from .clashes import clashes
from .config_error import ConfigError, did_you_mean, raise_together
from .config_option import checked, option
from .data import DATASETS, PARTITIONS, TASKS
from .data.image_folder import TEST_SHARE
from .defaults import EVAL_EVERY, FITTED, LINEAR, OWN, PRESETS, preset
from .disk import write_whole
from .ledger import WIRE_DTYPES
from .models import FEATURES, MODELS, family_of

if TYPE_CHECKING:
    from typing import Self  # Python 3.10 has none

MAX_NORM = 1000.0
PRESET = None  # the default of an option that defaults.py decides


@dataclass(frozen=True)
class Config:
    """The settings of one run. Raises ConfigError, a ValueError: the option, what was expected, what came.

    Options whose default is decided by the data set (PRESETS) are filled in as the object is made, but for
    those that are FITTED: they are None until the data are found. The warm-up is by default at most a tenth
    of the rounds.

    A run is judged by its headline: top-1, MAP@10 of a retrieval, the own top-1 of a method with a model for
    each client, or with personalise_epochs the personalised top-1. A comparison that is to choose client_lr
    takes for each method the rate with the best headline on clients who do not train. Where class rows stay
    with the clients that is always after fine-tuning, as those who did not train have none of their own; of
    local_only it is by these clients alone, who train each by itself.
    """

    data: str = option("glyphs", "the data set", choices=lambda: (*DATASETS, OWN))
    data_dir: Path | None = option(None, "the folder that holds the data set's files, where it needs some")
    data_seed: int = option(0, "the seed of a data set that is drawn; --seed does not touch it", low=0)
    cache_dir: Path | None = option(
        None,
        "the folder for prepared data, none: $FEDSS_CACHE, else fedss-kernels in $XDG_CACHE_HOME or ~/.cache",
    )
    task: str = option(
        PRESET,
        "classification: unseen images of known classes; retrieval: images of classes that nobody trained on",
        choices=lambda: TASKS,
    )
    holdout: float = option(
        0.0,
        "share of the training clients who do not train: the test is on their images; 0: the data's own test",
        low=0,
        below=1,
    )
    image_size: int = option(
        PRESET,
        "pixels on a side to which image files are resized, 0 for data whose images keep their size",
        low=0,
        below=2**15,
    )
    test_share: float = option(
        TEST_SHARE,
        "of image_folder without folders train and test: the share of the classes that is the test of a "
        "retrieval, of each class' images that of a classification",
        above=0,
        below=1,
    )
    skip_damaged: bool = option(
        False, "go on without image files that are missing, damaged or cannot be read, and say how many"
    )
    partition: str = option(
        PRESET,
        "which client holds which image: natural, its author; classes, so many classes each; dirichlet, of "
        "shares of the classes that are drawn for each; iid, at random",
        choices=lambda: PARTITIONS,
    )
    num_clients: int = option(
        PRESET, "clients of a partition but the natural, 0: as many as images_per_client makes", low=0
    )
    images_per_client: int = option(PRESET, "images of a client, about, where num_clients is 0", low=1)
    classes_per_client: int = option(PRESET, "classes of a client in the partition classes", low=1)
    dirichlet_alpha: float = option(
        0.5, "how alike clients are in the partition dirichlet, the larger the more", above=0
    )
    glyph_classes: int = option(540, "classes of the data set glyphs", low=2, below=10**5)
    glyph_writers: int = option(800, "writers, that is clients, of the data set glyphs", low=1, below=10**6)

    method: str = option("fedss", "how to train", choices=lambda: tuple(METHODS))
    num_negatives: int = option(PRESET, "classes that a client trains with besides its own", low=0)
    equal_pushes: bool = option(
        False,
        "neg_only asks for |P| - 1 more, so that an image is pushed from as many classes as with fedss",
    )
    negatives: str = option(
        "fresh",
        "what a client takes besides its own classes: fresh, others in every round; sticky, always the same; "
        "mixed, half of each; shared, of fedss, the same for a whole cohort, with the classes of all of it: "
        "by secure sums, so that the server sees no client's classes or changes",
        choices=lambda: (*STICKY, SHARED),
    )
    min_holders: int = option(
        1, "with shared negatives: a class row that fewer of the cohort hold is not trained", low=1
    )
    requests: str = option(
        "plain",
        "how a client asks for class rows: plain, by their numbers; pir, of two servers, neither of which "
        "learns which, and its changes go into a secure sum over all rows",
        choices=lambda: ("plain", PIR),
    )
    correction: str = option(
        "negatives",
        "negatives: logits of classes that are not the client's own are corrected for how rarely they are "
        "drawn; none: they are not",
        choices=lambda: ("negatives", "none"),
    )
    denominator: str = option(
        "cohort",
        "what a class row's average divides by: the images of the whole cohort, or of the row's holders only",
        choices=lambda: ("cohort", "holders"),
    )
    settings: dict[str, float] = option(
        None,
        "numbers of a method's own, by name; those that are not given are as the method has them",
        hashed=False,
    )

    spreadout_weight: float = option(0.1, "of fedaws: how hard near class rows are pushed apart", low=0)
    spreadout_margin: float = option(
        0.9, "of fedaws: rows are near where 1 - cosine is below this", above=0, below=2.0001
    )
    spreadout_neighbours: int | None = option(
        10, "of fedaws: the nearest rows that a row is pushed away from, none: all", low=1
    )
    spreadout_rows: int | None = option(
        1024, "of fedaws: rows whose neighbours are looked at in a round, none: all", low=1
    )

    temperature: float = option(
        PRESET,
        "of simclr, layerwise, mocosfl, central_moco and fl_moco: what cosines of two views are divided by "
        "in the loss",
        above=0,
    )
    smallest_box: float | None = option(
        None,
        "of simclr, layerwise, mocosfl, central_moco and fl_moco: least share of an image in a view of it, "
        "none: as the method's authors have it, .2 with SimCLR, .08 with MoCo",
        above=0,
        below=1.0000001,
    )
    stages: int | None = option(
        None, "of layerwise: stages that the rounds are cut into, none: one for each block of the net", low=1
    )
    depth_budget: int | None = option(
        None,
        "of layerwise: blocks that a client holds at most, frozen ones left out at random, none: all",
        low=2,
    )
    freeze: str = option(
        "yes",
        "of layerwise: yes, blocks of earlier stages stay as they are; no, they go on being trained",
        choices=lambda: ("yes", "no"),
    )
    frozen: str = option(
        "sent",
        "of layerwise: frozen blocks are sent in every round, or kept, by a client that had them before",
        choices=lambda: ("sent", "kept"),
    )
    projection: str = option(
        "kept",
        "of layerwise: the projection head in a new stage: kept, it goes on; new, it is drawn anew",
        choices=lambda: ("kept", "new"),
    )
    cut: int = option(1, "of mocosfl: blocks that clients have, of the net's first", low=1)
    bottleneck: str | None = option(
        None,
        "of mocosfl: the cut is narrow: C4S2, 4 channels at half the height and width cross it, none: as the "
        "net has it",
    )
    sync_period: int = option(
        50, "of mocosfl: steps between two averages of the clients' blocks; a round ends with one", low=1
    )
    round_steps: int = option(
        0, "of mocosfl, central_moco: steps in a round, 0: as a client has batches on average", low=0
    )
    queue_size: int = option(6000, "of mocosfl, central_moco, fl_moco: keys that a query is told from", low=1)
    private_queues: bool = option(
        False, "of mocosfl: each client has a queue of its own, its share of the keys, and no one else's keys"
    )
    key_dim: int = option(1024, "of mocosfl and central_moco: numbers in a key", low=1, below=2**16)
    ema: float = option(
        0.99,
        "of mocosfl, central_moco, fl_moco: what a momentum copy keeps of itself",
        low=0,
        below=1.0000001,
    )
    symmetric: str = option(
        "server",
        "of mocosfl and central_moco: the loss of the second view, too: server, of what clients have sent; "
        "full, of two more latents that they send; none",
        choices=lambda: SYMMETRIC,
    )
    in_turn: bool = option(
        False, "of mocosfl: the server steps on each client's latents by themselves, one after the other"
    )
    client_gradient: str = option(
        "sent",
        "of mocosfl: what a client steps along: sent, the gradient of the mean loss of all clients' images; "
        "own, of its own images, which is as many times that as there are clients",
        choices=lambda: CLIENT_GRADIENTS,
    )
    momentum_copies: str = option(
        "averaged",
        "of mocosfl: clients' momentum copies are averaged as their blocks are, kept by each for itself, or "
        "reset to the average of the blocks",
        choices=lambda: MOMENTUM_COPIES,
    )
    velocities: str = option(
        "averaged",
        "of mocosfl: so are the velocities of their steps averaged, kept, or zeroed",
        choices=lambda: VELOCITIES,
    )
    freeze_clients: bool = option(
        False, "of mocosfl: clients' blocks stay as they are: no gradients come down and nothing is averaged"
    )
    half_checkpoint: Path | None = option(
        None,
        "of mocosfl: a file of fedss harden, of the same net, cut and bottleneck, whose halves a run begins "
        "with; clients' stay as they are",
    )
    weight_decay: float = option(5e-4, "of mocosfl and central_moco: of all of the net", low=0)

    rounds: int = option(PRESET, "rounds of training", low=1)
    cohort: int = option(PRESET, "clients drawn for each round", low=1)
    local_epochs: int = option(1, "passes of a client over its images in one round", low=1)
    head_epochs: int = option(
        1,
        "of fedrep: passes in which a client trains its class rows alone, before the local_epochs of the net",
        low=0,
    )
    batch_size: int = option(PRESET, "images in one local step of a client", low=1, below=2**31)
    client_lr: float = option(PRESET, "learning rate of the clients, at its highest", above=0)
    client_momentum: float = option(
        PRESET,
        "momentum of a client's steps, over the net and its class rows; it starts from 0 in every round",
        low=0,
        below=1,
    )
    warmup_rounds: int = option(
        PRESET,
        "rounds over which the clients' rate rises to client_lr; by default at most a tenth of all",
        low=0,
        below=2**31,
    )
    lr_decay: str = option(
        PRESET,
        "the clients' rate after the warm-up: constant; linear or cosine, down to 0; step, a tenth from half "
        "of the rounds on, a hundredth from three quarters",
        choices=lambda: ("constant", "linear", "cosine", "step"),
    )
    max_shift: int = option(
        PRESET, "pixels by which a client moves each training image at random, at most", low=0, below=1024
    )
    flip: bool = option(
        False,
        "flip each training image from left to right with probability 1/2: wrong for drawings of characters",
    )
    crop_size: int = option(
        PRESET,
        "pixels on a side of the square of each image that the net sees, anywhere in it in training, else in "
        "the middle, 0: the whole image",
        low=0,
    )
    wire_dtype: str = option(
        "float32",
        "what numbers are rounded to on their way to a client and back; the server keeps float32",
        choices=lambda: tuple(WIRE_DTYPES),
    )
    dropout_rate: float = option(0.0, "share of the drawn clients that never answer", low=0, below=1)
    deadline: float | None = option(
        None,
        "how long the server waits for answers, in the time of the median client, none: for all",
        above=0,
    )
    latency_spread: float = option(
        0.5, "standard deviation of the logarithm of the clients' times, for the deadline", low=0
    )
    min_clients: int = option(
        1, "least answers that make a round; with fewer it is tried again with other clients", low=1
    )
    trust_updates: bool = option(False, "count every answer, unchecked")
    max_norm: float = option(MAX_NORM, "an answer whose changes have a larger norm is left out", above=0)
    max_norm_ratio: float = option(
        30.0, "so is one with a norm more than this many times the round's median, and 1% of the net's", low=1
    )
    clip_norm: float | None = option(
        None, "scale changes of a larger norm down to it, none: leave them", above=0
    )
    aggregation: str = option(
        "mean",
        "how the clients' changes are averaged: mean, by their images, or each number's median or "
        "trimmed_mean, unweighted",
        choices=lambda: ("mean", "median", "trimmed_mean"),
    )
    trim: float = option(0.1, "share that trimmed_mean leaves out at either end", low=0, below=0.5)
    noise_multiplier: float = option(
        0.0,
        "for differential privacy: standard deviation, in clip_norms, of the noise on the sum of the "
        "clients' changes, which then all weigh the same",
        low=0,
        below=1e6,
    )
    delta: float | None = option(
        None,
        "of differential privacy: the chance that epsilon does not hold, none: 1 / N^1.1, N clients",
        above=0,
        below=1,
    )
    poison_rate: float = option(
        0.0, "share of the answers that are rubbish, to try the server's checks", low=0, below=1
    )
    server_optimizer: str = option(
        "sgd",
        "how the server steps along the clients' average: sgd, with server_momentum, or adagrad",
        choices=lambda: ("sgd", "adagrad"),
    )
    server_lr: float = option(1.0, "learning rate of the server", above=0)
    server_momentum: float = option(0.9, "momentum of the server's sgd", low=0, below=1)

    model: str = option(
        PRESET,
        "the net that maps an image to an embedding, with settings of its own as vit:depth=6,patch=8",
        choices=lambda: (*MODELS, OWN),
        chosen=family_of,
    )
    init_checkpoint: Path | None = option(
        None, "a file of parameters to start the net from, as of torch.save; none: drawn from the seed"
    )
    embedding_dim: int = option(
        PRESET,
        "numbers in one embedding, D; by default as many as the net makes, where that is no choice",
        low=1,
        below=2**16,
    )
    similarity: str = option(
        "cosine",
        "what the loss makes of an embedding and a class row: cosine, or dot, their product and a bias, as "
        "of a linear layer; the row then has one number more",
        choices=lambda: ("cosine", "dot"),
    )
    scale: float = option(
        PRESET,
        "the loss multiplies similarities by this; by default 1 with the similarity dot",
        above=0,
    )
    weight_init_scale: float = option(
        PRESET,
        "standard deviation of the class matrix at the start; by default that of a linear layer, "
        "1 / sqrt(3 D), with the similarity dot",
        above=0,
    )

    personalise_epochs: int = option(
        0,
        "passes in which each client fine-tunes the model at the end, to be tested on test images of its "
        "own: then the run is judged by that; 0: it is not measured",
        low=0,
    )
    personalise_part: str = option(
        "head",
        "what it fine-tunes: head, the class rows; body, the net; full, both",
        choices=lambda: ("head", "body", "full"),
    )
    personalise_rate: float = option(0.01, "learning rate of that fine-tuning", above=0)

    class_store: Path | None = option(
        None,
        "folder for the class matrix, or for the class rows and nets that clients keep with themselves (of "
        "fedper, fedrep, local_only), where it is larger than memory, none: it is in memory",
    )
    label: str | None = option(None, "what the run is called beside others, none: as its method")
    seed: int = option(0, "the seed of everything but the data", low=0, below=2**63)
    eval_every: int = option(
        PRESET,
        f"rounds between two looks at the test images; where it is left out {EVAL_EVERY}, or a fifth of the "
        "rounds if that is less",
        low=1,
    )
    checkpoint_every: int = option(10, "rounds between two checkpoints in the run's folder, 0: none", low=0)
    workers: int = option(1, "processes that play the clients, on this machine", low=1, below=1025)
    threads: int = option(
        1, "torch threads of each; bits are reproducible at a fixed number", low=1, below=1025
    )
    device: str = option(
        "cpu",
        "where clients train: cpu, or cuda, a GPU for each worker while there are as many; bits are "
        "reproducible on cpu",
        choices=lambda: ("cpu", "cuda"),
    )
    out: Path | None = option(None, "the folder for the results, none: runs/DATA-METHOD-seedSEED")
    overwrite: bool = option(False, "replace the results of an earlier run in the same folder", saved=False)

    def __post_init__(self) -> None:
        errors = dict[str, ConfigError]()
        by_data = {name for name in PRESETS[OWN] if getattr(self, name) is None}  # the defaults that are
        for field in dataclasses.fields(self):
            if "data" in errors and field.name in by_data:
                continue
            try:
                object.__setattr__(self, field.name, self._resolved(field))
            except ConfigError as error:
                errors[field.name] = error
        unknown = {*errors, *(by_data if "data" in errors else ())}
        raise_together([*errors.values(), *self._clashes(unknown)])
        usual = preset(self.data, self.method)["warmup_rounds"]
        if self.warmup_rounds is None and usual is not FITTED:
            object.__setattr__(self, "warmup_rounds", min(usual, self.rounds // 10))

    def _clashes(self, wrong: Container[str]) -> Iterable[ConfigError]:
        return clashes(self, wrong)

    @property
    def shares(self) -> bool:
        """Whether a cohort has one class set in common, found by a secure sum."""
        return self.negatives == SHARED and METHODS[self.method].common

    @property
    def private(self) -> bool:
        """Whether clients ask two servers for rows, neither of which learns for which."""
        return self.requests == PIR and METHODS[self.method].tells

    @property
    def sums(self) -> bool:
        """Whether the server sees no client's changes, but their sum."""
        return self.shares or self.private

    @property
    def row_dim(self) -> int:
        """Numbers in one class row: D, and a bias with the similarity dot."""
        return self.embedding_dim + (self.similarity == "dot")

    def _resolved(self, field: dataclasses.Field) -> Any:
        """An option's value, or its default; None where that is not known yet."""
        value = getattr(self, field.name)
        if field.name == "settings":
            return own_numbers(self.method, value)
        if value is None and field.name == "eval_every":
            if type(self.rounds) is not int:
                return None  # what is wrong is said of the rounds, or of the data
            value = min(EVAL_EVERY, max(1, self.rounds // 5))
        if value is None and self.similarity == "dot" and field.name in LINEAR:
            value = LINEAR[field.name](self.embedding_dim)
        if value is None and field.name == "embedding_dim":
            value = FEATURES.get(family_of(str(self.model)))
        if value is None and field.name in PRESETS[OWN]:
            value = preset(self.data, self.method)[field.name]
            if value is FITTED or field.name == "warmup_rounds":
                return None
        return checked(field, value)

    def to_dict(self) -> dict[str, Any]:
        """Every option with its resolved value, in JSON's types; the inverse of `from_dict`.

        Without the numbers of methods' own where there are none.
        """
        saved = [field.name for field in dataclasses.fields(self) if field.metadata["saved"]]
        values = {name: getattr(self, name) for name in saved if name != "settings" or self.settings}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def from_dict(
        cls,
        values: dict[str, Any],
        source: Path | None = None,  # the file they are from, for messages
        given: Mapping[str, Any] = types.MappingProxyType({}),  # options that win over them
    ) -> "Self":
        """Raises ConfigError for all names that are not an option's and all values that one can't have.

        UnknownMethod where the file's method is from outside the package, and nobody has registered it.
        """
        if source is not None and "method" not in given:
            check_known(values.get("method"), source)
        names = [field.name for field in dataclasses.fields(cls)]
        later = "" if source is None else ", in this version: did a later one write the file?"
        unknown = [
            ConfigError(name, f"no such option{did_you_mean(name, names)}{later}")
            for name in values
            if name not in names
        ]
        try:
            try:
                config = cls(**{**{name: values[name] for name in names if name in values}, **given})
            except ConfigError as error:
                unknown.append(error)
            raise_together(unknown)
            return config
        except ConfigError as error:
            of_file = [each for each in error.mistakes if each[0] in values and each[0] not in given]
            if source is None or not of_file:
                raise
            others = [each for each in error.mistakes if each not in of_file]
            in_file = ConfigError(*of_file[0], *of_file[1:])
            raise ConfigError("config", f"in {source}: {in_file}", *others) from None

    def save(self, path: Path) -> None:
        write_whole(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Self":
        return cls.from_dict(read_options(path), path)


class SharedConfig(Config):
    """The options that several methods share; its own `method` is none of them, but has a value as all do.

    Each option by itself is checked here. Which of them clash is for the Config of each method to say.
    """

    def _clashes(self, wrong: Container[str]) -> Iterable[ConfigError]:
        return ()

    @classmethod
    def of(cls, config: Config) -> "SharedConfig":
        return config if isinstance(config, cls) else cls(**vars(config))


def read_options(path: Path) -> dict[str, Any]:
    """The options in a JSON file. Raises ConfigError if it is not one."""
    try:
        values = json.loads(path.read_bytes())  # in UTF-8 or UTF-16, as editors save it
    except OSError as error:
        raise ConfigError("config", f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError("config", f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError("config", f"expected an object of options in {path}, got {type(values).__name__}")
    return values
