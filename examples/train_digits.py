"""Trains a small depthwise-separable network on scikit-learn's handwritten digits, with DepthwiseConv2d and, from the
same seed, with nn.Conv2d in its place; draws both losses and the learned filters.

    python examples/train_digits.py

Exits with 1 where the losses of the two differ by more than rounding or a test accuracy is below --accuracy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from dwconv import DepthwiseConv2d

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH = 64

# Training enlarges what two runs round differently: to some 1e-5 of the loss with this network.
RELATIVE, ABSOLUTE = 1e-3, 1e-5

# A depthwise 3x3 layer: channels, stride -> module
Depthwise = Callable[[int, int], nn.Conv2d]


def dwconv_layer(channels: int, stride: int) -> nn.Conv2d:
    return DepthwiseConv2d(channels, 3, stride, padding=1)


def torch_layer(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


def network(depthwise: Depthwise) -> nn.Sequential:
    """(N, 1, 8, 8) -> (N, 10). Each block is a depthwise and a pointwise convolution, both normalised.

    SiLU, since it is smooth: a ReLU turns a difference of rounding into a jump wherever it changes a sign, and after
    some epochs no two runs would have the same losses.
    """

    def block(channels: int, filters: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(
            depthwise(channels, stride),
            nn.BatchNorm2d(channels),
            nn.SiLU(),
            nn.Conv2d(channels, filters, 1, bias=False),
            nn.BatchNorm2d(filters),
            nn.SiLU(),
        )

    stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.SiLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return nn.Sequential(stem, block(32, 64), block(64, 128, stride=2), block(128, 128), head)


class Digits(NamedTuple):
    images: Tensor  # (N, 1, 8, 8), in [-1, 1]
    labels: Tensor  # (N,)


def digits(device: torch.device) -> tuple[Digits, Digits]:
    """1347 images to learn from and 450 to test with."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(data.target).long()
    split = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = (part.to(device) for part in split)
    return Digits(train_images, train_labels), Digits(test_images, test_labels)


class Run(NamedTuple):
    model: nn.Sequential
    losses: list[float]  # of each step
    accuracy: float  # on the test images


def train(depthwise: Depthwise, data: tuple[Digits, Digits], epochs: int, seed: int, name: str) -> Run:
    """The seed sets the initial weights and the order of the images."""
    learn, test = data
    device = learn.images.device
    torch.manual_seed(seed)
    model = network(depthwise).to(device)
    steps = epochs * (len(learn.labels) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)

    losses: list[Tensor] = []
    with tqdm(total=steps, desc=f"{name:>15}", unit="step", dynamic_ncols=True) as progress:
        for _ in range(epochs):
            order = torch.randperm(len(learn.labels)).to(device)
            for batch in order.split(BATCH)[: steps // epochs]:
                loss = F.cross_entropy(model(learn.images[batch]), learn.labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
                progress.update()
            progress.set_postfix(loss=f"{losses[-1].item():.4f}")

    with torch.no_grad():
        right = model.eval()(test.images).argmax(1) == test.labels
    return Run(model, torch.stack(losses).tolist(), right.float().mean().item())


def largest_excess(losses: list[float], expected: list[float]) -> float:
    """The largest difference of two losses of a step, in units of what rounding may do; above 1 it is not rounding."""
    return max(abs(a - b) / (ABSOLUTE + RELATIVE * abs(b)) for a, b in zip(losses, expected, strict=True))


def draw(ours: Run, theirs: Run, path: str) -> None:
    """Losses and their difference on the left, the first depthwise layer's filters on the right."""
    steps = range(1, len(ours.losses) + 1)
    difference = [abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses)]
    filters = ours.model[1][0].weight.detach().cpu()[:, 0]
    columns = 8
    rows = -(-len(filters) // columns)

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.2], wspace=0.03)

    loss, gap = left.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    loss.plot(steps, theirs.losses, color="#f4a259", linewidth=4, label=f"nn.Conv2d: {theirs.accuracy:.1%} right")
    loss.plot(steps, ours.losses, color="#1d3557", linewidth=1.2, label=f"DepthwiseConv2d: {ours.accuracy:.1%} right")
    loss.set(yscale="log", ylabel="cross-entropy", title="Training loss, and accuracy on the test images")
    loss.legend(frameon=False)
    loss.grid(alpha=0.25)
    if any(difference):
        gap.semilogy(steps, [d or float("nan") for d in difference], ".", color="#1d3557", markersize=3)
    else:
        gap.text(0.5, 0.5, "identical, bit for bit", ha="center", va="center", transform=gap.transAxes, color="#555555")
        gap.set_yticks([])
    gap.set(xlabel="step", ylabel="relative\ndifference", xlim=(0, len(ours.losses) + 1))

    cells = right.subplots(rows, columns, squeeze=False)
    limit = filters.abs().max().item()
    for cell, values in zip(cells.flat, filters):
        image = cell.imshow(values.tolist(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    for cell in cells.flat:
        cell.set(xticks=[], yticks=[])
        cell.spines[:].set_visible(False)
    right.suptitle(f"The {len(filters)} filters that the first depthwise layer learned", fontsize="large")
    right.colorbar(image, ax=cells, orientation="horizontal", shrink=0.5, aspect=40, label="weight")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--accuracy", type=float, default=0.97, help="least share of test images (default 0.97)")
    parser.add_argument("--output", default="digits.png", help="the figure (default digits.png)")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs must be at least 1, but got {options.epochs}")

    data = digits(options.device)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):  # both in full float32
        ours = train(dwconv_layer, data, options.epochs, options.seed, "DepthwiseConv2d")
        theirs = train(torch_layer, data, options.epochs, options.seed, "nn.Conv2d")
    draw(ours, theirs, options.output)

    excess = largest_excess(ours.losses, theirs.losses)
    difference = max(abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses))
    print(f"Test accuracy: DepthwiseConv2d {ours.accuracy:.4f}, nn.Conv2d {theirs.accuracy:.4f}.")
    print(f"Largest relative difference of the losses of a step: {difference:.1e}.\nFigure: {options.output}")
    failures = []
    if not excess <= 1:
        failures.append("the losses differ by more than rounding")
    if not min(ours.accuracy, theirs.accuracy) >= options.accuracy:
        failures.append(f"an accuracy is below {options.accuracy}")
    for failure in failures:
        print(f"FAILED: {failure}.", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
