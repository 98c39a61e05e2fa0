"""The vision transformer (Dosovitskiy et al., ICLR 2021, arXiv:2010.11929), for learning block by block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Chain
from .layers import InColour, check_at_least_1


def vision_transformer(
    embedding_dim: int = 192, depth: int = 12, heads: int | None = None, patch: int = 4, side: int = 32
) -> Chain:
    """Images (B, 1 or 3, side, side) in [0, 1] to (B, D), by `depth` blocks of width D.

    The stem makes a token of each patch x patch pixels, and adds a learned vector for its place. Features are
    the mean over the tokens; no class token, norm or layer follows, so that a net may end after any block.
    Heads are by default of 32 numbers. ViT-Ti/16: embedding_dim 192, depth 12, heads 3, patch 16.
    """
    heads = max(1, embedding_dim // 32) if heads is None else heads
    check_at_least_1("vit", embedding_dim=embedding_dim, depth=depth, heads=heads, patch=patch, side=side)
    if embedding_dim % heads:
        raise ValueError(f"model: vit: expected heads that divide embedding_dim {embedding_dim}, got {heads}")
    if side % patch:
        raise ValueError(f"model: vit: expected a patch that divides side {side}, got {patch}")
    blocks = {f"block{i}": Block(embedding_dim, heads) for i in range(1, depth + 1)}
    return Chain(TokenMean(), stem=Patches(embedding_dim, patch, side), **blocks)


class Patches(nn.Module):
    """(B, 1 or 3, side, side) to (B, tokens, width): a linear function of each patch, and its place."""

    def __init__(self, width: int, patch: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.patches = nn.Sequential(InColour(), nn.Conv2d(3, width, patch, patch))
        self.places = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, width))

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2:] != (self.side, self.side):
            got = "x".join(map(str, images.shape[2:]))
            raise ValueError(
                f"expected images of {self.side}x{self.side} pixels, its setting side, got {got}"
            )
        return self.patches(images).flatten(2).mT + self.places


class Block(nn.Module):
    """(B, tokens, width) to the same: x <- x + attention(norm(x)); x <- x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv = nn.LayerNorm(width), _linear(width, 3 * width)
        self.out, self.norm2 = _linear(width, width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(_linear(width, 4 * width), nn.GELU(), _linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, heads, tokens, width / heads)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class TokenMean(nn.Module):
    """(B, tokens, width) to (B, width)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


def _linear(before: int, after: int) -> nn.Linear:
    layer = nn.Linear(before, after)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
