"""What torch.distributed does to a class matrix: its sparse gradients under DDP, its shards under FSDP.

DistributedDataParallel asks a parameter's module, not its gradient, whether the gradient is sparse: by
whether it is an nn.Embedding. `SparseRows` is one, for it alone. Where sparse gradients cannot be added up at
all, that is said in the forward pass; the backward pass would end in an error of torch's that names no cause
and no way.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.parallel import DistributedDataParallel

from .sparse_rows import makers


class SparseRows(nn.Embedding):
    """Parameters with sparse gradients, in a module that torch takes for a sparse embedding.

    In training mode if `training`, as the module whose parameters they are.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], training: bool) -> None:
        weight = parameters.get("weight")
        C, D = (1, 1) if weight is None or weight.dim() != 2 else weight.shape  # FSDP may hold it flat
        super().__init__(C, D, sparse=True, _weight=torch.empty(C, D, device="meta"))  # none is drawn
        self.training = training
        del self.weight
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {tuple(p.shape)}" for name, p in self.named_parameters())


def asked_by_ddp() -> bool:
    """Whether DistributedDataParallel goes over the modules, or somebody in its forward pass.

    Others, as who sorts the parameters of all modules into an optimiser's groups, would meet these twice.
    """
    frame = None if torch.compiler.is_compiling() else sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != DistributedDataParallel.__module__:
        frame = frame.f_back
    return frame is not None


# ---- FSDP --------------------------------------------------------------------------------------------------


def check_whole(weight: Tensor) -> None:
    """Raises RuntimeError for a class matrix that FSDP holds in shards at the moment.

    FSDP2's is a DTensor then; FSDP1's a part of its flat parameter, or a view of memory that it has freed.
    """
    has_memory = weight.layout == torch.strided and not is_functorch_wrapped_tensor(weight)
    freed = has_memory and weight.numel() > 0 and weight.untyped_storage().size() == 0
    if hasattr(weight, "full_tensor") or freed or weight.dim() == 1:
        raise RuntimeError(
            f"weight: expected all of a (C, D) matrix, got a {type(weight).__name__} {tuple(weight.shape)}"
            f"{' without memory' if freed else ''}; if FSDP holds it: it gathers its shards for forward "
            "alone. For topk call fully_shard(criterion) and "
            'torch.distributed.fsdp.register_fsdp_forward_method(criterion, "topk"), or model.unshard() each '
            "time (with FullyShardedDataParallel: summon_full_params)"
        )


def is_held_by_fsdp(parameter: Tensor) -> bool:
    """Whether FSDP adds up its gradients: in shards, gathered, or a view of a flat parameter."""
    return hasattr(parameter, "full_tensor") or not parameter.is_leaf or _gathered_by_fully_shard(parameter)


def _gathered_by_fully_shard(parameter: Tensor) -> bool:
    composable = sys.modules.get("torch.distributed._composable_state")
    if composable is None:  # nobody has called fully_shard
        return False
    states = [reference() for reference in list(composable._module_state_mapping.values())]
    groups = [group for state in states for group in getattr(state, "_fsdp_param_groups", ())]
    return any(
        getattr(p, "_unsharded_param", None) is parameter for group in groups for p in group.fsdp_params
    )


def check_left_alone(criterion: nn.Module, *parameters: Tensor | None) -> None:
    """Raises RuntimeError where DDP or FSDP holds parameters that every process has its own of."""
    ddp = DistributedDataParallel._active_ddp_module
    for parameter in parameters:
        if parameter is None:
            continue
        held = hasattr(parameter, "full_tensor") or (
            vars(criterion).get("_is_fsdp_managed_module") and _gathered_by_fully_shard(parameter)
        )
        if held or (ddp is not None and _manages(ddp, parameter)):
            raise RuntimeError(
                "weight: expected a block of class rows that is this process' own, got one that "
                f"{'FSDP' if held else 'DistributedDataParallel'} takes for a copy of the others'; wrap the "
                "net alone, and call the criterion beside it"
            )


# ---- sparse gradients --------------------------------------------------------------------------------------

_INSTEAD = (
    "take sparse_grad=False, or leave the class matrix out (DistributedDataParallel's "
    "_set_params_and_buffers_to_ignore_for_model, fully_shard's ignored_params) and add up its rows yourself"
)

# Of torch's communication hooks those whose compression fails, or hangs, at a sparse gradient.
_OF_DENSE = ("fp16_compress", "quantization", "powerSGD", "batched_powerSGD")


def check_sparse_communication(*parameters: Tensor | None) -> None:
    """Raises RuntimeError where sparse gradients, of `parameters`, would have to be dense ones.

    That is so for FSDP, for replicate, and for DistributedDataParallel over NCCL, with a hook that
    compresses, in join(), or where the module that it asks about a parameter has no sparse gradients.
    """
    if not torch.is_grad_enabled():
        return
    for parameter in parameters:
        if isinstance(parameter, Tensor) and parameter.requires_grad:
            _check_sparse_communication(parameter)


def _check_sparse_communication(parameter: Tensor) -> None:
    if parameter.grad_fn is not None and parameter._is_view():
        raise RuntimeError(
            "sparse_grad: expected False for a weight or bias that is a view of a tensor, as under FSDP: "
            f"autograd has no views of sparse gradients; {_INSTEAD}"
        )
    if _gathered_by_fully_shard(parameter):
        raise RuntimeError(
            f"sparse_grad: expected False under fully_shard, which adds up dense gradients only; {_INSTEAD}"
        )
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is None:
        return
    for leaf in _leaves(parameter):
        if _manages(ddp, leaf) and (why := _why_dense(ddp, leaf)):
            raise RuntimeError(f"sparse_grad: expected False under {why}, {_INSTEAD}")


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    """What it is computed of; itself where it is not computed."""
    if tensor.grad_fn is None:
        yield tensor
    for maker in makers(tensor, lambda maker: [before for before, _ in maker.next_functions]):
        if hasattr(maker, "variable"):
            yield maker.variable


def _why_dense(ddp: DistributedDataParallel, parameter: Tensor) -> str:
    """What of it adds up dense gradients only, and what to take for that; "" where it is nothing."""
    if _backend(ddp.process_group, parameter.device) == "nccl":
        return (
            "DistributedDataParallel over NCCL, which adds up dense gradients only; give it "
            'process_group=torch.distributed.new_group(backend="gloo")'
        )
    if isinstance(ddp.module, nn.ParameterList):  # replicate's: modules that are sparse embeddings are lost
        return (
            "replicate, which takes every gradient for dense; take DistributedDataParallel, give replicate "
            "the criterion among its ignored_modules"
        )
    names = [getattr(hook, "__name__", "") for hook, _ in ddp._comm_hooks]
    name = next((name for name in names if name.startswith(_OF_DENSE)), "")
    if name and dist.get_world_size(ddp.process_group) > 1:
        return f"DistributedDataParallel with {name}, which compresses dense gradients only; leave it out"
    if ddp._join_config.enable and not ddp._join_config.throw_on_early_termination:
        return (
            "DistributedDataParallel's join(), where a process without batches left sends dense gradients; "
            "leave join() out and give that process empty batches"
        )
    if parameter.dtype == torch.float16 and dist.get_world_size(ddp.process_group) > 1:
        return "DistributedDataParallel in float16, in which torch adds up dense gradients only"
    asked = _asked_by(ddp, parameter)
    if asked is not None and not getattr(asked, "sparse", False):
        return (
            "DistributedDataParallel, which takes this gradient for dense, as the first module that has the "
            f"parameter is {type(asked).__name__}; give the parameter itself to a SampledSoftmaxLoss, which "
            "is there before others that share it"
        )
    return ""


def _asked_by(ddp: DistributedDataParallel, parameter: Tensor) -> nn.Module | None:
    """The module by which DDP knows whether a parameter's gradient is sparse: the first that has it."""
    for module in ddp.module.modules():
        if any(own is parameter for own in module._parameters.values()):
            return module
    return None


def _backend(group: Any, device: torch.device) -> str | None:
    backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
    return backends.get(device.type)


def _manages(ddp: DistributedDataParallel, parameter: Tensor) -> bool:
    return any(managed is parameter for managed in ddp._module_parameters)
