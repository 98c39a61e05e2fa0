"""The app that `fedss flower new` writes, in Flower's simulation engine."""

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedss-kernels[flower]'")
pytest.importorskip("ray", reason="the engine is not installed: pip install 'flwr[simulation]'")

from test_flower_processes import (
    NODES_OF_APP,
    PATIENCE,
    Network,
    answers,
    assert_same_model,
    ledger,
    main,
    simulated,
    toml,
    wait_until,
)

pytestmark = pytest.mark.exhaustive


@pytest.fixture
def network(tmp_path):
    made = Network(tmp_path, NODES_OF_APP)
    assert main(["flower", "new", str(made.app)]) == 0
    flags = "--insecure", "--simulation", "--disable-runtime-dependency-installation"
    try:
        made.start("link", "flower-superlink", *flags, "--host", "127.0.0.1", "--port", str(made.port))
        wait_until(lambda: answers(made.port), "the link")
        yield made
    finally:
        for name in list(made.processes):
            made.end(name)


@pytest.mark.parametrize("negatives", ["fresh", "shared"])
def test_the_engine_comes_to_the_bits_of_a_simulation(negatives, network):
    """With secure sums too: what a node keeps from one message to the next is there."""
    out, options = network.folder / "out", {"rounds": 2, "negatives": negatives}
    given = " ".join(f"{name}={toml(value)}" for name, value in {"out": out, **options}.items())
    nodes = f"num-supernodes={NODES_OF_APP} client-resources-num-cpus=1"
    asked = "--stream", "--federation-config", nodes, "--run-config", given
    network.start("run", "flwr", "run", str(network.app), "here", *asked)
    done = network.processes["run"].wait(PATIENCE)
    assert done == 0 and (out / "summary.json").exists(), network.said()
    simulated(network, network.folder / "simulated", **options)
    assert_same_model(out, network.folder / "simulated")
    assert ledger(out) == ledger(network.folder / "simulated")
