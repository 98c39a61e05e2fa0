"""A clients' half that resists inversion: it is trained against an attacker before any client has it.

TAResSFL (Li et al., "MocoSFL", ICLR 2023, section 4, after ResSFL, arXiv:2205.04007):

    min over C and S  contrast(S(C(x))) + strength * max(0, max over G SSIM(G(C(x)), x) - allowed)

The server has both halves, as one client and a server by joint.py's rules, and a decoder G. A step is

    G:     one of Adam, to raise SSIM(G(h), x), x the view that was fed to C and h = C(x), a constant
    C, S:  one along contrast + strength * max(0, s - allowed), s = mean SSIM(G(h), x), G a constant

C's gradient goes back through h once: that of the contrast and that of s are added there. S has the former's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .inversion import ssim
from .joint import Joint

LR = 1e-3  # of G
FALLS, FALL = (0.3, 0.6, 0.8), 0.2  # when it falls, as shares of all steps, and to what share


@dataclass(frozen=True)
class Resistance:
    """Raises ValueError for numbers that cannot be."""

    strength: float = 2.0  # lambda
    allowed: float = 0.6  # SSIM up to which nothing is done

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"strength: expected a number of at least 0, got {self.strength!r}")
        if not -1 <= self.allowed <= 1:
            raise ValueError(f"allowed: expected an SSIM, from -1 to 1, got {self.allowed!r}")

    def against(
        self,
        attacker: nn.Module,
        latents: Tensor,  # (B, c, h, w)
        images: Tensor,  # (B, channels, H, W) in [0, 1]
    ) -> tuple[float, Tensor]:
        """(s, the penalty's gradient in the latents), by the attacker in eval mode."""
        attacker.eval()
        latents = latents.detach().requires_grad_()
        found = ssim(attacker(latents), images).mean()
        over = (found - self.allowed).clamp_min(0)
        (gradient,) = torch.autograd.grad(self.strength * over, latents)
        return found.item(), gradient


class Hardening:
    """Both halves, of which the clients' is one client's, and the attacker, over so many steps."""

    def __init__(self, joint: Joint, attacker: nn.Module, resistance: Resistance, steps: int):
        self.joint, self.resistance = joint, resistance
        self.attacker = attacker.to(joint.server.device)
        self.optimizer = torch.optim.Adam(attacker.parameters(), lr=LR)
        falls = [max(1, int(share * steps)) for share in FALLS]
        self.rate = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, falls, FALL)
        joint.clients.receive([0])

    def step(self, first: Tensor, second: Tensor, lr: float) -> tuple[float, float]:  # views, (B, ...)
        """(the contrastive loss before, s)"""
        clients, device = self.joint.clients, self.joint.server.device
        sent = clients.forward(first[None], second[None])
        fed = torch.cat([first, second][: len(sent.online)]).to(device)
        latents = sent.online.flatten(0, 2).to(device)
        self._attack(latents, fed)
        seen, pushed = self.resistance.against(self.attacker, latents, fed)
        loss, gradient = self.joint.server.step(sent, clients.clients, lr)
        clients.backward(gradient + pushed.to(gradient.device).view_as(gradient), lr)
        return loss, seen

    def _attack(self, latents: Tensor, images: Tensor) -> None:
        self.attacker.train()
        self.optimizer.zero_grad()
        (-ssim(self.attacker(latents), images).mean()).backward()
        self.optimizer.step()
        self.rate.step()

    def end(self) -> None:
        """What was trained is what clients are sent from now on."""
        self.joint.synchronise({0: 1})
        self.joint.clients.dismiss()
