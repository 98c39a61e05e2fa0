"""A net of two blocks for tests of split learning, and plain central MoCo, written without any of it."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from fedss_kernels.federated.split_learning.client_halves import ClientHalves, unchanged
from fedss_kernels.federated.split_learning.half import Half, cut
from fedss_kernels.federated.split_learning.joint import Joint
from fedss_kernels.federated.split_learning.key_queue import KeyQueue
from fedss_kernels.federated.split_learning.server_half import ServerHalf

SIDE, KEY_DIM, QUEUE, LR = 5, 3, 10, 0.2


class Net(nn.Module):
    """Images (B, 2, 5, 5) to (B, 4)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.GroupNorm(2, 4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2), nn.GroupNorm(1, 4), nn.Tanh())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    @property
    def blocks(self):
        return nn.Sequential(self.stem, self.block)

    def forward(self, images):
        return self.pool(self.blocks(images))


def net():
    torch.manual_seed(3)
    return Net().double()


def head():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, KEY_DIM)).double()


def noise(M=QUEUE, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(M, KEY_DIM, generator=generator, dtype=torch.float64), dim=1)


def views(step, B=12):
    """Two views of a batch."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(2, B, 2, SIDE, SIDE, generator=generator, dtype=torch.float64)


def joint(rules, after=1, queues=None, whole=None, travels=unchanged):
    first, rest = cut(whole or net(), after, head())
    queues = queues or [KeyQueue(noise())]
    return Joint(ClientHalves(Half(first), rules, travels), ServerHalf(Half(rest), queues, rules))


def play(made, steps, K, lr=LR, *, period=1, first=0, images=None):
    """So many steps of K clients; returns their losses."""
    losses = []
    made.clients.receive(range(K))
    for step in range(first, first + steps):
        x = views(step).unflatten(1, (K, -1))
        losses.append(made.step(x[0], x[1], lr))
        if (step + 1) % period == 0 and not made.clients.rules.frozen:
            made.synchronise(images or dict.fromkeys(range(K), 1))
    made.clients.dismiss()
    return losses


class CentralMoco:
    """One net, its momentum copy and a queue, by torch's own optimiser and cross-entropy.

    `symmetric` "server" needs the place of the cut, as the second query is of the copy's first half.
    """

    def __init__(self, rules, after=1, M=QUEUE):
        self.rules, self.after, whole = rules, after, nn.Module()
        whole.net, whole.head = net(), head()
        self.online, self.copy, self.queue = whole, copy.deepcopy(whole), noise(M)
        self.losses = []
        self.optimiser = torch.optim.SGD(
            whole.parameters(), lr=LR, momentum=rules.momentum, weight_decay=rules.weight_decay
        )

    def encode(self, first, rest, x):
        blocks = list(first.net.blocks)[: self.after] + list(rest.net.blocks)[self.after :]
        return F.normalize(rest.head(rest.net.pool(nn.Sequential(*blocks)(x))), dim=1)

    def term(self, q, k):
        own = (q * k).sum(1, keepdim=True)
        logits = torch.cat([own, q @ self.queue.T], dim=1) / self.rules.temperature
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))

    def step(self, x1, x2):
        with torch.no_grad():
            for slow, fast in zip(self.copy.parameters(), self.online.parameters(), strict=True):
                slow.copy_(self.rules.ema * slow + (1 - self.rules.ema) * fast)
            k2 = self.encode(self.copy, self.copy, x2)
            first = self.copy if self.rules.symmetric == "full" else self.online
            k1 = self.encode(first, self.copy, x1)
        loss = self.term(self.encode(self.online, self.online, x1), k2)
        keys = [k2]
        if self.rules.symmetric != "none":
            copied = self.copy if self.rules.symmetric == "server" else self.online
            with torch.set_grad_enabled(self.rules.symmetric == "full"):
                latents = list(copied.net.blocks)[: self.after]
                latents = nn.Sequential(*latents)(x2)
            rest = nn.Sequential(*list(self.online.net.blocks)[self.after :], self.online.net.pool)
            loss = loss + self.term(F.normalize(self.online.head(rest(latents)), dim=1), k1)
            keys = [k1, k2]
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.queue = torch.cat([self.queue, *keys])[-len(self.queue) :]  # the oldest first
        self.losses.append(loss.item())

    def play(self, steps):
        for step in range(steps):
            self.step(*views(step))
        return self

    def flat(self, which):
        """(the clients' part, the server's part) of the parameters."""
        whole = self.copy if which == "copy" else self.online
        values = [
            (p if which != "velocity" else self.optimiser.state[p]["momentum_buffer"])
            for p in whole.parameters()
        ]
        flat = torch.cat([v.detach().flatten() for v in values])
        P = sum(p.numel() for block in list(whole.net.blocks)[: self.after] for p in block.parameters())
        return flat[:P], flat[P:]
