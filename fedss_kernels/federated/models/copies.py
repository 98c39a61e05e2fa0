"""A copy of a net, which may be somebody's own."""

import copy

import torch
from torch import nn


def check_is_net(net: object) -> None:
    """Raises TypeError for what is no module."""
    if not isinstance(net, nn.Module):
        got = f"the class {net.__name__}" if isinstance(net, type) else f"a {type(net).__name__}"
        raise TypeError(f"model: expected a torch.nn.Module, got {got}")


def copied(net: nn.Module) -> nn.Module:
    """On parameters of its own, which are leaves and require grad where the net's do.

    Where gradients are enabled those of a copied ScriptModule are clones in a graph, which nobody can train,
    and where they are not they require none. Raises TypeError as check_is_net, ValueError for a net that
    cannot be copied.
    """
    check_is_net(net)
    try:
        with torch.no_grad():
            made = copy.deepcopy(net)
        for own, other in zip(made.parameters(), net.parameters(), strict=True):
            if own.requires_grad != other.requires_grad:  # of others nothing is set: a lazy one takes nothing
                own.requires_grad_(other.requires_grad)
    except Exception as error:  # a module of one's own may raise anything
        kind = type(error).__name__
        raise ValueError(f"model: expected a net that copy.deepcopy copies, got {kind}: {error}") from error
    return made


def trainable(net: nn.Module) -> nn.Module:
    """A copy of which every parameter is trained, frozen ones too."""
    made = copied(net)
    for p in made.parameters():  # the module's own requires_grad_ is not for a ScriptModule
        p.requires_grad_(True)
    return made
