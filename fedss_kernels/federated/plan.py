"""What a comparison compares: methods, numbers of negatives and seeds; the rates that are tried."""

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from .algorithms import METHODS
from .algorithms.own_numbers import check_known
from .clashes import no_store
from .config import Config, ConfigError, SharedConfig, did_you_mean, read_options
from .config_error import FROM_OUTSIDE, UnknownMethod, raise_together
from .disk import write_whole
from .files.checkpoint import CheckpointError, differences

HOLDOUT = 0.1  # of the training clients, for the choice of a rate
FILE = "comparison.json"
LISTS, OBJECTS = ("methods", "seeds", "counts", "rates"), ("config", "own")
SHARED = ("label", "seed", "class_store", "workers", "out", "overwrite")  # by all that is compared
NUMBERS: dict[str, type | tuple[type, ...]] = {"seeds": int, "counts": int, "rates": (int, float)}
_NONE: Mapping[str, Mapping[str, Any]] = {}
PRESETS = Path(__file__).with_name("presets")


def folder_word(called: str) -> str:
    """A name of one's own as folders have it: "Layer-wise, budget 6" is layer-wise-budget-6."""
    return re.sub(r"[^a-z0-9_]+", "-", called.lower())


@dataclass(frozen=True)
class Case:
    """What has a line in the table: a method, with a number of negatives if it asks for any."""

    method: str
    num_negatives: int | None
    called: str | None = None  # where it has a name of its own

    @property
    def name(self) -> str:
        """In names of folders."""
        name = self.method if self.called is None else folder_word(self.called)
        return name if self.num_negatives is None else f"{name}-m{self.num_negatives}"

    @property
    def label(self) -> str:
        label = self.called or METHODS[self.method].label
        return label if self.num_negatives is None else f"{label}, {self.num_negatives} negatives"


@dataclass(frozen=True)
class Plan:
    """Raises ConfigError for names or numbers that cannot be, or a class store that no method has.

    A method may be there under several names, with options of its own under each: `own` has for each name its
    options, and for one that is no method's the "method" among them. They win over `config`, whose own
    method counts for nothing: options clash with a method that is compared, or not at all.
    """

    config: Config  # everything but method, seed and out; its class store is for methods that have one
    methods: Sequence[str]
    seeds: Sequence[int]
    counts: Sequence[int] = ()  # numbers of negatives; none: the configuration's
    rates: Sequence[float] = ()  # client_lr to choose from; none: the configuration's
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option in NUMBERS:
            plain = [v.item() if isinstance(v, np.generic) else v for v in getattr(self, option)]
            object.__setattr__(self, option, plain)  # as they are saved
        object.__setattr__(self, "config", SharedConfig.of(self.config))
        raise_together(self._misfits())
        store = self.config.class_store
        if store and len(self.storeless) == len(self.methods):
            raise no_store(self.methods, store)

    def _misfits(self) -> Iterator[ConfigError]:
        for option in LISTS:
            found = misfits(option, getattr(self, option), self.own)
            yield from (ConfigError(option, line) for line in found)
        if self.config.workers > 1:
            yield ConfigError(
                "workers", f"expected 1 in a comparison, which has jobs, got {self.config.workers}"
            )
        of_own = [*self._misfits_of_own()]
        yield from of_own
        if not of_own and not any(_strange("methods", name, self.own) for name in self.methods):
            yield from (error for case in self.cases if (error := self._misfit(case)))
            folders = [case.name for case in self.cases]
            for name in {name for name in folders if folders.count(name) > 1 and self.own}:
                yield ConfigError("methods", f"expected one name for the folder {name}, got several")

    def _misfits_of_own(self) -> Iterator[ConfigError]:
        names = [field.name for field in fields(Config)]
        shared = {*names[: names.index("method")], *SHARED}  # the data first
        for name, options in self.own.items():
            if name not in self.methods:
                yield ConfigError("own", f"expected options of {', '.join(self.methods)}, got {name!r}")
            for option in options.keys() - {"method"}:
                if option not in names:
                    yield ConfigError("own", f"{name}: no such option: {option}{did_you_mean(option, names)}")
                elif option in shared:
                    yield ConfigError("own", f"{name}: {option} is the same for all that is compared")

    def _misfit(self, case: Case) -> ConfigError | None:
        """What is wrong with its options."""
        try:
            self.config_of(case)
        except ConfigError as error:
            return error
        return None

    def _method(self, name: str) -> str:
        return self.own.get(name, {}).get("method", name)

    @property
    def several(self) -> bool:
        """Whether there are several numbers of negatives: then cases are named by theirs."""
        return len(self.counts) > 1

    @property
    def storeless(self) -> list[str]:
        """The methods that have no class store, where others have one."""
        names = [self._method(name) for name in self.methods]
        return [name for name in names if self.config.class_store and not METHODS[name].stores]

    @property
    def cases(self) -> list[Case]:
        """A method that asks for negatives has one for each count, if there are several."""
        return [
            Case(self._method(name), count, None if name == self._method(name) else name)
            for name in self.methods
            for count in (self.counts if METHODS[self._method(name)].samples and self.several else [None])
        ]

    def config_of(self, case: Case) -> Config:
        """Its options, but for seed, rate and folder. Raises ConfigError for some that cannot be."""
        own = {name: value for name, value in self._own(case).items() if name != "method"}
        store = self.config.class_store if METHODS[case.method].stores else None
        if isinstance(numbers := own.get("settings"), Mapping):  # one by one they win
            own["settings"] = {**self.config.settings, **numbers}
        options = {"method": case.method, "label": case.called, "class_store": store, **own}
        return Config(**{**vars(self.config), **options})

    @property
    def to_read_by(self) -> Config:
        """Options to read the data by, which are the same for all: of a case that has most to say of them."""

        def says(case: Case) -> tuple[bool, bool]:
            return METHODS[case.method].samples, not METHODS[case.method].pooled

        return self.config_of(max(self.cases, key=says))

    def _own(self, case: Case) -> Mapping[str, Any]:
        return self.own.get(case.called or case.method, {})

    def trials(self, out: Path) -> list[Config]:
        """The runs that choose a rate, rates of one case next to each other.

        They are judged on clients who do not train. Of a method whose clients never meet it is just these who
        do, as many of them in a round as there would be of all.
        """
        store = self._store(out.resolve().parent.name, out.name)
        return [
            self._run(
                case,
                self.seeds[0],
                out / f"{case.name}-lr{rate}",
                store,
                client_lr=rate,
                holdout=HOLDOUT,
                **self._cohort(case),
            )
            for case in self.cases
            for rate in self.rates
        ]

    def _cohort(self, case: Case) -> dict[str, int]:
        config = self.config_of(case)
        if not METHODS[case.method].alone or config.cohort is None:
            return {}
        cohort = max(1, round(HOLDOUT * config.cohort))
        return {"cohort": cohort, "min_clients": min(config.min_clients, cohort)}

    def runs(self, out: Path, rates: Mapping[Case, float]) -> list[Config]:
        """The runs that are compared, cases of one seed next to each other."""
        store = self._store(out.resolve().name)
        return [
            self._run(
                case,
                seed,
                out / f"{case.name}-seed{seed}",
                store,
                **({"client_lr": rates[case]} if case in rates else {}),
            )
            for seed in self.seeds
            for case in self.cases
        ]

    def _store(self, *of_comparison: str) -> Path | None:
        """Where its runs' class stores are, if they have any: beside those of others."""
        return self.config.class_store and self.config.class_store.joinpath(*of_comparison)

    def _run(self, case: Case, seed: int, out: Path, store: Path | None, **options: Any) -> Config:
        if case.num_negatives is not None:
            options["num_negatives"] = case.num_negatives
        elif len(self.counts) == 1:
            options["num_negatives"] = self.counts[0]
        return replace(
            self.config_of(case),
            seed=seed,
            out=out,
            class_store=store / out.name if store and METHODS[case.method].stores else None,
            **options,
        )

    @property
    def text(self) -> str:
        """comparison.json."""
        lists: dict[str, Any] = {name: list(getattr(self, name)) for name in LISTS}
        own = {"own": self.own} if self.own else {}
        return json.dumps(lists | own | {"config": self.config.to_dict()}, indent=2) + "\n"

    def save(self, out: Path) -> None:
        write_whole(out / FILE, self.text)

    @classmethod
    def read(cls, out: Path) -> "Plan":
        """Of the comparison in `out`. Raises CheckpointError where there is none."""
        try:
            found = read_plan(out / FILE, "config")
            missing = [name for name in ("config", *LISTS) if name not in found]
            if missing:
                raise ConfigError("config", f"{out / FILE} has no {', '.join(missing)}")
            for name in filter(lambda each: isinstance(each, str), found["methods"]):
                check_known(found.get("own", {}).get(name, {}).get("method", name), out / FILE)
            config = SharedConfig.from_dict(found["config"], out / FILE)
            return cls(config, **{name: found[name] for name in LISTS}, own=found.get("own", {}))
        except UnknownMethod:
            raise
        except ConfigError as error:
            raise CheckpointError(f"no comparison to go on with in {out}: {error}") from None

    def check_same(self, out: Path) -> None:
        """Raises CheckpointError unless the comparison in `out` is this one."""
        there = Plan.read(out)
        different = differences(there.config.to_dict(), self.config.to_dict())
        for name in LISTS:
            before, now = list(getattr(there, name)), list(getattr(self, name))
            if before != now:
                different.append(f"{name}: {before} there, {now} here")
        if there.own != self.own:
            different.append(f"own: {there.own} there, {self.own} here")
        if different:
            raise CheckpointError(f"the comparison in {out} is another: {'; '.join(different)}")


def misfits(option: str, values: Sequence[Any], own: Mapping[str, Mapping[str, Any]] = _NONE) -> list[str]:
    """What is wrong with the list of this name, a line each; own: as a Plan's."""
    strange = [line for value in values if (line := _strange(option, value, own))]
    few = option in ("methods", "seeds") and not values
    if few or (not strange and len(set(values)) < len(values)):
        listed = ", ".join(map(str, values)) or "none"
        return [f"expected at least one, each once, got {listed}"]
    return strange


def _strange(option: str, value: Any, own: Mapping[str, Mapping[str, Any]]) -> str:
    """Why it cannot be in the list of this name; "" if it can."""
    if option in NUMBERS:
        plain = isinstance(value, NUMBERS[option]) and not isinstance(value, bool)
        return "" if plain else f"expected numbers, got {value!r}"
    if isinstance(value, str) and own.get(value, {}).get("method", value) in METHODS:
        return ""
    names = [*METHODS, *(name for name in own if name not in METHODS)]
    return (
        f"expected some of {', '.join(names)}, got {value!r}{did_you_mean(str(value), names)}{FROM_OUTSIDE}"
    )


def as_called(pieces: Sequence[str], own: Iterable[str]) -> list[str]:
    """Names that were written with commas between, as they are in `own`, where they may have some themselves.

    There a name's word in folders stands for it too.
    """
    known, names, pieces = {folder_word(name): name for name in own}, list[str](), list(pieces)
    while pieces:
        lengths = range(len(pieces), 0, -1)
        taken = next((n for n in lengths if folder_word(", ".join(pieces[:n])) in known), 1)
        names.append(known.get(folder_word(", ".join(pieces[:taken])), pieces[0]))
        pieces = pieces[taken:]
    return names


def read_preset(name: str) -> dict[str, Any]:
    """A preset of the package by its name, or a file: any of OBJECTS and LISTS, as comparison.json.

    Raises ConfigError for a name that is neither, or a file that is none.
    """
    named = sorted(path.stem for path in PRESETS.glob("*.json"))
    path = PRESETS / f"{name}.json" if name in named else Path(name)
    if not path.is_file():
        raise ConfigError("preset", f"expected a file or one of {', '.join(named)}, got {name!r}")
    return read_plan(path, "preset")


def read_plan(path: Path, option: str) -> dict[str, Any]:
    """What of OBJECTS and LISTS is in a file. Raises ConfigError, of `option`, for what else is."""
    found = read_options(path)
    for key, value in found.items():
        if key not in (*OBJECTS, *LISTS):
            hint = did_you_mean(key, [*OBJECTS, *LISTS])
            if f"{key}s" not in LISTS and key in {field.name for field in fields(Config)}:
                hint = "; options of all runs stand under config"
            raise ConfigError(option, f"no such entry in {path}: {key}{hint}")
        inside = value.values() if key == "own" and isinstance(value, dict) else ()
        if not isinstance(value, dict if key in OBJECTS else list) or not all(
            isinstance(options, dict) for options in inside
        ):
            kind = {"config": "an object", "own": "an object of objects"}.get(key, "a list")
            raise ConfigError(option, f"expected {kind} for {key} in {path}, got {value!r}")
    return found


def with_defaults(
    methods: Sequence[str],
    own: Mapping[str, Mapping[str, Any]],
    given: Container[str],  # options that the user chose for all
) -> dict[str, dict[str, Any]]:
    """`own`, and before it the defaults that a method has of its own, of options that are left to it."""
    found = dict[str, dict[str, Any]]()
    for name in methods:
        options = dict(own.get(name, {}))
        if method := METHODS.get(options.get("method", name)):
            usual = {option: value for option, value in method.presets.items() if option not in given}
            options = usual | options
        if options:
            found[name] = options
    return found


def case_of(config: Config, several: bool) -> Case:
    """The case of a run, where a comparison has several numbers of negatives or one."""
    count = config.num_negatives if several and METHODS[config.method].samples else None
    return Case(config.method, count, config.label)
