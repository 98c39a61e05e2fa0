"""Options: generated from Config, read from text, and what is wrong with them in one line."""

import argparse
import contextlib
import dataclasses
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..algorithms import METHODS, readers, readers_in_words, settings_of_all
from ..algorithms.own_numbers import in_words
from ..config import Config, ConfigError, SharedConfig, read_options
from ..config_error import raise_together
from ..config_option import checked, expectation, option_type
from ..defaults import FITTED, OWN, PRESETS
from ..disk import reason
from ..files.checkpoint import PLACES
from ..plan import LISTS, as_called, misfits, read_preset, with_defaults


class Mistake(Exception):
    """What the user should put right, in one line."""


def together(wrong: Iterable[str]) -> str:
    """All that is wrong in one line, each mistake once."""
    return "; ".join(dict.fromkeys(wrong))


def refuse(wrong: Iterable[str]) -> None:
    """Raises one Mistake for all of these; nothing where there are none."""
    if line := together(wrong):
        raise Mistake(line)


UNREAD = object()  # no value that any option can have


class Parser(argparse.ArgumentParser):
    """Values that cannot be are `wrong`, a line each, to be told at once; their options have UNREAD."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.wrong = list[str]()
        self.unread = set[str]()  # the options
        self.argv: Sequence[str] = ()  # what is parsed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.argv = args
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise Mistake(together([*self.wrong, message.removeprefix("argument ")]))

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            self.wrong.append(str(error).removeprefix("argument "))
            self.unread.add(action.dest)
            return UNREAD


def add_config_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="take the options from this file, a run's config.json; what it lacks has its default, and those "
        "on the command line win",
    )


# Title -> the first of its options, in the order of Config's fields.
GROUPS = {
    "the data": "data",
    "the method": "method",
    "learning by halves of a net": "cut",
    "what clients do": "rounds",
    "what travels, and what goes wrong with it": "wire_dtype",
    "the server": "server_optimizer",
    "the net": "model",
    "what a model is worth to each client": "personalise_epochs",
    "the run": "class_store",
}


def add_options(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """An option for each field of Config. What isn't given is left to Config: one place for the defaults."""
    titles = {first: title for title, first in GROUPS.items()}
    group: argparse._ActionsContainer = parser
    for field in dataclasses.fields(Config):
        if field.name in titles:
            group = parser.add_argument_group(titles[field.name])
        if field.name in without:
            continue
        kind, _ = option_type(field)
        settings: dict[str, Any] = {
            "dest": field.name,
            "default": argparse.SUPPRESS,
            "help": f"{help_of(field)} (default: {default_of(field)})".replace("%", "%%"),
        }
        if kind is bool:
            settings["action"] = "store_true"
        elif field.name == "settings":
            settings |= {"type": _setting, "action": _Settings, "metavar": "NAME=NUMBER"}
        else:
            settings |= {"type": _reader_of(field), "metavar": _METAVARS[kind]}
        group.add_argument(flag(field.name), **settings)


_METAVARS = {int: "INT", float: "NUMBER", str: "NAME", Path: "PATH"}


def flag(field_name: str) -> str:
    return "--set" if field_name == "settings" else "--" + field_name.replace("_", "-")


class _Settings(argparse.Action):
    """Numbers of a method's own, one at a time."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        if values is not UNREAD:
            setattr(namespace, self.dest, getattr(namespace, self.dest, {}) | dict([values]))


def _setting(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name.strip(), float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, got {text!r}") from None


def help_of(field: dataclasses.Field) -> str:
    choices = field.metadata["choices"]
    if choices is None or all(choice in field.metadata["help"] for choice in choices()):
        return field.metadata["help"]
    return f"{field.metadata['help']}: {', '.join(choice for choice in choices() if choice != OWN)}"


def default_of(field: dataclasses.Field) -> str:
    if field.name in PRESETS[OWN]:
        return _by_data_set(
            {
                name: "what fits the data" if preset[field.name] is FITTED else str(preset[field.name])
                for name, preset in PRESETS.items()
                if name != OWN
            }
        ) + _by_method(field.name)
    if isinstance(field.default, bool):
        return "yes" if field.default else "no"
    if field.name == "settings":
        return in_words(settings_of_all())
    return "none" if field.default is None else str(field.default)


def _by_method(option: str) -> str:
    """ "; 1 with a", of methods that have a default of their own."""
    having = {name: method.presets[option] for name, method in METHODS.items() if option in method.presets}
    return "".join(f"; {value} with {name}" for name, value in having.items())


def _by_data_set(values: dict[str, str]) -> str:
    """ "1 for a; 2 for b, c; else 0": the value that most have comes last."""
    having: dict[str, list[str]] = {}
    for name, value in values.items():
        having.setdefault(value, []).append(name)
    most = max(having, key=lambda value: len(having[value]))
    others = [f"{value} for {', '.join(names)}" for value, names in having.items() if value != most]
    return "; ".join([*others, f"else {most}"]) if others else most


def reader(
    kind: type, expected: str, low: float | None = None, high: float | None = None
) -> Callable[[str], Any]:
    """Text -> kind, for argparse. Bounds are Config's to check, but for the options that aren't Config's."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return read


def _reader_of(field: dataclasses.Field) -> Callable[[str], Any]:
    """Text -> a value that the option can have, for argparse, which then tells of all that can't be."""
    kind, may_be_none = option_type(field)
    read = reader(kind, expectation(field))

    def read_and_check(text: str) -> Any:
        if may_be_none and text == "none":
            return None
        try:
            return checked(field, read(text))
        except ConfigError as error:
            raise argparse.ArgumentTypeError(_without_own(error.message)) from None

    return read_and_check


def reader_of_list(option: str, read: Callable[[str], list[Any]]) -> Callable[[str], list[Any]]:
    """As `read`, for argparse, of one of a plan's lists."""

    def read_and_check(text: str) -> list[Any]:
        values = read(text)
        if wrong := misfits(option, values):
            raise argparse.ArgumentTypeError(together(wrong))
        return values

    return read_and_check


def reader_of_methods(parser: Parser) -> Callable[[str], list[str]]:
    """For argparse, of a comparison's methods: those of the preset's own are methods too."""

    def read(text: str) -> list[str]:
        own = _preset_of(parser).get("own", {})
        names = as_called(read_names(text), own)
        if wrong := misfits("methods", names, own):
            raise argparse.ArgumentTypeError(together(wrong))
        return names

    return read


def _preset_of(parser: Parser) -> dict[str, Any]:
    """The preset that is chosen beside what is read; empty if there is none, or it cannot be read."""
    alone = Parser(add_help=False, allow_abbrev=False)
    alone.add_argument("--preset", nargs="?")
    name = alone.parse_known_args(parser.argv)[0].preset
    try:
        return read_preset(name) if name else {}
    except ConfigError:  # which is told when the options are put together
        return {}


def _without_own(message: str) -> str:
    """What is expected, but what nobody can hand over here."""
    return message.replace(f", {OWN}, got ", ", got ")


def read_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def read_numbers(text: str) -> list[int]:
    return [
        reader(int, "integers of at least 0 with commas between", low=0)(number) for number in text.split(",")
    ]


def read_counts(text: str) -> list[int]:
    read = reader(int, "integers of at least 1 with commas between", low=1)
    return [read(number) for number in text.split(",")]


def read_rates(text: str) -> list[float]:
    read = reader(float, "numbers greater than 0 with commas between", low=1e-300)
    return [read(number) for number in text.split(",")]


def read_shapes(text: str) -> list[tuple[int, ...]]:
    read = reader(int, "sizes of at least 1 with x between, as in 32x100x64x11318", low=1)
    shapes = [tuple(read(size) for size in shape.split("x")) for shape in read_names(text)]
    if not shapes:
        raise argparse.ArgumentTypeError(f"expected at least one shape, got {text!r}")
    return shapes


def one_of(*choices: str, chosen: Callable[[str], str] = str) -> Callable[[str], str]:
    """For argparse: text that is one of these, or of which `chosen` is."""

    def read(text: str) -> str:
        if chosen(text) not in choices:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(choices)}, got {text!r}")
        return text

    return read


def config_of(
    arguments: argparse.Namespace,
    preset: Mapping[str, Any] | None = None,
    kind: type[Config] = Config,
    own: Mapping[str, Any] | None = None,
) -> Config:
    """Config's defaults, a preset, the --config file, the command line, a method's own: the later win.

    The names of those that are not left to the defaults are `arguments.given` from then on, without `own`.
    """
    options = dict(preset or {}) | (read_options(arguments.config) if arguments.config else {})
    names = [field.name for field in dataclasses.fields(Config)]
    given = {name: value for name, value in vars(arguments).items() if name in names}
    arguments.given = {*options, *given}
    given |= own or {}
    if "settings" in given:  # one by one they win
        given["settings"] = {**(options.get("settings") or {}), **given["settings"]}
    source = arguments.config or vars(arguments).get("preset")
    config = kind.from_dict(options, source and Path(source), given)
    for name in ("data", "model"):
        if getattr(config, name) == OWN:
            raise ConfigError(name, f"{OWN!r} {name} is handed over in Python, as run(config, {name}=...)")
    return config


COMPARED: dict[str, Any] = {
    "methods": ["fedss", "full_softmax", "pos_only", "neg_only"],
    "seeds": [0, 1, 2],
    "counts": [],
    "rates": [],
}


def lists_of(arguments: argparse.Namespace, preset: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison's: the defaults, a preset, the command line: the later win."""
    given = {name: vars(arguments).get(name) for name in LISTS}
    return COMPARED | {**preset} | {name: value for name, value in given.items() if value is not None}


def shared_of(
    arguments: argparse.Namespace, preset: Mapping[str, Any], methods: Sequence[str]
) -> tuple[Config, dict[str, dict[str, Any]]]:
    """(what these methods share, the options that each has of its own).

    Raises ConfigError for values that cannot be, and what clashes with one of the methods beside them.
    """
    of_all = preset.get("config", {})
    of_preset = {
        name: {option: value for option, value in options.items() if option not in arguments}
        for name, options in preset.get("own", {}).items()
        if name in methods
    }
    wrong = list[ConfigError]()
    try:
        config = config_of(arguments, of_all, SharedConfig)
    except ConfigError as error:
        wrong.append(error)
    own = with_defaults(methods, of_preset, vars(arguments).get("given", ()))
    raise_together([*_misfits(arguments, of_all, methods, own)] or wrong)
    return config, own


def _misfits(
    arguments: argparse.Namespace,
    of_all: Mapping[str, Any],
    methods: Sequence[str],
    own: Mapping[str, Mapping[str, Any]],
) -> Iterator[ConfigError]:
    """What is wrong with the options of each method by itself."""
    for name in methods:
        options = {"method": name, **own.get(name, {})}
        if method := METHODS.get(options["method"]):
            store = {} if method.stores else {"class_store": None}
            try:
                config_of(arguments, of_all, own=store | options)
            except ConfigError as error:
                yield error


# What each place is that must be there; the cache is made anew. Kept as they were given, so maybe relative.
_KINDS = {
    name: "file" if name.endswith("_checkpoint") else "folder" for name in PLACES if name != "cache_dir"
}


def say_idle(arguments: argparse.Namespace, usual: Mapping[str, object], why: str) -> None:
    """A line for each of these options of the command's own that is not as usual, as it has no effect."""
    for name, value in usual.items():
        if getattr(arguments, name) != value:
            print(f"{flag(name)} has no effect: {why}", flush=True)


def refuse_lost(
    arguments: argparse.Namespace, config: Config, *, again: bool = True, store: Path | None = None
) -> None:
    """Raises Mistake where a place of an earlier run, if none is given now, is not found here.

    again: whether the command has options for them. store: where its class store is, if it is read.
    """
    found = {name: store if name == "class_store" else getattr(config, name) for name in _KINDS}
    refuse(
        f"{flag(name)}: no such {_KINDS[name]}: {place}{_way_on(name, place, again)}"
        for name, place in found.items()
        if place and name not in arguments and not place.exists()
    )


def _way_on(name: str, place: Path, again: bool) -> str:
    """Of a place that is lost: it was moved or, if it is relative, this is started elsewhere."""
    way = f"give {flag(name)} again"
    if not again:
        start = "" if place.is_absolute() else "start this there, or, "
        way = f"{start}if the {_KINDS[name]} was moved, put a link to it in its place"
    return f"; {way}" if place.is_absolute() else f", relative to where the run began; {way}"


def not_read(arguments: argparse.Namespace, methods: Sequence[str]) -> Iterator[str]:
    """A line for each option on the command line that none of these methods reads, and others do."""
    return (
        f"{flag(name)} is for {readers_in_words(name)}, not for {', '.join(methods)}"
        for name in vars(arguments)
        if readers(name) and not set(readers(name)) & set(methods)
    )


def wrong_beside(arguments: argparse.Namespace, unread: Container[str] = ()) -> list[str]:
    """What else is wrong with a new run's options, where those that are `unread` have no value."""
    given = vars(arguments)
    if not {"config", "resume"} <= given.keys() or given["resume"] is not None:
        return []  # of a command whose options begin with others than Config's defaults
    wrong = list[str]()
    try:
        if "preset" in given:
            preset = read_preset(given["preset"]) if given["preset"] else {}
            methods = lists_of(arguments, preset | given["own"])["methods"]
            shared_of(arguments, preset, [] if methods is UNREAD else methods)
        else:
            config_of(arguments)
    except ConfigError as error:
        wrong = [as_typed(ConfigError(*each)) for each in error.mistakes if each[0] not in unread]
    if (method := given.get("method", Config.method)) in METHODS and "preset" not in given:
        wrong += not_read(arguments, [method])
    return wrong


_FIELDS = [field.name for field in dataclasses.fields(Config)]
# An option that a message begins with, or one of several there; one in the middle, which no other word is.
_SAID = re.compile(
    r"(?:^|(?<=; )|(?<=is another: )|(?<=of another configuration: ))"
    rf"(?:{'|'.join([*_FIELDS, *LISTS])})(?=: )"
    rf"|(?<![\w/.-])(?:{'|'.join(name for name in _FIELDS if '_' in name)})(?![\w/.:-])"
)


def as_typed(error: Exception, **own: str) -> str:
    """What is wrong in one line, options spelled as on the command line.

    own: that of an argument of a function that is given what a command's own option says.
    """
    words = reason(error) if isinstance(error, OSError) else str(error)
    if isinstance(error, ConfigError):
        words = _without_own(error.worded(flag))
    name, colon, rest = words.partition(": ")
    words = f"{own.get(name, name)}{colon}{rest}"
    return _SAID.sub(lambda option: flag(option[0]), " ".join(words.split()))


@contextlib.contextmanager
def mistakes(**own: str) -> Iterator[None]:
    """Wraps what reads and checks the user's choices, and nothing else: there, an error is a mistake.

    own: as of `as_typed`.
    """
    try:
        yield
    except (ValueError, OSError) as error:  # a ConfigError too
        raise Mistake(as_typed(error, **own)) from None


@contextlib.contextmanager
def noted(wrong: list[str], **own: str) -> Iterator[None]:
    """As `mistakes`, around one look of several: what is wrong there is kept, for `refuse` after the last."""
    try:
        with mistakes(**own):
            yield
    except Mistake as mistake:
        wrong.append(str(mistake))
