"""Benchmarks of dwconv on this machine's GPU.

python benchmarks/run.py layers --quick                   every layer of layers.csv, against PyTorch and a copy
python benchmarks/run.py layers --layers seed cnx-56 --dtype bfloat16 --pass forward
python benchmarks/run.py layers --output results.json     JSON, and Markdown beside it
python benchmarks/run.py layers --quick --alone           the same in seconds, without PyTorch
python benchmarks/run.py models --output models.json      whole models before and after dwconv.convert
python benchmarks/run.py sweep --output sweep.json        kernels from 3x3 to 63x63: is there a cliff?
python benchmarks/run.py shapes --count 500 --seed 1       problems drawn at random: is PyTorch faster anywhere?
python benchmarks/run.py conditions --quick               misaligned tensors, odd widths, the way of older GPUs
python benchmarks/run.py overhead                         the host's part of a call
python benchmarks/run.py limiters results.json            what ncu says about the cells that miss their targets
python benchmarks/run.py compare before.json after.json   what got slower
python benchmarks/run.py plot results.json --models models.json --sweep sweep.json
python benchmarks/run.py readme results.json              the table in README.md
"""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "layers": ("layers", "single layers against PyTorch and a copy of the same bytes"),
    "models": ("models", "whole models before and after dwconv.convert"),
    "sweep": ("sweep", "kernels from 3x3 to 63x63 against PyTorch: is there a cliff?"),
    "shapes": ("shapes", "problems drawn at random against PyTorch: is it faster anywhere?"),
    "conditions": ("conditions", "layers on misaligned tensors, narrower images, and as older GPUs run them"),
    "overhead": ("overhead", "host time per call against F.conv2d"),
    "limiters": ("limiters", "what the cells that miss their targets are limited by, by ncu"),
    "compare": ("compare", "two results of layers: what got slower"),
    "plot": ("plots", "pictures of the results"),
    "readme": ("readme", "the table of results in README.md"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module_name, help) in COMMANDS.items():
        command = commands.add_parser(name, help=help)
        if name == next(iter(sys.argv[1:]), None):  # only that one is imported: not every command needs torch
            module = importlib.import_module(module_name)
            command.description = module.__doc__
            command.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(command)
            command.set_defaults(run=module.main)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
