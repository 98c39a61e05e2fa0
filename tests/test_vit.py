"""The vision transformer: against torch's own layers, its gradients, the paper's size, what it refuses."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedss_kernels.federated.models import build_model
from fedss_kernels.federated.models.vit import Block, vision_transformer


def theirs(block: Block) -> nn.Module:
    """torch's encoder layer with a block's weights."""
    width = block.out.in_features
    layer = nn.TransformerEncoderLayer(
        width, block.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).double()
    layer.load_state_dict(
        {
            "self_attn.in_proj_weight": block.qkv.weight,
            "self_attn.in_proj_bias": block.qkv.bias,
            **{f"self_attn.out_proj.{k}": v for k, v in block.out.state_dict().items()},
            **{f"norm1.{k}": v for k, v in block.norm1.state_dict().items()},
            **{f"norm2.{k}": v for k, v in block.norm2.state_dict().items()},
            **{f"linear1.{k}": v for k, v in block.mlp[0].state_dict().items()},
            **{f"linear2.{k}": v for k, v in block.mlp[2].state_dict().items()},
        }
    )
    return layer


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("heads", "patch"), [(1, 8), (3, 4), (4, 16)])
def test_it_is_what_torchs_layers_make(heads, patch):
    """A patch's token by hand, torch's encoder layer for each block; every weight is moved from its start."""
    net = build_model(f"vit:depth=2,heads={heads},patch={patch}", 48, seed=0).double()
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=drawn))
    x = images(2, 3, 32, 32)
    stem, *blocks = net.blocks
    convolution, across = stem.patches[1], 32 // patch
    tokens = stem(x)
    for row, column in ((0, 0), (1, 0), (across - 1, across - 1)):
        place = across * row + column
        pixels = x[:, :, patch * row : patch * (row + 1), patch * column : patch * (column + 1)].flatten(1)
        expected = pixels @ convolution.weight.flatten(1).T + convolution.bias + stem.places[place]
        torch.testing.assert_close(tokens[:, place], expected)
    for block in blocks:
        tokens = theirs(block)(tokens)
    torch.testing.assert_close(net(x), tokens.mean(1), rtol=1e-9, atol=1e-11)


def test_its_gradients_are_right():
    net = build_model("vit:depth=2,heads=2,side=8", 8, seed=0).double()
    names, parameters = zip(*net.named_parameters(), strict=True)

    def of(x, *parameters):
        return functional_call(net, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(of, (images(2, 3, 8, 8).requires_grad_(), *parameters), fast_mode=True)


def test_any_block_may_be_left_out_and_features_taken_after_any():
    net = build_model("vit:depth=3,patch=8", 32, seed=0)
    stem, *blocks = net.blocks
    x = stem(torch.rand(2, 3, 32, 32))
    assert x.shape == (2, 16, 32)
    for block in blocks:
        assert net.pool(x).shape == (2, 32) and block(x).shape == x.shape


def test_grey_images_are_taken_as_they_are_in_colour():
    net, x = build_model("vit:depth=1,side=28", 32, seed=0), torch.rand(2, 1, 28, 28)
    assert torch.equal(net(x), net(x.expand(-1, 3, -1, -1)))


def test_the_papers_size():
    """ViT-Ti/16: 12 blocks of 12 d^2 + 13 d numbers, 5.5 million; of 32 pixels there are 4 tokens."""
    net = build_model("vit:depth=12,heads=3,patch=16", 192, seed=0)
    assert net.blocks.block1.heads == 3 and len(net.blocks) == 13
    count = sum(p.numel() for p in net.parameters())
    assert count == (3 * 16 * 16 * 192 + 192 + 4 * 192) + 12 * (12 * 192**2 + 13 * 192) == 5_486_784


def test_heads_are_of_32_numbers_unless_said():
    assert [vision_transformer(dim, depth=1).blocks.block1.heads for dim in (16, 96, 192)] == [1, 3, 6]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5}, "expected heads that divide embedding_dim 192, got 5"),
        ({"patch": 5}, "expected a patch that divides side 32, got 5"),
        *[
            ({name: 0}, f"expected {name} of at least 1, got 0")
            for name in ("depth", "heads", "patch", "side")
        ],
        ({"embedding_dim": 0}, "expected embedding_dim of at least 1, got 0"),
    ],
)
def test_others_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"model: vit: {message}"):
        vision_transformer(**settings)


def test_images_of_another_side_are_refused():
    with pytest.raises(ValueError, match="expected images of 32x32 pixels, its setting side, got 28x32"):
        vision_transformer(32, depth=1)(torch.rand(1, 3, 28, 32))
