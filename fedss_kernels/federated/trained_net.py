"""The net of a finished run's folder, for whoever goes on with it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .algorithms import METHODS
from .clients.augment import as_input, centre_crop
from .config import Config
from .data.damage import printable, some
from .data.pixels import decode, failure, read_file
from .defaults import OWN
from .files.run_folder import read_config, read_net
from .models import build_model
from .models.copies import copied

AsInput = Callable[[Tensor | Sequence[str | Path]], Tensor]


def load_net(run: str | Path, *, model: nn.Module | None = None) -> tuple[nn.Module, AsInput]:
    """(the trained net, what makes its input of images) from the folder of a finished run.

    run: the folder. model: a module like the one that the run was given in Python, or that its Result has; a
    copy of it is returned. None: the net that the run's options name.

    The net is in eval mode on the CPU; it maps (B, channels, H, W) float32 in [0, 1] to embeddings (B, D).
    as_input makes that of (B, channels, H, W) uint8 images of the run's size, or of image files, if the run's
    data were some, which it resizes as the run did; of each image it takes the middle, where the run did.
    It raises ValueError for other images, and for files that give no pixels, with their names.

    Raises ValueError where no finished run is in the folder, or one with a net for each client, or of
    another net than `model`.
    """
    folder = Path(run)
    config, _ = read_config(folder)
    state = read_net(folder)
    if METHODS[config.method].alone:
        words = f"with one net for all, got one of {config.method}, whose clients have their own"
        raise ValueError(f"{folder}: expected a run {words}")
    net = _built(config) if model is None else copied(model)
    try:
        net.load_state_dict(state)
    except RuntimeError:
        raise ValueError(f"model: {folder / 'model.pt'} is of another net") from None
    return net.cpu().eval(), lambda images: _prepared(images, config)


def _built(config: Config) -> nn.Module:
    words = ""
    if config.model == OWN:
        words = (
            "whose net has a name, or one like it, as load_net(run, model=...): it was handed over in Python"
        )
    elif METHODS[config.method].split and config.bottleneck is not None:
        words = f"without a bottleneck, whose layers are made for the images at hand, got {config.bottleneck}"
    if words:
        raise ValueError(f"model: expected a run {words}")
    return build_model(config.model, config.embedding_dim, config.seed)


def _prepared(images: Tensor | Sequence[str | Path], config: Config) -> Tensor:
    if not isinstance(images, Tensor):
        if not isinstance(images, Sequence) or isinstance(images, str):
            raise ValueError(f"images: expected a tensor or a sequence of files, got {type(images).__name__}")
        if not config.image_size:
            raise ValueError(f"images: expected a tensor, as image files are no data of {config.data}")
        images = _read(images, config.image_size)
    if images.dim() != 4 or images.dtype != torch.uint8:
        got = f"{tuple(images.shape)} {images.dtype}"
        raise ValueError(f"images: expected (B, channels, H, W) uint8, got {got}")
    return as_input(centre_crop(images, config.crop_size) if config.crop_size else images)


def _read(files: Sequence[str | Path], size: int) -> Tensor:
    pixels = np.empty((len(files), 3, size, size), np.uint8)
    failures = dict[str, str]()
    for image, file in zip(pixels, files, strict=True):
        try:
            image[:] = np.frombuffer(decode(read_file(file), size), np.uint8).reshape(image.shape)
        except Exception as error:  # a damaged image may raise anything
            failures[str(file)] = failure(error).reason
    if failures:
        named = some(f"{printable(file)} ({reason})" for file, reason in failures.items())
        raise ValueError(f"images: {len(failures)} of {len(files)} files cannot be read: {named}")
    return torch.from_numpy(pixels)
