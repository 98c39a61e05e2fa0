"""What is worth a word before a run: settings that cannot take effect beside the others, a short warm-up."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

from .algorithms import METHODS, readers, readers_in_words
from .algorithms.parts import Part
from .config import Config
from .defaults import EVAL_EVERY, FITTED, OWN, preset

log = logging.getLogger(__name__)
Rule = tuple[tuple[str, ...], str, Callable[[Config], bool]]


def _of_other_methods() -> Iterator[Rule]:
    for option in dict.fromkeys(option for method in METHODS.values() for option in method.options):
        yield (option,), f"it is for {readers_in_words(option)}", _unless_method(readers(option))


def _unless_method(names: Sequence[str]) -> Callable[[Config], bool]:
    return lambda config: config.method not in names


def _decays_from_then(config: Config) -> bool:
    """Whether the decay is counted from the first round after the warm-up."""
    return config.lr_decay in ("linear", "cosine") or (config.lr_decay == "step" and config.rounds == 1)


# (options, why they have no effect, when that is so)
RULES: tuple[Rule, ...] = (
    (("glyph_classes", "glyph_writers"), "it is for the data glyphs", lambda c: c.data != "glyphs"),
    (("test_share",), "it is for the data image_folder", lambda c: c.data != "image_folder"),
    (("data_dir",), "glyphs are drawn", lambda c: c.data == "glyphs"),
    (("data_dir",), "the data are handed over as they are", lambda c: c.data == OWN),
    (("images_per_client",), "num_clients is set", lambda c: c.num_clients > 0),
    (("images_per_client",), "clients are the images' authors", lambda c: c.partition == "natural"),
    (("classes_per_client",), "it is for the partition classes", lambda c: c.partition != "classes"),
    (("dirichlet_alpha",), "it is for the partition dirichlet", lambda c: c.partition != "dirichlet"),
    (
        ("negatives", "correction"),
        "num_negatives is 0",
        lambda c: c.num_negatives == 0 and not c.equal_pushes,
    ),
    (
        (
            *("denominator", "wire_dtype", "dropout_rate", "deadline", "latency_spread", "min_clients"),
            *("trust_updates", "max_norm", "max_norm_ratio", "clip_norm", "aggregation", "trim"),
            *("poison_rate", "server_optimizer", "server_lr"),
        ),
        "the method has no clients",
        lambda c: METHODS[c.method].pooled,
    ),
    (
        ("server_momentum",),
        "the method has no clients",
        lambda c: METHODS[c.method].pooled and not METHODS[c.method].split,
    ),
    (
        (
            *("denominator", "wire_dtype", "max_norm", "max_norm_ratio", "clip_norm", "aggregation", "trim"),
            "poison_rate",
            *("server_optimizer", "server_lr", "server_momentum"),
        ),
        "clients share nothing",
        lambda c: METHODS[c.method].alone,
    ),
    (
        ("denominator",),
        "no class row travels",
        lambda c: METHODS[c.method].rows is not Part.TRAINED and not METHODS[c.method].alone,
    ),
    (
        ("denominator",),
        "all clients have all class rows",
        lambda c: (
            METHODS[c.method].rows is Part.TRAINED
            and not (METHODS[c.method].tells or METHODS[c.method].pooled)
        ),
    ),
    (
        ("trust_updates", "max_norm_ratio"),
        "the server sees no client's changes, but their sum",
        lambda c: c.sums,
    ),
    (
        ("trust_updates", "max_norm_ratio"),
        "with noise each answer is looked at by itself",
        lambda c: c.noise_multiplier > 0,
    ),
    (("delta",), "noise_multiplier is 0", lambda c: c.noise_multiplier == 0),
    (("denominator",), "all of a cohort have the same class rows", lambda c: c.shares),
    (
        ("requests",),
        "what clients ask for says nothing of what they hold",
        lambda c: not METHODS[c.method].tells,
    ),
    (("min_holders",), "negatives are not shared", lambda c: METHODS[c.method].common and not c.shares),
    (("frozen", "depth_budget", "projection"), "there is one stage", lambda c: c.stages == 1),
    (("frozen",), "no block is frozen", lambda c: c.freeze == "no" and c.stages != 1),
    (
        ("scale", "similarity", "weight_init_scale"),
        "the method has no class rows",
        lambda c: METHODS[c.method].rowless,
    ),
    (
        ("max_shift", "flip"),
        "the method takes views of an image, which are flipped and cropped anyway",
        lambda c: METHODS[c.method].rowless,
    ),
    (
        (
            *("local_epochs", "deadline", "max_norm", "clip_norm", "aggregation", "trim"),
            *("poison_rate", "server_optimizer", "server_lr"),
        ),
        "clients and server step together, by client_lr, and their blocks are averaged",
        lambda c: METHODS[c.method].split,
    ),
    (
        ("sync_period", "client_gradient", "momentum_copies", "velocities", "client_momentum"),
        "clients' blocks stay as they are",
        lambda c: METHODS[c.method].split and c.freeze_clients,
    ),
    (
        ("client_gradient",),
        "the server steps on each client's images by themselves, of which the gradient is",
        lambda c: METHODS[c.method].split and c.in_turn,
    ),
    (
        ("personalise_part", "personalise_rate"),
        "personalise_epochs is 0",
        lambda c: c.personalise_epochs == 0,
    ),
    (("workers",), "the method has no clients to share", lambda c: METHODS[c.method].pooled),
    (("latency_spread",), "there is no deadline", lambda c: c.deadline is None),
    (
        ("max_norm", "max_norm_ratio"),
        "trust_updates is set",
        lambda c: c.trust_updates and not c.sums and not c.noise_multiplier,
    ),
    (
        ("clip_norm",),
        "answers of a norm over max_norm are left out before",
        # but noise is in clip_norms
        lambda c: (
            c.clip_norm is not None
            and c.clip_norm >= c.max_norm
            and (c.sums or not c.trust_updates)
            and not c.noise_multiplier
        ),
    ),
    (("trim",), "it is for the aggregation trimmed_mean", lambda c: c.aggregation != "trimmed_mean"),
    (("server_momentum",), "it is for the server_optimizer sgd", lambda c: c.server_optimizer != "sgd"),
    (("init_checkpoint",), "the net is handed over as it is", lambda c: c.model == OWN),
    (("checkpoint_every",), "there is no folder out", lambda c: c.out is None),
    (("checkpoint_every",), "there are no more rounds", lambda c: c.checkpoint_every >= c.rounds),
    (
        ("eval_every",),
        "there are fewer rounds, so the test is after the last",
        lambda c: c.eval_every > max(c.rounds, EVAL_EVERY),
    ),
    (("lr_decay",), "the warm-up takes all rounds", lambda c: (c.warmup_rounds or 0) >= c.rounds),
    (
        ("lr_decay",),
        "the only round after the warm-up is at client_lr",
        lambda c: c.rounds - (c.warmup_rounds or 0) == 1 and _decays_from_then(c),
    ),
)


def idle(configs: Iterable[Config]) -> list[str]:
    """A line for each option that is not at its default and takes effect in none of these runs.

    And for a warm-up longer than the rounds, whose rate never comes to client_lr, and where nothing trains.
    """
    found = [_idle(config) for config in configs]
    return [line for line in dict.fromkeys(found[0]) if all(line in other for other in found)]


def _idle(config: Config) -> list[str]:
    lines = [
        f"{name} {value} has no effect: {why}"
        for names, why, applies in (*_of_other_methods(), *RULES)
        if applies(config)
        for name, value in ((name, getattr(config, name)) for name in names)
        if value != _default(config, name)
    ]
    if (config.warmup_rounds or 0) > config.rounds:
        highest = config.client_lr * config.rounds / config.warmup_rounds
        lines.append(
            f"warmup_rounds {config.warmup_rounds} is more than the {config.rounds} rounds: the clients' "
            f"rate comes to {highest:.3g}, not to client_lr {config.client_lr:g}"
        )
    method = METHODS[config.method]
    trims = config.aggregation == "trimmed_mean" and not (method.pooled or method.alone or method.split)
    if trims and config.cohort is not None and config.trim * config.cohort < 1:
        lines.append(
            f"aggregation trimmed_mean is a plain mean: trim {config.trim:g} of {config.cohort} answers is "
            "less than one"
        )
    if method.samples and not method.own_push and config.num_negatives == 0 and not config.equal_pushes:
        lines.append(
            f"num_negatives 0: {config.method} trains nothing, as it pushes images from negatives alone"
        )
    return lines


def short_warmup(config: Config) -> list[str]:
    """A line, where the warm-up is shorter than usual, as by default there are too few rounds for it."""
    usual = preset(config.data, config.method)["warmup_rounds"]
    if usual is FITTED:  # it is among what was chosen
        return []
    if not config.warmup_rounds == config.rounds // 10 < usual:
        return []
    return [f"warmup_rounds {config.warmup_rounds}, a tenth of the rounds: usually {usual}"]


def _default(config: Config, name: str) -> object:
    if name == "settings":
        return METHODS[config.method].settings
    usual_ones = preset(config.data, config.method)
    if name in usual_ones:
        usual = usual_ones[name]
        return getattr(config, name) if usual is FITTED else usual
    return next(field.default for field in dataclasses.fields(Config) if field.name == name)
