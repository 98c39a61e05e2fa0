"""A narrow place in a net where it is cut: few channels cross it, and show less of an image.

Jingtao Li, Adnan Siraj Rakin, Xing Chen, Zhezhi He, Deliang Fan and Chaitali Chakrabarti, "ResSFL: A
Resistance Transfer Framework for Defending Model Inversion Attack in Split Federated Learning", CVPR 2022,
arXiv:2205.04007, and MocoSFL, ICLR 2023, which has C4S2: 4 channels at half the height and width.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .blocks import Chain


@dataclass(frozen=True)
class Bottleneck:
    channels: int
    stride: int

    @classmethod
    def read(cls, text: str) -> "Bottleneck":
        """From words, as on the command line. Raises ValueError.

        >>> Bottleneck.read("C4S2")
        Bottleneck(channels=4, stride=2)
        """
        found = re.fullmatch("C([1-9][0-9]{0,3})S([1-9])", text)
        if not found:
            expected = "expected C, 1 to 9999 channels, S and a stride of 1 to 9, as C4S2"
            raise ValueError(f"bottleneck: {expected}, got {text!r}")
        return cls(int(found[1]), int(found[2]))


def narrowed(net: nn.Module, after: int, bottleneck: Bottleneck, images: Tensor, seed: int) -> Chain:
    """The net, on the same parameters and of as many blocks, with new layers on both sides of a cut.

    Block `after` ends with a convolution to the bottleneck's channels, 3x3 with a bias, and ReLU. The next
    begins with a transposed one back to what it takes, and ReLU. Neither is normalised or standardised.
    Their weights are Xavier's and a function of the seed, their biases 0. `images` are any that the net
    takes. Raises ValueError where there is no such cut, or other than channels of pixels crosses it.
    """
    if not isinstance(net, Chain) or not 1 <= after < len(net.blocks):
        there = f"{len(net.blocks)} blocks" if isinstance(net, Chain) else f"a {type(net).__name__}"
        words = "a net of blocks one after another, a Chain, that is cut after 1 or more and before the last"
        raise ValueError(f"bottleneck: expected {words}, got {there} and a cut after {after}")
    with torch.no_grad():
        crossing = net.eval().blocks[:after](images)
    if crossing.dim() != 4:
        shape = tuple(crossing.shape)
        raise ValueError(f"bottleneck: expected (B, channels, height, width) at the cut, got {shape}")
    narrow, widen = _layers(crossing.shape[1:], bottleneck, seed)
    blocks = dict(net.blocks.named_children())
    names = list(blocks)
    first, second = names[after - 1], names[after]
    blocks[first] = nn.Sequential(blocks[first], narrow, nn.ReLU())
    blocks[second] = nn.Sequential(widen, nn.ReLU(), blocks[second])
    return Chain(net.pool, **blocks)


def _layers(crossing: torch.Size, bottleneck: Bottleneck, seed: int) -> tuple[nn.Module, nn.Module]:
    """(to the bottleneck, back to the same channels, height and width)"""
    (C, H, W), stride = crossing, bottleneck.stride
    lost = (H - 1) % stride, (W - 1) % stride  # pixels that the way there leaves over
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        narrow = nn.Conv2d(C, bottleneck.channels, 3, stride, padding=1)
        widen = nn.ConvTranspose2d(bottleneck.channels, C, 3, stride, padding=1, output_padding=lost)
        for p in (*narrow.parameters(), *widen.parameters()):
            nn.init.xavier_uniform_(p) if p.dim() > 1 else nn.init.zeros_(p)
    return narrow, widen
