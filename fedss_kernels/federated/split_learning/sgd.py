"""One step of SGD with weight decay, of a vector or of rows of them."""

from torch import Tensor


def sgd_step(
    numbers: Tensor, gradient: Tensor, velocity: Tensor, lr: float, momentum: float, weight_decay: float
) -> None:
    """v <- momentum * v + g + weight_decay * theta, theta <- theta - lr * v, in place, as torch.optim.SGD."""
    velocity.mul_(momentum).add_(gradient).add_(numbers, alpha=weight_decay)
    numbers.add_(velocity, alpha=-lr)
