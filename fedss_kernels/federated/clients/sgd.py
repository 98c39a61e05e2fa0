"""One step of a client's optimiser, and of a split net's."""

from torch import Tensor


def sgd_step(
    numbers: Tensor,
    gradient: Tensor,  # with weight decay and no velocity it is added to
    lr: float,
    momentum: float,
    velocity: Tensor | None,
    weight_decay: float = 0.0,
) -> None:
    """v <- momentum * v + g + weight_decay * theta, theta <- theta - lr * v, in place, as torch.optim.SGD.

    Without a velocity momentum is 0.
    """
    if velocity is not None:
        gradient = velocity.mul_(momentum).add_(gradient)
    if weight_decay:
        gradient.add_(numbers, alpha=weight_decay)
    numbers.add_(gradient, alpha=-lr)
