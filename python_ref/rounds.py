"""One federated round: Algorithm 1 of the FedSS paper, the sign of line 11 and index of line 13 mended."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .sampled_softmax import sampled_softmax_loss

Parameters = dict[str, Tensor]


@dataclass
class ClientRound:
    """What one client brings to one round."""

    images: Tensor  # (n, channels, H, W) floating
    labels: Tensor  # (n,) int64 in [0, C)
    batches: list[Tensor]  # rows of `images`, one tensor for each local step
    class_ids: Tensor  # (S,) int64, ascending: the rows of W the client asks for
    denominator: Tensor | None = None  # positions in class_ids of the loss' class set; None: all of them
    log_expected_count: Tensor | None = None  # one for each member of the denominator


def local_sgd(
    model: nn.Module, phi: Parameters, rows: Tensor, client: ClientRound, lr: float, scale: float
) -> tuple[Parameters, Tensor]:
    """theta_k: plain SGD, one step for each batch, on the loss over the client's rows of W."""
    target = torch.searchsorted(client.class_ids, client.labels)
    for batch in client.batches:
        phi = {name: value.detach().requires_grad_() for name, value in phi.items()}
        rows = rows.detach().requires_grad_()
        loss = sampled_softmax_loss(
            functional_call(model, phi, (client.images[batch],)),
            rows,
            target[batch],
            client.denominator,
            client.log_expected_count,
            scale=scale,
        )
        gradients = torch.autograd.grad(loss, [*phi.values(), rows])
        phi = {name: value - lr * g for (name, value), g in zip(phi.items(), gradients, strict=False)}
        rows = rows - lr * gradients[-1]
    return {name: value.detach() for name, value in phi.items()}, rows.detach()


def federated_round(
    model: nn.Module,
    phi: Parameters,
    weight: Tensor,  # (C, D)
    velocity: tuple[Parameters, Tensor],
    clients: list[ClientRound],
    *,
    lr: float,
    scale: float = 20.0,
    server_lr: float = 1.0,
    server_momentum: float = 0.9,
    denominator: str = "cohort",
) -> tuple[Parameters, Tensor, tuple[Parameters, Tensor]]:
    """(phi, W, velocity) after one round.

        Delta_k = theta_t - theta_k;  g_t = sum_k (n_k / n) Delta_k;  v <- beta v + g_t;  theta_{t+1} =
        theta_t - alpha v

    with n = sum n_k over the cohort, or for a class row over the clients that held it
    (`denominator="holders"`).
    """
    n = sum(len(client.labels) for client in clients)
    holders = torch.zeros(len(weight), dtype=weight.dtype)
    for client in clients:
        holders[client.class_ids] += len(client.labels)
    g_phi = {name: torch.zeros_like(value) for name, value in phi.items()}
    g_weight = torch.zeros_like(weight)
    for client in clients:
        n_k = len(client.labels)
        phi_k, rows_k = local_sgd(model, phi, weight[client.class_ids], client, lr, scale)
        for name in phi:
            g_phi[name] += n_k / n * (phi[name] - phi_k[name])
        share = n_k / n if denominator == "cohort" else (n_k / holders[client.class_ids])[:, None]
        g_weight[client.class_ids] += share * (weight[client.class_ids] - rows_k)

    v_phi = {name: server_momentum * velocity[0][name] + g_phi[name] for name in phi}
    v_weight = server_momentum * velocity[1] + g_weight
    phi = {name: phi[name] - server_lr * v_phi[name] for name in phi}
    return phi, weight - server_lr * v_weight, (v_phi, v_weight)
