"""The simulator's house: every room has its floor, and what is imported lies below."""

import ast
from pathlib import Path

import pytest

import fedss_kernels.federated

HOUSE = Path(fedss_kernels.federated.__file__).parent
# From the ground up; rooms on one floor may use each other, but in no circle.
FLOORS = (
    (
        "config_error",
        "config_option",
        "disk",
        "given_back",
        "interrupts",
        "ledger",
        "lock",
        "measures",
        "memory_bytes",
        "private_retrieval",
        "randomness",
        "scratch",
        "secure_sums",
        "stopwatch",
    ),
    ("data", "models"),
    ("messages", "surroundings"),
    ("algorithms",),
    ("clashes", "config", "defaults", "idle_settings", "learning_rate", "plugins", "privacy_budget"),
    ("to_paste",),
    ("cohort", "files"),
    ("plan",),
    ("clients",),
    ("given_data", "loading", "server"),
    ("any_round", "metrics", "sending", "workers"),
    ("fine_tuning", "probes", "reports", "trained_net"),
    ("evaluation", "fedavg_round", "split_learning"),
    ("figures",),
    ("run_loop",),
    ("comparisons", "flower", "testing"),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def rooms_used(path: Path) -> set[str]:
    """Of federated/, by one module of it: "clients.player" and the like, itself left out."""
    own = path.relative_to(HOUSE).with_suffix("").parts
    package = own[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and 0 < node.level <= len(package) + 1:
            base = list(package[: len(package) + 1 - node.level])
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                named = HOUSE.joinpath(*base, alias.name)
                is_module = named.is_dir() or named.with_suffix(".py").exists()
                found.add(".".join([*base, alias.name] if is_module else base))
    return found


MODULES = sorted(path for path in HOUSE.rglob("*.py") if path != HOUSE / "__init__.py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(HOUSE).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_what_is_imported_lies_below(path):
    own = FLOOR[name_of(path).split(".")[0]]
    above = [used for used in rooms_used(path) if FLOOR[used.split(".")[0]] > own]
    assert not above


def test_there_is_no_circle():
    uses = {name_of(path): rooms_used(path) & {name_of(p) for p in MODULES} for path in MODULES}
    while free := [name for name, used in uses.items() if not used & uses.keys() - {name}]:
        for name in free:
            del uses[name]
    assert not uses


def test_every_room_is_known():
    assert {name_of(path).split(".")[0] for path in MODULES} == FLOOR.keys()


def test_server_and_clients_know_the_messages_and_not_each_other():
    for path in MODULES:
        room, used = name_of(path).split(".")[0], {name.split(".")[0] for name in rooms_used(path)}
        assert room not in ("server", "clients") or not used & {"server", "clients"} - {room}, path


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_function_is_long(path):
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    ]
    assert not [f.name for f in functions if f.end_lineno - f.lineno >= 60]
