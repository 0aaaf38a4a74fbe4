"""Trains a small network on scikit-learn's handwritten digits on any number of processes, with DistributedDataParallel.

    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py

One process for each GPU (NCCL), or where there are fewer GPUs than processes on a machine, all on the CPU (gloo). Every
batch of 64 is divided among the processes, so that the losses are those of a single process, to rounding. Exits with 1
where the accuracy on the test images is below --accuracy.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dwconv import DepthwiseConv2d

BATCH = 64


def network() -> nn.Sequential:
    """(N, 1, 8, 8) -> (N, 10). It normalises each image by itself: what the others are must not matter."""

    def block(channels: int, filters: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(
            DepthwiseConv2d(channels, 3, stride, padding=1),
            nn.GroupNorm(1, channels),
            nn.SiLU(),
            nn.Conv2d(channels, filters, 1),
            nn.SiLU(),
        )

    stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.SiLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return nn.Sequential(stem, block(32, 64), block(64, 128, stride=2), block(128, 128), head)


def digits(device: torch.device) -> list[Tensor]:
    """Images to learn from and to test with, (N, 1, 8, 8) in [-1, 1], and their labels in the same order."""
    data = load_digits()
    images, labels = torch.from_numpy(data.images).float()[:, None] / 8 - 1, torch.from_numpy(data.target).long()
    split = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    return [part.to(device) for part in split]


def train(device: torch.device, epochs: int) -> float:
    """Returns the share of test images that the trained network names right."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    learn, test, learn_labels, test_labels = digits(device)
    torch.manual_seed(0)  # the same order of images in every process
    model = DistributedDataParallel(network().to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for epoch in range(epochs):
        total = torch.zeros((), device=device)
        batches = torch.randperm(len(learn)).split(BATCH)
        for batch in batches:
            mine = batch[rank::processes].to(device)
            # DDP takes the mean over the processes; of the batch it is a mean over all its images.
            loss = F.cross_entropy(model(learn[mine]), learn_labels[mine], reduction="sum") * processes / len(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() / processes
        dist.all_reduce(total)
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {total.item() / len(batches):.4f}", flush=True)
    with torch.no_grad():
        right = (model.module(test[rank::processes]).argmax(1) == test_labels[rank::processes]).sum()
    dist.all_reduce(right)
    return right.item() / len(test)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--accuracy", type=float, default=0.95, help="least share of test images (default 0.95)")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where each process has a GPU, or cpu")
    options = parser.parse_args()

    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        os.environ.setdefault(name, str(value))  # torchrun sets them; without it there is one process, at any free port
    local_rank, local_processes = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_cuda = (options.device or "cuda") == "cuda" and torch.cuda.device_count() >= local_processes
    if options.device == "cuda" and not on_cuda:
        parser.error(f"{local_processes} processes need as many GPUs")
    device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        accuracy = train(device, options.epochs)
        if dist.get_rank() == 0:
            print(f"{dist.get_world_size()} processes on {device.type}: test accuracy {accuracy:.4f}")
    finally:
        dist.destroy_process_group()
    if accuracy < options.accuracy:
        print(f"FAILED: the accuracy is below {options.accuracy}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Not sys.exit: gloo's threads outlive their group, and one that then releases a tensor aborts the process.
    os._exit(status)
