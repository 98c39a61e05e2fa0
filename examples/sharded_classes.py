"""Training with the class matrix over two processes.

    torchrun --nproc-per-node 2 examples/sharded_classes.py

Glyphs, drawn on the spot: 540 characters. Each process has a part of every batch and a block of the class
rows; the net is under DistributedDataParallel, the criterion beside it. Without torchrun it is one process.
Under a minute; in one process as in two 0.73 of the test images get the right character of the 540.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fedss_kernels import RowAdam, ShardedSampledSoftmaxLoss
from fedss_kernels.federated.data.glyphs import load_glyphs
from fedss_kernels.federated.models import build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=128, help="rows of all processes together")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if "RANK" in os.environ:  # by torchrun
        dist.init_process_group("gloo")
    learn(given.steps, given.batch)
    if dist.is_initialized():
        # DistributedDataParallel keeps the group's threads: let them finish before the interpreter goes. It
        # has gone itself: its destructor may wait for a thread that waits for the interpreter.
        dist.barrier()
        dist.destroy_process_group()


def learn(steps: int, batch: int) -> None:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    data = load_glyphs(seed=0)
    net = build_model("conv4", 64, seed=0)
    if world > 1:
        net = DistributedDataParallel(net)
    torch.manual_seed(0)
    criterion = ShardedSampledSoftmaxLoss(data.num_classes, 64, num_sampled=200, sparse_grad=True)
    optimizer = RowAdam([*net.parameters(), *criterion.parameters()], lr=0.003)
    batches = torch.Generator().manual_seed(1)  # the same on all ranks: each takes its part
    for step in range(steps):
        rows = torch.randint(len(data.images), (batch,), generator=batches)[rank::world]
        loss = criterion(net(data.images[rows] / 255.0), data.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)

    mine = slice(rank, None, world)
    with torch.no_grad():
        best = criterion.topk(net(data.test_images[mine] / 255.0), 1).indices[:, 0]
    right = (best == data.test_labels[mine]).sum()
    if world > 1:
        dist.all_reduce(right)
    if rank == 0:
        print(f"top-1 over {data.num_classes} classes: {right.item() / len(data.test_labels):.3f}")


if __name__ == "__main__":
    main()
