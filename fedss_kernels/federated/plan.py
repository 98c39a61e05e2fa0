"""What a comparison compares: methods, numbers of negatives and seeds; the rates that are tried."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .algorithms import METHODS
from .clashes import no_store
from .config import Config, ConfigError, did_you_mean, read_options
from .config_error import raise_together
from .disk import write_whole
from .files.checkpoint import CheckpointError, differences

HOLDOUT = 0.1  # of the training clients, for the choice of a rate
FILE = "comparison.json"
LISTS = ("methods", "seeds", "counts", "rates")
NUMBERS: dict[str, type | tuple[type, ...]] = {"seeds": int, "counts": int, "rates": (int, float)}
PRESETS = Path(__file__).with_name("presets")


@dataclass(frozen=True)
class Case:
    """What has a line in the table: a method, with a number of negatives if it asks for any."""

    method: str
    num_negatives: int | None

    @property
    def name(self) -> str:
        """In names of folders."""
        return self.method if self.num_negatives is None else f"{self.method}-m{self.num_negatives}"

    @property
    def label(self) -> str:
        label = METHODS[self.method].label
        return label if self.num_negatives is None else f"{label}, {self.num_negatives} negatives"


@dataclass(frozen=True)
class Plan:
    """Raises ConfigError for names or numbers that cannot be, or a class store that no method has."""

    config: Config  # everything but method, seed and out; its class store is for methods that have one
    methods: Sequence[str]
    seeds: Sequence[int]
    counts: Sequence[int] = ()  # numbers of negatives; none: the configuration's
    rates: Sequence[float] = ()  # client_lr to choose from; none: the configuration's

    def __post_init__(self) -> None:
        for option in NUMBERS:
            plain = [v.item() if isinstance(v, np.generic) else v for v in getattr(self, option)]
            object.__setattr__(self, option, plain)  # as they are saved
        raise_together(self._misfits())
        store = self.config.class_store
        if store and len(self.storeless) == len(self.methods):
            raise no_store(self.methods, store)

    def _misfits(self) -> Iterator[ConfigError]:
        for option in LISTS:
            yield from (ConfigError(option, line) for line in misfits(option, getattr(self, option)))
        if self.config.workers > 1:
            yield ConfigError(
                "workers", f"expected 1 in a comparison, which has jobs, got {self.config.workers}"
            )

    @property
    def several(self) -> bool:
        """Whether there are several numbers of negatives: then cases are named by theirs."""
        return len(self.counts) > 1

    @property
    def storeless(self) -> list[str]:
        """The methods that have no class store, where others have one."""
        return [name for name in self.methods if self.config.class_store and not METHODS[name].stores]

    @property
    def cases(self) -> list[Case]:
        """A method that asks for negatives has one for each count, if there are several."""
        return [
            Case(method, count)
            for method in self.methods
            for count in (self.counts if METHODS[method].samples and self.several else [None])
        ]

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
        cohort = self.config.cohort
        if not METHODS[case.method].alone or cohort is None:
            return {}
        cohort = max(1, round(HOLDOUT * cohort))
        return {"cohort": cohort, "min_clients": min(self.config.min_clients, cohort)}

    def runs(self, out: Path, rates: Mapping[Case, float]) -> list[Config]:
        """The runs that are compared, cases of one seed next to each other."""
        store = self._store(out.resolve().name)
        return [
            self._run(
                case,
                seed,
                out / f"{case.name}-seed{seed}",
                store,
                client_lr=rates.get(case, self.config.client_lr),
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
            self.config,
            method=case.method,
            seed=seed,
            out=out,
            class_store=store / out.name if store and METHODS[case.method].stores else None,
            **options,
        )

    def save(self, out: Path) -> None:
        lists = {name: list(getattr(self, name)) for name in LISTS}
        text = json.dumps(lists | {"config": self.config.to_dict()}, indent=2)
        write_whole(out / FILE, text + "\n")

    @classmethod
    def read(cls, out: Path) -> "Plan":
        """Of the comparison in `out`. Raises CheckpointError where there is none."""
        try:
            found = read_plan(out / FILE, "config")
            missing = [name for name in ("config", *LISTS) if name not in found]
            if missing:
                raise ConfigError("config", f"{out / FILE} has no {', '.join(missing)}")
            return cls(Config.from_dict(found["config"], out / FILE), *(found[name] for name in LISTS))
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
        if different:
            raise CheckpointError(f"the comparison in {out} is another: {'; '.join(different)}")


def misfits(option: str, values: Sequence[Any]) -> list[str]:
    """What is wrong with the list of this name, a line each."""
    strange = [line for value in values if (line := _strange(option, value))]
    few = option in ("methods", "seeds") and not values
    if few or (not strange and len(set(values)) < len(values)):
        listed = ", ".join(map(str, values)) or "none"
        return [f"expected at least one, each once, got {listed}"]
    return strange


def _strange(option: str, value: Any) -> str:
    """Why it cannot be in the list of this name; "" if it can."""
    if option in NUMBERS:
        plain = isinstance(value, NUMBERS[option]) and not isinstance(value, bool)
        return "" if plain else f"expected numbers, got {value!r}"
    if isinstance(value, str) and value in METHODS:
        return ""
    return f"expected some of {', '.join(METHODS)}, got {value!r}{did_you_mean(str(value), [*METHODS])}"


def read_preset(name: str) -> dict[str, Any]:
    """A preset of the package by its name, or a file: {"config": {...}} and any of LISTS, as comparison.json.

    Raises ConfigError for a name that is neither, or a file that is none.
    """
    named = sorted(path.stem for path in PRESETS.glob("*.json"))
    path = PRESETS / f"{name}.json" if name in named else Path(name)
    if not path.is_file():
        raise ConfigError("preset", f"expected a file or one of {', '.join(named)}, got {name!r}")
    return read_plan(path, "preset")


def read_plan(path: Path, option: str) -> dict[str, Any]:
    """What of {"config": {...}} and LISTS is in a file. Raises ConfigError, of `option`, for what else is."""
    found = read_options(path)
    for key, value in found.items():
        if key not in ("config", *LISTS):
            raise ConfigError(
                option, f"no such entry in {path}: {key}{did_you_mean(key, ['config', *LISTS])}"
            )
        if not isinstance(value, dict if key == "config" else list):
            kind = "an object" if key == "config" else "a list"
            raise ConfigError(option, f"expected {kind} for {key} in {path}, got {value!r}")
    return found


def case_of(config: Config, several: bool) -> Case:
    """The case of a run, where a comparison has several numbers of negatives or one."""
    return Case(config.method, config.num_negatives if several and METHODS[config.method].samples else None)
