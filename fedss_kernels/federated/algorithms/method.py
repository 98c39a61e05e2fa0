"""What a federated method is, here: which parts of the model a client gets, and what it does with them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..messages import Request
from .checked_schedule import CheckedSchedule, always, asked
from .parts import Part, Parts, Pass, all_at_once, all_travel
from .schedule import ByRound, Schedule, Settings

STICKY = {"fresh": 0.0, "sticky": 1.0, "mixed": 0.5}  # the share of its negatives that a client keeps
SHARED = "shared"  # negatives that all clients of a cohort have
PIR = "pir"  # requests of two servers, neither of which learns what is in them
HOOKS = {  # functions that a method is made of, and what each is called with, in this order
    "request": ("num_classes", "positives", "negatives", "correction"),
    "parts": ("num_blocks",),
    "by_round": ("config", "num_blocks"),
    "passes": ("local_epochs", "head_epochs"),
    "loss": ("embeddings", "rows", "target", "given"),
    "penalty_gradient": ("now", "received"),
}
OPTIONAL = ("by_round", "loss", "penalty_gradient")  # those of them that may be None


@dataclass(frozen=True)
class Method:
    """A federated method: all of them share the round, the client and the server, and differ in what is here.

    A method in which all travels and all is trained at once needs a `request` alone.

    name: by which it is asked for, small letters, digits and _.
    label: its name in plots and tables.
    summary: a sentence for readers who know none of this.
    request: request(num_classes, positives, negatives, correction) -> Request: the class rows that a client
        asks for. positives (P,) int64, ascending, are its own classes; negatives (m,) others that are drawn
        for it where `samples` is set, else none; correction is the option of this name. positives must be
        among the rows, as a client is trained on images of them. Before training it is asked for a made-up
        client, with class 0 alone of two and no negatives: to see whether what it asks for tells its classes.
        So does the server of a federation, of all classes.
    paper: where it is from; "": from nowhere yet.
    parts: parts(num_blocks) -> Parts: where each block of the net stands, and the class rows.
    by_round: by_round(config, num_blocks) -> Schedule, where parts are others from round to round; None: as
        in `parts` in all. The net needs `blocks` and a `pool`, as its first blocks may be all that is there.
    passes: passes(local_epochs, head_epochs) -> a Pass for each pass of a client over its images.
    loss: loss(embeddings, rows, target, given) -> the mean loss of a batch, (), with its gradient; None: the
        sampled softmax. embeddings (b, D); rows (S, D), of dot products (S, D + 1) with the bias last, are
        the class rows as they are trained; target (b,) int64 are places among them; `Given` has the request
        (S rows), the client's own images of each of its classes, and the scale. Not without class rows.
    penalty_gradient: penalty_gradient(now, received) -> the gradient of a term that a client minimises beside
        the loss, None: there is none. It is asked in every step, once for the net's numbers, both (P,), and
        once for the class rows, both (S, D), and must not change them. The loss that is told is without it.
    settings: numbers of the method's own by name, with their defaults: Config(settings={"mu": 0.5}), --set
        mu=0.5. Each reaches the functions above that have a keyword argument of its name: (..., *, mu).
    by_block: whether parts differ from block to block; if not, any net is one block.
    options: those of Config that not every method reads, and this one does.
    samples: whether clients ask for negatives.
    common: whether a cohort may have one class set in common.
    own_push: whether an image is pushed from the client's other classes.
    spreads: whether the server pushes near class rows apart after each round.
    contrastive: whether clients learn without labels, with a projection head on the net.
    queued: whether these tell a view from keys that they had before, by a momentum copy.
    baseline: the method, by name, that its traffic is held against.
    pooled: whether there are no clients: all the images are in one place.
    split: whether clients and server each have a part of the net, and step together.
    presets: options of Config -> defaults that are this method's.
    """

    name: str
    label: str
    summary: str
    request: Callable[..., Request]
    paper: str = ""
    parts: Callable[..., Parts] = all_travel
    by_round: ByRound | None = None
    passes: Callable[..., Sequence[Pass]] = all_at_once
    loss: Callable[..., Tensor] | None = None
    penalty_gradient: Callable[..., Tensor] | None = None
    settings: Mapping[str, float] = field(default_factory=dict, hash=False)
    by_block: bool = False
    options: tuple[str, ...] = ()
    samples: bool = False
    common: bool = False
    own_push: bool = True
    spreads: bool = False
    contrastive: bool = False
    queued: bool = False
    baseline: str = "full_softmax"
    pooled: bool = False
    split: bool = False
    presets: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Gives the settings to the functions that name them, and has them read."""
        if not self.settings:
            return
        for hook in HOOKS:
            named = {name: self.settings[name] for name in keywords(getattr(self, hook)) & {*self.settings}}
            if named:
                object.__setattr__(self, hook, partial(getattr(self, hook), **named))
        object.__setattr__(self, "options", tuple(dict.fromkeys([*self.options, "settings"])))

    def configured(self, settings: Mapping[str, float]) -> "Method":
        """With these numbers for those of its settings that are among them."""
        if not self.settings:  # nothing is made anew, of what asks for it often
            return self
        return replace(self, settings={name: settings.get(name, own) for name, own in self.settings.items()})

    def schedule(self, settings: Settings, num_blocks: int) -> Schedule:
        """Of a run. Raises ConfigError for settings, and parts, that do not fit a net of so many blocks."""
        method = self.configured(settings.settings) if self.settings else self
        usual = always(self.name, asked(self.name, "parts", method.parts, num_blocks), num_blocks)
        if method.by_round is None:
            return usual
        found = asked(self.name, "by_round", method.by_round, settings, num_blocks)
        return CheckedSchedule(self.name, found, usual.same, num_blocks, settings.rounds)

    @cached_property
    def rows(self) -> Part:
        """Where the class rows stand, whatever the net."""
        return self.parts(1).rows

    @property
    def stores(self) -> bool:
        """Whether there are class rows for a class store to hold."""
        return self.rows in (Part.TRAINED, Part.HOME)

    @property
    def rowless(self) -> bool:
        """Whether there are no class rows."""
        return self.rows is Part.ABSENT

    @cached_property
    def tells(self) -> bool:
        """Whether the rows that a client asks for and sends depend on the classes that it holds.

        Found by asking for a client with one class of two. Raises ConfigError where that raises anything.
        """
        one, none = torch.tensor([0]), torch.tensor([], dtype=torch.int64)
        who = f"{self.name}, asked for a client with class 0 alone of two, and no negatives"
        found = asked(who, "request", self.request, 2, one, none, "none")
        if not isinstance(found, Request):  # which is said once a client asks so
            return False
        return self.rows is Part.TRAINED and len(found.class_ids) < 2

    @cached_property
    def alone(self) -> bool:
        """Whether clients never meet, as their nets are their own too."""
        return self.parts(1).net_at_home

    @cached_property
    def personal(self) -> bool:
        """Whether every client has a model of its own, so that there is none to try on everybody's images."""
        return self.parts(1).anything_at_home


def keywords(function: Callable[..., Any] | None) -> set[str]:
    """Names of its keyword arguments, those after the *."""
    if function is None or not callable(function):
        return set()
    found = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in found if parameter.kind is parameter.KEYWORD_ONLY}
