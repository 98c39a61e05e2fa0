"""A net that split learning begins with, its clients' half and the server's, in one file of safetensors.

The tensors are net.NAME and head.NAME, by the names of the net's state and of the head's, which only the
server has. The metadata has, as JSON, `config`, the options that it was made with, and `made`, what else is
to be known of it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..algorithms import METHODS
from ..config import Config, ConfigError
from ..defaults import OWN
from ..disk import replacing
from .checkpoint import safetensors

OPTION = "half_checkpoint"
SHARED = ("model", "embedding_dim", "cut", "bottleneck", "key_dim")  # options that say what the halves are


@dataclass(frozen=True)
class HalfFile:
    net: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    config: Mapping[str, Any]
    made: Mapping[str, Any]

    def write(self, path: Path) -> None:
        with replacing(path) as file:
            file.write(self.content)

    @property
    def content(self) -> bytes:
        tensors = {f"net.{name}": value for name, value in self.net.items()}
        tensors |= {f"head.{name}": value for name, value in self.head.items()}
        metadata = {"config": json.dumps(dict(self.config)), "made": json.dumps(dict(self.made))}
        whole = {name: value.detach().contiguous() for name, value in tensors.items()}
        return safetensors().save(whole, metadata)

    @classmethod
    def read(cls, path: Path) -> "HalfFile":
        """Raises ConfigError for a file that is none."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigError(OPTION, f"cannot read {path}: {error.strerror}") from None
        try:
            tensors = safetensors().load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            config, made = (json.loads(header["__metadata__"][name]) for name in ("config", "made"))
        except Exception:  # what a damaged file raises may be anything
            raise ConfigError(OPTION, f"{path} is damaged, or not of fedss harden") from None
        return cls(_of(tensors, "net."), _of(tensors, "head."), config, made)


def half_of(config: Config) -> HalfFile | None:
    """What a run's halves begin with, if there is a file. Raises ConfigError where it is of another net."""
    path = config.half_checkpoint
    if path is None or not METHODS[config.method].split:
        return None
    found = HalfFile.read(path)
    names = [name for name in SHARED if config.model != OWN or name not in ("model", "embedding_dim")]
    there = [(name, found.config.get(name), getattr(config, name)) for name in names]
    if different := [f"{name} {was}, got {now}" for name, was, now in there if was != now]:
        raise ConfigError(OPTION, f"{path} is of another net: expected {'; '.join(different)}")
    return found


def _of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
