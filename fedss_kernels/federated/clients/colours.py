"""Changes to the colours of whole batches of images, floats in [0, 1], in place.

Each image by numbers of its own. The same as torchvision's functions of one image and one number.
"""

import numpy as np
import torch
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)  # of red, green and blue in grey
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def jitter(
    images: Tensor,  # (B, 1 or 3, H, W)
    factors: np.ndarray,  # (B, 3): of brightness, contrast and saturation; 1 changes nothing
    turns: np.ndarray,  # (B,): of the hue, as a share of the circle; 0 changes nothing
    orders: np.ndarray,  # (B, 3 or 4): these, or the first three, as an image undergoes them
) -> None:
    """Brightness, contrast and saturation, x <- f x + (1 - f) y in [0, 1], and hue, in any order.

    y is black, or the mean of the image's grey, or each pixel's grey. One channel has no saturation or hue.
    """
    coloured = images.shape[1] == 3
    if not coloured:
        orders = orders[orders < SATURATION].reshape(-1, 2)
    amounts = np.concatenate([factors, np.ones((len(factors), 1))], 1)  # the hue is none of them
    numbers = [np.take_along_axis(amounts, orders, 1), orders == SATURATION, orders == CONTRAST]
    steps = torch.from_numpy(np.stack(numbers, 1)).to(images)[..., None, None, None].unbind(2)
    for step, op in zip(steps, orders.T, strict=True):
        if coloured:
            turn_hue(images, np.flatnonzero((op == HUE) & (turns != 0)), turns)
        f, of_grey, of_mean = step.unbind(1)
        grey = _grey(images)
        towards = of_mean * grey.mean(-1, keepdim=True).mean(-2, keepdim=True)  # of one too, without threads
        if coloured:  # else the grey is the image
            towards = grey.mul_(of_grey).add_(towards)
        torch.lerp(towards, images, f, out=images).clamp_(0, 1)


def turn_hue(
    images: Tensor,  # (B, 3, H, W)
    which: np.ndarray,  # (n,) the images that are turned
    turns: np.ndarray,  # (B,) in [-.5, .5]
) -> None:
    """Hue of HSV: the largest and the smallest of a pixel's three stay, and which is which goes round.

    With the hue as h in [0, 6), 0 red, 2 green, 4 blue, a channel is the largest within 1 of its own h, and
    falls to the smallest from there to a distance of 2.
    """
    if not len(which):
        return
    index = torch.from_numpy(which).to(images.device)
    chosen = images[index]
    r, g, b = chosen.unbind(1)
    top, bottom = chosen.amax(1), chosen.amin(1)
    spread = top - bottom
    near_green, near_blue = (b - r).add_(spread, alpha=2), (r - g).add_(spread, alpha=4)
    h = torch.where(top == r, g - b, torch.where(top == g, near_green, near_blue))
    h.div_(spread.clamp(min=torch.finfo(h.dtype).tiny))
    h.add_(torch.from_numpy(6 * turns[which]).to(h)[:, None, None])
    h.sub_((h / 6).floor_(), alpha=6)
    # red is at 0 and at 6, so its distance is from 3, counted the other way
    distance = h[:, None] - h.new_tensor([3, 2, 4]).view(3, 1, 1)
    share = distance.abs_().mul_(h.new_tensor([1, -1, -1]).view(3, 1, 1))
    share.add_(h.new_tensor([-1, 2, 2]).view(3, 1, 1)).clamp_(0, 1)
    images[index] = share.mul_(spread[:, None]).add_(bottom[:, None])


def in_grey(images: Tensor, which: np.ndarray) -> None:
    """These images without their colours."""
    if images.shape[1] == 1:
        return
    index = torch.from_numpy(which).to(images.device)
    images.index_copy_(0, index, _grey(images.index_select(0, index)).expand(-1, 3, -1, -1))


def _grey(images: Tensor) -> Tensor:  # (B, 1, H, W)
    if images.shape[1] == 1:
        return images
    r, g, b = images.split(1, dim=1)
    red, green, blue = LUMA
    return (red * r).add_(g, alpha=green).add_(b, alpha=blue)
