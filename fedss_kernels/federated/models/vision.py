"""MobileNetV3 and ResNet-18 of torchvision, extra `vision`, with GroupNorm and an embedding for a head.

The FedSS paper (Waghmare et al., arXiv:2203.04888, A.2): "the default MobileNetV3 architecture, except that
instead of 1280 dimensional embedding we output 64", GroupNorm in place of BatchNorm.
"""

import importlib
import importlib.util
import logging
import pickle
import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ...doctor import misfit
from .blocks import named_blocks
from .layers import InColour, group_norm

log = logging.getLogger(__name__)
_WRAPPED = re.compile(r"^((module|_orig_mod)\.)+")


class MobileNet(nn.Sequential):
    """InColour and torchvision's MobileNetV3. Blocks: all its features, the embedding."""

    @property
    def blocks(self) -> nn.Sequential:
        net: Any = self[1]
        stem, *features = net.features
        middle = {f"block{i}": block for i, block in enumerate(features, 1)}
        embedding = nn.Sequential(net.avgpool, nn.Flatten(), net.classifier)
        return named_blocks(stem=nn.Sequential(self[0], stem), **middle, embedding=embedding)


class ResNet(nn.Sequential):
    """InColour and torchvision's ResNet. Blocks: the stem and its pooling, the four stages, the embedding.

    Trained stage by stage it needs little less memory than as a whole: most of its activations are the first
    stage's, whose images are largest. Several times less takes a net of one width and grid throughout.
    """

    @property
    def blocks(self) -> nn.Sequential:
        net: Any = self[1]
        return named_blocks(
            stem=nn.Sequential(self[0], net.conv1, net.bn1, net.relu, net.maxpool),
            block1=net.layer1,
            block2=net.layer2,
            block3=net.layer3,
            block4=net.layer4,
            embedding=nn.Sequential(net.avgpool, nn.Flatten(), net.fc),
        )


def mobilenet_v3_small(embedding_dim: int = 64) -> nn.Module:
    """(B, 1 or 3, H, W) in [0, 1] to (B, D): the pooled features, 576 of them, and a linear layer."""
    net = _torchvision("mobilenet_v3_small")(norm_layer=group_norm)
    net.classifier = nn.Linear(576, embedding_dim)
    return MobileNet(InColour(), net)


def mobilenet_v3_large(embedding_dim: int = 64) -> nn.Module:
    """The same of 960: in place of the layer that makes 1280 of them, and of its classifier."""
    net = _torchvision("mobilenet_v3_large")(norm_layer=group_norm)
    net.classifier = nn.Linear(960, embedding_dim)
    return MobileNet(InColour(), net)


def resnet18(embedding_dim: int = 64) -> nn.Module:
    """He, Zhang, Ren and Sun, CVPR 2016: the pooled features, 512 of them, and a linear layer."""
    net = _torchvision("resnet18")(norm_layer=group_norm)
    net.fc = nn.Linear(512, embedding_dim)
    return ResNet(InColour(), net)


def load_checkpoint(model: nn.Module, path: Any) -> nn.Module:
    """The parameters in a file of torch.save: a state dict, or {"extractor": one}, as a run's model.pt.

    Names may begin as a wrapper's do ("module.", "_orig_mod."), and the state dict may lie under "state_dict"
    or "model". Where the file has none, or one of another shape, as of the head of another D, the model's own
    stay, and a warning names them. Raises ValueError for a file that holds none of the model's parameters,
    some that are no floating-point numbers or not finite, or anything but tensors; and for a run's whose
    clients have nets of their own, in which the extractor is the one that all of them began with.
    """
    own, found = model.state_dict(), _loaded(path)
    if isinstance(found, dict) and {"extractor", "bodies"} <= found.keys():
        raise ValueError(f"{path}: expected a run with one net for all, got one whose clients have their own")
    state = _named_alike(_state_dict(found), own)
    fitting = {name: value for name, value in state.items() if value.shape == own[name].shape}
    if not fitting:
        raise ValueError(f"{path} holds no parameter of this model")
    if wrong := [
        name
        for name, value in fitting.items()
        if value.dtype.is_floating_point != own[name].dtype.is_floating_point
    ]:
        raise ValueError(
            f"{path}: expected {own[wrong[0]].dtype} in {wrong[0]}, got {fitting[wrong[0]].dtype}"
        )
    if wrong := [name for name, value in fitting.items() if not value.isfinite().all()]:
        raise ValueError(f"{path} holds numbers that are not finite, in {', '.join(wrong[:3])}")
    if kept := [name for name in own if name not in fitting]:
        more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
        log.warning(
            "%s: without, or in another shape: %s%s; the net's own stay", path, ", ".join(kept[:3]), more
        )
    model.load_state_dict(fitting, strict=False)
    return model


def _state_dict(found: Any) -> dict[str, Tensor]:
    """Of what a file holds, names without those of wrappers."""
    for place in ("extractor", "state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(place), dict):
            found = found[place]
    tensors = found.items() if isinstance(found, dict) else ()
    return {_WRAPPED.sub("", name): value for name, value in tensors if isinstance(value, Tensor)}


def _loaded(path: Any) -> Any:
    """The tensors that torch.save wrote. Raises ValueError, in a line, for another file."""
    expected = "expected a file as torch.save(net.state_dict(), FILE) writes"
    try:
        with open(path, "rb") as file:
            begins = file.read(4)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if not begins.startswith((b"PK\3\4", b"\x80")):  # an archive, or as by older versions a pickle
        raise ValueError(f"{path} is no file of torch.save: {expected}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that are refused here
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        more = f" ({found[1]})" if found else ""
        raise ValueError(f"{path} holds more than tensors{more}: {expected}") from None
    except Exception:  # what a damaged file raises may be anything
        raise ValueError(f"{path} is damaged, or not of torch.save: {expected}") from None


def _named_alike(state: dict[str, Any], own: dict[str, Tensor]) -> dict[str, Any]:
    """Entries by this model's names: its own, or torchvision's, which have no "1." of a sequence before."""
    return {name: state[key] for name in own for key in (name, name.removeprefix("1.")) if key in state}


def _torchvision(name: str) -> Any:
    """Imported when needed: the rest does without it."""
    try:
        return getattr(importlib.import_module("torchvision.models"), name)
    except (ImportError, RuntimeError) as error:  # the latter beside a torch of another version
        why = f', which cannot be imported ({error}): pip install "fedss-kernels[vision]"'
        if importlib.util.find_spec("torchvision"):
            why = f": {misfit(error)}"
        raise ValueError(f"model: {name} needs torchvision{why}") from None


def unavailable(name: str) -> str:
    """Why the net of this name cannot be made here; "" where it can."""
    try:
        _torchvision(name)
    except ValueError as error:
        return str(error)
    return ""
