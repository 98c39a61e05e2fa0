"""The federated methods by name, one file each; `plugins.register` adds others."""

from ..messages import Request
from .central_moco import CENTRAL_MOCO
from .centralized import CENTRALIZED
from .fedavg import FEDAVG
from .fedaws import FEDAWS
from .fedbabu import FEDBABU
from .fedbabu_ss import FEDBABU_SS
from .fedper import FEDPER
from .fedrep import FEDREP
from .fedss import FEDSS
from .fl_moco import FL_MOCO
from .full_softmax import FULL_SOFTMAX
from .given import Given
from .layerwise import LAYERWISE
from .local_only import LOCAL_ONLY
from .method import Method
from .mocosfl import MOCOSFL
from .neg_only import NEG_ONLY
from .parts import Part, Parts, Pass
from .pos_only import POS_ONLY
from .simclr import SIMCLR

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        FEDSS,
        FULL_SOFTMAX,
        POS_ONLY,
        NEG_ONLY,
        FEDAWS,
        CENTRALIZED,
        FEDAVG,
        FEDBABU,
        FEDBABU_SS,
        FEDPER,
        FEDREP,
        LOCAL_ONLY,
        SIMCLR,
        LAYERWISE,
        MOCOSFL,
        CENTRAL_MOCO,
        FL_MOCO,
    )
}


OURS = tuple(METHODS)  # the package's, whatever is registered beside them


def readers(option: str) -> list[str]:
    """The methods whose own an option of Config is; none where every method reads it."""
    return [name for name, method in METHODS.items() if option in method.options]


def readers_in_words(option: str) -> str:
    """ "a, b and c"."""
    *others, last = readers(option)
    return f"{', '.join(others)} and {last}" if others else last


def settings_of_all() -> dict[str, float]:
    """Every method's own numbers, by name, as the first that has them has them."""
    return {name: own for method in reversed(METHODS.values()) for name, own in method.settings.items()}


__all__ = [
    "METHODS",
    "OURS",
    "Given",
    "Method",
    "Part",
    "Parts",
    "Pass",
    "Request",
    "readers",
    "readers_in_words",
    "settings_of_all",
]
