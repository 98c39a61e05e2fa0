"""A Flower app to start from, in a folder: what `fedss flower new` writes. It needs no flwr."""

import re
from pathlib import Path

from ..disk import write_whole

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0.0"
description = "A federation with very many classes"
license = "Apache-2.0"
dependencies = ["fedss-kernels[flower,sim]"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "{name}"

[tool.flwr.app.components]
serverapp = "federation.server:app"
clientapp = "federation.client:app"

# Any option of `fedss run --help`; what stands here may be another with `flwr run --run-config "rounds=50"`.
[tool.flwr.app.config]
nodes = 4             # as many as there are, with the numbers 0, 1, 2, 3
timeout = 600         # seconds that the server waits for answers; who is late has no part in the round
out = "runs/flower"   # the results, where the server runs: fedss report runs/flower
resume = false        # true: go on from the last checkpoint there
overwrite = false     # true: replace what is there
method = "fedss"
negatives = "fresh"   # "shared": the server sees no node's classes or changes, but secure sums of them
num-negatives = 20
model = "conv4"
rounds = 20
cohort = 4            # nodes drawn for each round
min-clients = 3       # least answers that make one
batch-size = 10
client-lr = 0.05
eval-every = 5
checkpoint-every = 1
seed = 0
"""

DATA = '''\
"""Whose images these are: drawings, for a start. Put your own in the place of both functions."""

from fedss_kernels.federated.data import FederatedData, Partition, load

CLASSES = 60  # of all nodes together; each has a row in the class matrix


def of_node(node):
    """(images (n, channels, H, W) uint8, labels (n,)) of a node, by what it was started with."""
    drawn = glyphs()
    held = drawn.clients[node["partition-id"]]
    return drawn.images[held], drawn.labels[held]


def of_server():
    """Test images and their labels, which the server has; no node needs them."""
    drawn = glyphs()
    return drawn.test_images, drawn.test_labels


def glyphs() -> FederatedData:
    how = Partition("classes", num_clients=4, classes_per_client=15)
    return load("glyphs", data_dir=None, seed=0, how=how, num_classes=CLASSES, writers=60)
'''

CLIENT = """\
from fedss_kernels.federated.flower import client_app

from .data import of_node

app = client_app(of_node)
"""

SERVER = """\
from fedss_kernels.federated.flower import server_app

from .data import CLASSES, of_server

app = server_app(CLASSES, of_server)
"""

README = """\
# {name}

1. In `federation/data.py`, return a node's own images and labels, and the server's test images.
2. On the server, where this folder is, and on each node: `pip install "fedss-kernels[flower,sim]"`.
3. On the server:
   `flower-superlink --insecure --host 0.0.0.0 --port 9191 --disable-runtime-dependency-installation`
4. On each node, with a number of its own (several on one machine need ports of their own, as `--port 9194`):
   `flower-supernode --insecure --superlink SERVER:9191 --node-config "partition-id=0"`
5. In `~/.flwr/config.toml`: `[superlink.mine]`, below it `address = "SERVER:9191"` and `insecure = true`.
6. `flwr run . mine --stream`, or after an end before the last round: `--run-config "resume=true"`.

`--insecure` is for trials: with certificates and `--enable-supernode-auth` the server knows who speaks.
"""

FILES = {
    "pyproject.toml": PYPROJECT,
    "README.md": README,
    "federation/__init__.py": "",
    "federation/data.py": DATA,
    "federation/client.py": CLIENT,
    "federation/server.py": SERVER,
}


def write_app(folder: Path) -> None:
    """Writes all of FILES. Raises FileExistsError where the folder has something in it, OSError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"expected a new or an empty folder, got {folder}")
    (folder / "federation").mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-") or "federation"
    for path, text in FILES.items():
        write_whole(folder / path, text.replace("{name}", name))
