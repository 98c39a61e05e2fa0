"""What is wrong with the settings of a run, in words that name them."""

import difflib
from collections.abc import Callable, Iterable, Sequence

FROM_OUTSIDE = " (--plugin FILE imports the file of a method of one's own, in Python register adds it)"


class ConfigError(ValueError):
    """Options that cannot be: of each which one, what was expected, what came.

    `option` and `message` are the first's; `mistakes` has all of them. In Python an option is spelled as its
    field is, `worded` spells it otherwise.
    """

    def __init__(self, option: str, message: str, *more: tuple[str, str]):
        self.mistakes = ((option, message), *more)
        super().__init__(option, message, *more)  # so that it can be pickled
        self.option, self.message = option, message

    def __str__(self) -> str:
        return self.worded(str)

    def worded(self, spelled: Callable[[str], str]) -> str:
        return "; ".join(f"{spelled(option)}: {message}" for option, message in self.mistakes)


class UnknownMethod(ConfigError):
    """A file is of a method from outside the package that is not registered here."""

    def worded(self, spelled: Callable[[str], str]) -> str:
        return self.message


def raise_together(errors: Iterable[ConfigError]) -> None:
    """One ConfigError for all of them, each mistake once; nothing where there are none."""
    mistakes = dict.fromkeys(mistake for error in errors for mistake in error.mistakes)
    if mistakes:
        first, *more = mistakes
        raise ConfigError(*first, *more)


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """What is nearest of `names`, whose leading dashes say nothing; else those that end in this word."""
    bare, wanted = {each.lstrip("-"): each for each in names}, name.lstrip("-")
    near = difflib.get_close_matches(wanted, bare, n=1)
    near = near or [each for each in bare if wanted and each.endswith((f"_{wanted}", f"-{wanted}"))]
    return f" (did you mean {' or '.join(bare[each] for each in near)}?)" if near else ""
