"""Secure sums of processes on this machine, of which one is killed between two of their stages."""

import signal

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedss-kernels[flower]'")

from test_flower_processes import (
    NODES_OF_APP,
    PATIENCE,
    Network,
    assert_same_model,
    ledger,
    simulated,
    wait_until,
)

pytestmark = [pytest.mark.exhaustive, pytest.mark.xdist_group("flower")]  # one network at a time

LATE = 300  # seconds that the server waits for the node that is killed
# A node's data are asked for once as it says who it is, and then for its classes and for its changes.
LAST = 3  # times, of which the last is for its changes
DATA = """

import time
from pathlib import Path

read = of_node


def of_node(node):
    asked = Path({folder!r}) / f"asked {{node['partition-id']}}"
    with asked.open("a") as times:
        times.write("x")
    if node["partition-id"] == 3 and asked.stat().st_size == {last}:
        time.sleep(3600)
    return read(node)
"""


@pytest.fixture
def network(tmp_path):
    data = DATA.format(folder=str(tmp_path), last=LAST)
    with Network.running(tmp_path, NODES_OF_APP, data) as made:
        yield made


def times(network: Network, k: int) -> int:
    asked = network.folder / f"asked {k}"
    return asked.stat().st_size if asked.exists() else 0


def test_a_node_that_is_killed_between_two_stages_leaves_the_sum_of_the_others(network, monkeypatch):
    """To the bits of a simulation in which it drops out."""
    out, options = network.folder / "out", {"rounds": 1, "negatives": "shared", "min-clients": 3}
    running = network.run(out=out, timeout=LATE, **options)
    wait_until(lambda: times(network, 3) >= LAST or running.poll() is not None, "the changes")
    network.end("node 3", signal.SIGKILL)
    assert running.wait(PATIENCE) == 0 and (out / "summary.json").exists(), network.said()
    *found, last = [line["outcome"] for line in ledger(out)]
    assert found == ["accepted"] * 3 and last in ("late", "dropped"), network.said()
    monkeypatch.setattr(
        "fedss_kernels.federated.fedavg_round.absence",
        lambda config, round, attempt, k: "dropped" if k == 3 else None,
    )
    simulated(network, network.folder / "simulated", **options)
    assert_same_model(out, network.folder / "simulated")
