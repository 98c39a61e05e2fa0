"""Methods from outside the package: `register`, and files that call it.

The files that a command imports stand in the environment, as FEDSS_PLUGINS, so that the processes that it
starts, which begin with the package's methods alone, find them there: `load_plugins` is called in each.
"""

import dataclasses
import importlib.machinery
import importlib.util
import inspect
import itertools
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from .algorithms import METHODS, Method, Parts
from .algorithms.method import HOOKS, OPTIONAL, keywords
from .algorithms.own_numbers import is_number
from .config import Config, ConfigError, did_you_mean

FILES = "FEDSS_PLUGINS"  # of the environment: paths, with a colon between, on Windows a semicolon
PREFIX = "fedss_plugin_"  # of the modules that they become


def register(method: Method) -> Method:
    """Adds a method to those that `Config(method=...)` and `fedss run --method` know; returns it.

    A script that starts workers calls it wherever it is imported, not under `if __name__ == "__main__":`.
    Raises TypeError for what is no Method; ValueError, with all that is wrong: a name or a label that another
    has, options that Config has not, settings that no function of it has as a keyword argument, a function
    that is none or takes other arguments. Then nothing is added.
    """
    if not isinstance(method, Method):
        raise TypeError(f"register: expected a Method, got {type(method).__name__}")
    if wrong := [*_wrong_words(method), *_wrong_functions(method), *_wrong_options(method)]:
        raise ValueError(f"register: {'; '.join(wrong)}")
    METHODS[method.name] = method
    return method


def _wrong_words(method: Method) -> Iterator[str]:
    if not isinstance(method.name, str) or not re.fullmatch("[a-z][a-z0-9_]*", method.name):
        yield f"name: expected small letters, digits and _, got {method.name!r}"
    elif method.name in METHODS:
        yield f"name: expected one that no method has, got {method.name!r}"
    for name in ("label", "summary"):
        words = getattr(method, name)
        if not isinstance(words, str) or not words.strip():
            yield f"{name}: expected words, got {words!r}"
    if method.label in [other.label for other in METHODS.values()]:
        yield f"label: expected one that no method has, got {method.label!r}"
    if method.baseline not in METHODS:
        yield f"baseline: expected the name of a method, got {method.baseline!r}"


def _wrong_functions(method: Method) -> Iterator[str]:
    wrong = {name: [*_wrong_function(method, name)] for name in HOOKS}
    yield from itertools.chain.from_iterable(wrong.values())
    parts = None
    if not wrong["parts"]:
        try:
            parts = method.parts(1)
        except Exception as error:  # a method of one's own may raise anything
            yield f"parts: of a net of 1 block: {type(error).__name__}: {error}"
    if parts is not None and not isinstance(parts, Parts):
        yield f"parts: expected it to return Parts, got {type(parts).__name__}"
    if method.loss and isinstance(parts, Parts) and (method.contrastive or method.rowless):
        yield "loss: expected None of a method without labels or class rows"
    if method.split:
        yield "split: expected False, as rounds of clients and server together are the package's own"


def _wrong_function(method: Method, name: str) -> Iterator[str]:
    function = getattr(method, name)
    if function is None and name in OPTIONAL:
        return
    if not callable(function):
        yield f"{name}: expected a function, got {function!r}"
        return
    named = keywords(function)
    for keyword in sorted(named - {*method.settings}):
        yield f"{name}: its keyword argument {keyword} is not among the settings"
    found = inspect.signature(function)
    try:
        found.bind(*HOOKS[name], **dict.fromkeys(named))
    except TypeError:
        taken = [p.replace(annotation=p.empty) for p in found.parameters.values() if p.name not in named]
        yield f"{name}: expected {name}({', '.join(HOOKS[name])}), got ({', '.join(map(str, taken))})"


def _wrong_options(method: Method) -> Iterator[str]:
    names = [field.name for field in dataclasses.fields(Config)]
    for field in ("options", "presets"):
        for name in getattr(method, field):
            if name not in names:
                other = "; a number of the method's own is one of its settings" * (field == "options")
                yield f"{field}: no such option of Config: {name}{did_you_mean(name, names)}{other}"
    read = {name for hook in HOOKS for name in keywords(getattr(method, hook))}
    for name, value in method.settings.items():
        if name in names:
            yield f"settings: {name} is an option of Config"
        elif name not in read:
            yield (
                f"settings: {name} is read by none of {', '.join(HOOKS)}: expected one with a keyword "
                f"argument {name}, after a *"
            )
        if not is_number(value):
            yield f"settings: {name}: expected a finite number, got {value!r}"


def noted() -> list[Path]:
    """The files of FEDSS_PLUGINS."""
    return [Path(name) for name in os.environ.get(FILES, "").split(os.pathsep) if name]


def load_plugins(files: Iterable[Path] = ()) -> None:
    """Imports these files and those of FEDSS_PLUGINS, each once, and notes them there.

    A file finds modules beside it, as a script does: its folder is the first of sys.path from then on.
    Raises ConfigError, with its cause in a line, for one that cannot be, or that registers nothing.
    """
    paths = dict.fromkeys(path.absolute() for path in (*noted(), *files))
    for path in paths:
        if os.pathsep in str(path):
            raise ConfigError("plugin", f"{path}: expected a path without {os.pathsep}")
        _load(path)
    if paths:
        os.environ[FILES] = os.pathsep.join(map(str, paths))


def load_in_process_of(config: Config) -> None:
    """`load_plugins`, in a process that a run or a comparison started. Raises ConfigError as `load_plugins`.

    And where the method is unknown all the same.
    """
    load_plugins()
    if config.method not in METHODS:
        raise ConfigError(
            "method",
            f"{config.method!r} is not known in a process that was started: call register where the script "
            'is imported, not under if __name__ == "__main__":',
        )


def _load(path: Path) -> None:
    if any(getattr(module, "__file__", None) == str(path) for module in [*sys.modules.values()]):
        return
    if not path.is_file():
        raise ConfigError("plugin", f"{path}: no such file")
    before, name = dict(METHODS), f"{PREFIX}{path.stem}"
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    paths, folder = [*sys.path], str(path.parent)
    if folder not in paths:
        sys.path.insert(0, folder)
    try:
        loader.exec_module(sys.modules[name])
        why = "" if METHODS != before else "expected a call of register(method) in it, got none"
    except (Exception, SystemExit) as error:
        why = _cause(error, path)
    if why:
        del sys.modules[name]
        METHODS.clear()
        METHODS.update(before)
        sys.path[:] = paths
        raise ConfigError("plugin", f"{path}: {why}")


def _cause(error: BaseException, path: Path) -> str:
    """Where in the file it failed, and of what, in one line."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {' '.join(str(error).split())}"
