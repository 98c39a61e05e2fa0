"""What a method says of parts is looked at before a run: a wrong schedule would fail rounds later."""

from collections.abc import Callable
from typing import Any

from ..config_error import ConfigError
from .parts import Part, Parts
from .schedule import Always, Schedule


def asked(method: str, hook: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a method's function returns. Raises ConfigError, of the method, where that raises anything."""
    try:
        return function(*arguments)
    except ConfigError:
        raise
    except Exception as error:  # a method of one's own may raise anything
        raise _wrong(f"the {hook} of {method}", f"{type(error).__name__}: {error}") from error


def always(method: str, found: object, num_blocks: int) -> Always:
    """Of what `parts` returned. Raises ConfigError for what cannot be, of a net of so many blocks."""
    return Always(_checked(f"the parts of {method}", found, num_blocks))


class CheckedSchedule:
    """What `by_round` returned, each of whose answers is looked at; those for whole rounds before a run."""

    def __init__(self, method: str, found: Any, usual: Parts, num_blocks: int, rounds: int):
        """found: whatever that is; usual: what `parts` says. Raises ConfigError for what cannot be."""
        self._who = f"the by_round of {method}"
        missing = [name for name in ("stage", "whole", "parts") if not callable(getattr(found, name, None))]
        if missing:
            is_no = f"a Schedule, with the functions stage, whole and parts, got {type(found).__name__}"
            raise _wrong(self._who, f"expected {is_no}, without {', '.join(missing)}")
        self._found: Schedule = found
        self._usual, self._num_blocks = usual, num_blocks
        first = dict[int, tuple[int, list[Part]]]()  # of each stage its first round, and where blocks stand
        for round in range(rounds):
            stage, blocks = self.stage(round), [*self.whole(round).blocks]
            before, expected = first.setdefault(stage, (round, blocks))
            if blocks != expected:
                same = f"the parts of round {before}, as both are of stage {stage}"
                raise _wrong(self._who, f"whole({round}): expected {same}, got others")

    def stage(self, round: int) -> int:
        found: object = asked(self._who, "stage", self._found.stage, round)
        if not isinstance(found, int):
            raise _wrong(self._who, f"stage({round}): expected a number, got {type(found).__name__}")
        return found

    def whole(self, round: int) -> Parts:
        return self._of_a_round(f"whole({round})", asked(self._who, "whole", self._found.whole, round))

    def parts(self, round: int, attempt: int, client: int) -> Parts:
        call = f"parts({round}, {attempt}, {client})"
        answer = asked(self._who, "parts", self._found.parts, round, attempt, client)
        found, whole = self._of_a_round(call, answer), self.whole(round)
        for place, (own, of_all) in enumerate(zip(found.blocks, whole.blocks, strict=True)):
            if own is not of_all and (own, of_all) != (Part.ABSENT, Part.FROZEN):
                same = f"blocks as in whole({round}), but that FROZEN ones may be ABSENT"
                raise _wrong(
                    self._who,
                    f"{call}: expected {same}, got {own.name} for block {place}, {of_all.name} there",
                )
        return found

    def _of_a_round(self, call: str, found: object) -> Parts:
        parts, usual = _checked(f"{self._who}: {call}", found, self._num_blocks), self._usual
        if (parts.rows, parts.net_at_home) != (usual.rows, usual.net_at_home):
            expected = f"the class rows {usual.rows.name} in every round, as in the method's parts"
            if parts.rows is usual.rows:
                expected = "the net at home in every round or in none, as in the method's parts"
            raise _wrong(f"{self._who}: {call}", f"expected {expected}, got {parts.rows.name}")
        return parts


def _checked(who: str, found: object, num_blocks: int) -> Parts:
    if not isinstance(found, Parts):
        raise _wrong(who, f"expected Parts, got {type(found).__name__}")
    if len(found.blocks) != num_blocks:
        one = " (a net is one, unless the method has by_block)" if num_blocks == 1 else ""
        expected = f"a Part for each of {num_blocks} blocks{one}"
        raise _wrong(who, f"expected {expected}, got {len(found.blocks)}")
    return found


def _wrong(who: str, words: str) -> ConfigError:
    return ConfigError("method", f"{who}: {words}")
