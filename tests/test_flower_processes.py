"""A federation of processes on this machine, as Flower starts them: `fedss flower new`, and its nodes.

Flower starts a process for each message, which imports torch: two nodes, with a share of the images, are
enough here. test_flower_sums_processes.py is of as many as the app has, on the images that it comes with.
"""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from fedss_kernels.federated import run
from fedss_kernels.federated.cli import main
from fedss_kernels.federated.files import checkpoint

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedss-kernels[flower]'")
pytestmark = [pytest.mark.exhaustive, pytest.mark.xdist_group("flower")]  # one network at a time

NODES_OF_APP, NODES = 4, 2
# The app's data are followed by this.
FEW_IMAGES = """

def glyphs() -> FederatedData:
    how = Partition("classes", num_clients=2, classes_per_client=30)
    return load("glyphs", data_dir=None, seed=0, how=how, num_classes=CLASSES, writers=12)
"""
TO_RUN = {"nodes": NODES, "cohort": NODES, "min-clients": 1, "rounds": 2}
PATIENCE = 900  # seconds for anything, on a machine with other work
# Flower gives a process that it starts for a message 30 seconds to say a word, and starts another.
PATIENT = f"""
import sys

if any("flower-super" in word for word in sys.orig_argv):
    from flwr.supercore.corestate import in_memory_corestate, sql_corestate

    for state in (in_memory_corestate, sql_corestate):
        state.HEARTBEAT_DEFAULT_INTERVAL = {PATIENCE}
"""


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Network:
    """Each process in a session of its own, so that it ends with all that it started."""

    def __init__(self, folder: Path, nodes: int):
        self.folder, self.app, self.port = folder, folder / "app", free_port()
        self.nodes = nodes
        home = folder / "home"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        (folder / "sitecustomize.py").write_text(PATIENT)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = os.environ | {
            "PATH": path,
            "PYTHONPATH": str(folder),
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        self.processes: dict[str, subprocess.Popen] = {}

    @classmethod
    @contextmanager
    def running(cls, folder: Path, nodes: int, more: str) -> Iterator["Network"]:
        """All its processes, until they are no longer wanted; more: what the app's data are followed by."""
        made = cls(folder, nodes)
        assert main(["flower", "new", str(made.app)]) == 0
        with (made.app / "federation" / "data.py").open("a") as data:
            data.write(more)
        try:
            made.begin()
            yield made
        finally:
            for name in list(made.processes):
                made.end(name)

    def start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True, cwd=self.folder
            )

    def begin(self) -> None:
        port = str(self.port)
        flags = "--insecure", "--disable-runtime-dependency-installation"
        self.start("link", "flower-superlink", *flags, "--port", port)
        wait_until(lambda: answers(self.port), "the link")
        for k in range(self.nodes):
            self.start_node(k)

    def start_node(self, k: int) -> None:
        link, port = f"127.0.0.1:{self.port}", str(free_port())
        command = "flower-supernode", "--insecure", "--superlink", link, "--port", port
        self.start(f"node {k}", *command, "--node-config", f"partition-id={k}")

    def run(self, **options: object) -> subprocess.Popen:
        given = " ".join(f"{name}={toml(value)}" for name, value in options.items())
        self.start("run", "flwr", "run", str(self.app), "here", "--stream", "--run-config", given)
        return self.processes["run"]

    def end(self, name: str, number: int = signal.SIGTERM) -> None:
        process = self.processes.pop(name)
        try:
            os.killpg(process.pid, number)
            process.wait(30)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            process.kill()
            process.wait()

    def server(self) -> int | None:
        """The process of the server's app, which the link's executor started."""
        below, found = {self.processes["link"].pid}, None
        for _ in range(3):
            children = {pid: words for pid, parent, words in processes() if parent in below}
            found = next((pid for pid, words in children.items() if "flwr-serverapp" in words), found)
            below |= set(children)
        return found

    def said(self) -> str:
        return "\n".join(
            f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in self.folder.glob("*.log")
        )


def toml(value: object) -> str:
    return f"'{value}'" if isinstance(value, str | Path) else str(value).lower()


def processes() -> Iterator[tuple[int, int, str]]:
    """(id, its parent's, command line)"""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text()
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        yield int(entry.name), int(stat.rpartition(")")[2].split()[1]), words


def answers(port: int) -> bool:
    with closing(socket.socket()) as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def wait_until(there, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not there():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    with Network.running(tmp_path_factory.mktemp("federation"), NODES, FEW_IMAGES) as made:
        yield made


def simulated(network: Network, out: Path, **options):
    """In one process, the same run as the app's."""
    sys.path.insert(0, str(network.app))
    try:
        from federation.data import glyphs

        from fedss_kernels.federated.flower.federate import Settings
    finally:
        sys.path.remove(str(network.app))
        for name in [name for name in sys.modules if name.partition(".")[0] == "federation"]:
            del sys.modules[name]  # another network's is another
    import tomllib

    text = (network.app / "pyproject.toml").read_text()
    settings = tomllib.loads(text)["tool"]["flwr"]["app"]["config"] | options | {"out": str(out)}
    return run(Settings.of(settings)[1], data=glyphs())


def assert_same_model(first: Path, second: Path) -> None:
    models = [torch.load(folder / "model.pt", weights_only=True) for folder in (first, second)]
    nets = [{name: n.numpy().tobytes() for name, n in model["extractor"].items()} for model in models]
    assert nets[0] == nets[1] and torch.equal(models[0]["weight"], models[1]["weight"])


def ledger(folder: Path) -> list[dict[str, str]]:
    with (folder / "ledger.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rounds_saved(out: Path) -> int:
    return checkpoint.last_round(out) if checkpoint.exists(out) else 0


def test_a_federation_whose_server_is_killed_and_started_again_has_the_bits_of_a_simulation(network):
    out, options = network.folder / "out", TO_RUN | {"timeout": PATIENCE}
    running = network.run(out=out, **options)
    wait_until(lambda: rounds_saved(out) >= 1 or running.poll() is not None, "a checkpoint")
    server = network.server()
    assert server is not None, network.said()
    os.kill(server, signal.SIGKILL)
    network.end("run")
    assert not (out / "summary.json").exists()
    done = network.run(out=out, resume=True, **options).wait(PATIENCE)
    assert done == 0 and (out / "summary.json").exists(), network.said()
    simulated(network, network.folder / "simulated", **TO_RUN)
    assert_same_model(out, network.folder / "simulated")
    assert ledger(out) == ledger(network.folder / "simulated")


def test_a_node_that_is_killed_in_the_middle_of_a_round_costs_its_answers_alone(network):
    out = network.folder / "without"
    running = network.run(out=out, timeout=PATIENCE, **TO_RUN)
    wait_until(lambda: rounds_saved(out) >= 1 or running.poll() is not None, "a checkpoint")
    network.end("node 1", signal.SIGKILL)
    assert running.wait(PATIENCE) == 0, network.said()
    found = [(line["round"], line["client"], line["outcome"]) for line in ledger(out)]
    assert found == [
        ("1", "0", "accepted"),
        ("1", "1", "accepted"),
        ("2", "0", "accepted"),
        ("2", "1", "dropped"),
    ], network.said()
