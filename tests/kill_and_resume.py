"""Kills runs at random moments and resumes them, until they are done: `python tests/kill_and_resume.py`.

Each life is a fork of this process, so that it starts at once. What it was doing when it was killed is read
from memory that it shares.
"""

import argparse
import csv
import json
import mmap
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from tiny_federation import tiny_config, tiny_data, tiny_model

from fedss_kernels.federated import Config, run
from fedss_kernels.federated.files import checkpoint
from fedss_kernels.federated.files.run_folder import RunFolder
from fedss_kernels.federated.server.class_store import ClassStore
from fedss_kernels.federated.server.row_table import RowTable

# Functions that write, an inner one after the outer that calls it.
WRITES = {
    "the tables": (RunFolder, "add"),
    "a checkpoint": (checkpoint, "write"),
    "the store": (RowTable, "step"),
    "the journal": (ClassStore, "keep"),
    "a sync of the store": (ClassStore, "sync"),
    "a new journal": (ClassStore, "mark"),
    "a roll-back": (ClassStore, "roll_back"),
}
NAMES = ("nothing", *WRITES)


def noting(real: Callable, number: int, now: mmap.mmap) -> Callable:
    def noted(*arguments, **options):
        before, now[0] = now[0], number
        try:
            return real(*arguments, **options)
        finally:
            now[0] = before

    return noted


def live(config: Config, resume: bool, now: mmap.mmap) -> None:
    """In the child: a life."""
    for number, (owner, name) in enumerate(WRITES.values(), 1):
        mock.patch.object(owner, name, noting(getattr(owner, name), number, now)).start()
    run(config, data=tiny_data(), model=tiny_model(), resume=resume)


def life(config: Config, seconds: float | None) -> str | None:
    """Starts or resumes the run; kills it after so long. What it was doing then; None: it was done before."""
    assert config.out is not None
    if (config.out / "summary.json").exists():
        return None  # killed after its last word
    resume = any(config.out.glob("checkpoint-0*"))
    if not resume:
        for folder in (config.out, config.class_store):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
    now = mmap.mmap(-1, 1)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            live(config, resume, now)
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return NAMES[now[0]]
    if os.WEXITSTATUS(status):
        raise RuntimeError(f"a life of the run in {config.out} failed")
    return None


def outcome(config: Config) -> dict[str, object]:
    """All that a finished run leaves, but for times and places."""
    assert config.out is not None
    found: dict[str, object] = {}
    for name in ("metrics.csv", "ledger.csv"):
        with (config.out / name).open(newline="") as file:
            found[name] = [{k: v for k, v in line.items() if k != "seconds"} for line in csv.DictReader(file)]
    summary = json.loads((config.out / "summary.json").read_text())
    found["summary"] = {k: v for k, v in summary.items() if k != "seconds"}
    model = torch.load(config.out / "model.pt", weights_only=True)
    found["model"] = {name: value.numpy().tobytes() for name, value in model["extractor"].items()}
    if config.class_store is not None:
        found["weight"] = (config.class_store / "rows.bin").read_bytes()
    else:
        found["weight"] = model["weight"].numpy().tobytes()
    return found


def experiment(folder: Path, kills: int, *, store: bool, seed: int, rounds: int = 60) -> Counter:
    """Runs, killed `kills` times in all and then let go on; what they were doing each time.

    Raises AssertionError if one ends otherwise than the run that nobody disturbed.
    """
    rng, doing = random.Random(seed), Counter()
    while doing.total() < kills:
        number = doing.total()

        def config(name: str, number: int = number) -> Config:
            return tiny_config(
                rounds=rounds,
                checkpoint_every=1,
                eval_every=20,
                seed=number,
                out=folder / name,
                class_store=folder / f"{name}-rows" if store else None,
            )

        assert life(config("undisturbed"), None) is None
        while (was := life(config("killed"), _wait(rng) if doing.total() < kills else None)) is not None:
            doing[was] += 1
        assert outcome(config("killed")) == outcome(config("undisturbed")), f"seed {number}"
        for path in folder.iterdir():
            shutil.rmtree(path)
    return doing


def _wait(rng: random.Random) -> float:
    return rng.uniform(0.02, 0.4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="for each of the two stores")
    parser.add_argument("--folder", type=Path, help="on the disk that is to be written to")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for store in (False, True):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            doing = experiment(Path(folder), given.kills, store=store, seed=int(store))
        inside, where = doing.total() - doing["nothing"], "in a class store" if store else "in memory"
        print(f"rows {where}: {doing.total()} kills, {inside} inside a write: {dict(doing)}", flush=True)


if __name__ == "__main__":
    main()
