"""DDP, FSDP2 and DTensor: what two processes compute together is what one computes of the whole batch.

The processes run this file itself, once for all checks, and report on each.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import dwconv

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = 2

CHECKS: list[Callable[[str, DeviceMesh], None]] = []


def check(function: Callable) -> Callable:
    CHECKS.append(function)
    return function


def network(device: str) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        dwconv.DepthwiseConv2d(8, 3, padding=1, bias=True),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=8),
        nn.GELU(),
        nn.Conv2d(8, 4, 1),
    )
    return dwconv.convert(model).to(device, torch.float64)


def batch(device: str) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(6, 3, 9, 8, dtype=torch.float64).to(device)


def gradients_of_one(model: nn.Module, input: Tensor) -> list[Tensor]:
    model = copy.deepcopy(model)
    model(input).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


@check
def ddp(device: str, mesh: DeviceMesh) -> None:
    model = network(device)
    expected = gradients_of_one(model, batch(device))
    parallel = DistributedDataParallel(model)
    parallel(batch(device).chunk(PROCESSES)[mesh.get_rank()]).square().mean().backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)


def shard(model: nn.Sequential, mesh: DeviceMesh, **policy) -> nn.Sequential:
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            fully_shard(layer, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


@check
def fsdp2(device: str, mesh: DeviceMesh) -> None:
    model = network(device)
    expected = gradients_of_one(model, batch(device))
    shard(model, mesh)
    assert isinstance(model[1], dwconv.DepthwiseConv2d) and isinstance(model[1].weight, DTensor)
    model(batch(device).chunk(PROCESSES)[mesh.get_rank()]).square().mean().backward()
    torch.testing.assert_close([parameter.grad.full_tensor() for parameter in model.parameters()], expected)


@check
def fsdp2_in_mixed_precision(device: str, mesh: DeviceMesh) -> None:
    model = network(device).float()
    expected = gradients_of_one(copy.deepcopy(model).bfloat16(), batch(device).bfloat16())
    shard(model, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    output = model(batch(device).float().chunk(PROCESSES)[mesh.get_rank()])
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    grads = [parameter.grad.full_tensor() for parameter in model.parameters()]
    assert all(grad.dtype == torch.float32 for grad in grads)
    torch.testing.assert_close(grads, [grad.float() for grad in expected], rtol=0.05, atol=0.02)


GEOMETRIES = [
    {"padding": 1},
    {"stride": 2, "padding": (1, 0)},  # of the same sizes as the first: no rule may mistake one for the other
    {"dilation": (1, 2)},
]


def dtensor(device: str, mesh: DeviceMesh, input: Shard | Replicate, parameters: Shard | Replicate) -> None:
    """Output and gradients, without a message, for all geometries, with a bias and with two filters a channel."""
    weights_are_replicated = parameters.is_replicate() and input.is_shard()
    for multiplier in (1, 2):
        torch.manual_seed(3)
        shapes = (4, 6, 9, 8), (6 * multiplier, 1, 3, 3), (6 * multiplier,)
        whole = [torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes]
        for geometry in GEOMETRIES:
            for bias in (True, False):
                tensors = [t.clone().requires_grad_() for t in whole[: 2 + bias]]
                output = dwconv.conv2d(*tensors, **geometry)
                grad_output = torch.randn(output.shape, dtype=torch.float64).to(device)
                expected = torch.autograd.grad(output, tensors, grad_output)

                placements = [input, parameters, parameters]
                shards = [distribute_tensor(t, mesh, [p]) for t, p in zip(whole[: 2 + bias], placements)]
                shards = [t.requires_grad_() for t in shards]
                grad_shards = distribute_tensor(grad_output, mesh, [input])
                with CommDebugMode() as messages:
                    result = dwconv.conv2d(*shards, **geometry)
                    grads = torch.autograd.grad(result, shards, grad_shards)
                assert messages.get_total_counts() == 0, messages.get_comm_counts()
                assert result.placements == grads[0].placements == (input,)
                for grad in grads[1:]:
                    assert grad.placements == ((Partial(),) if weights_are_replicated else (parameters,))
                torch.testing.assert_close(result.full_tensor(), output)
                torch.testing.assert_close([grad.full_tensor() for grad in grads], list(expected))


@check
def dtensor_by_batch(device: str, mesh: DeviceMesh) -> None:
    dtensor(device, mesh, Shard(0), Replicate())


@check
def dtensor_by_channels(device: str, mesh: DeviceMesh) -> None:
    dtensor(device, mesh, Shard(1), Shard(0))


@check
def dtensor_replicated(device: str, mesh: DeviceMesh) -> None:
    dtensor(device, mesh, Replicate(), Replicate())


@check
def dtensor_otherwise(device: str, mesh: DeviceMesh) -> None:
    """Shards that fit no rule, or not each other, are brought into one that does."""
    torch.manual_seed(4)
    input, weight = torch.randn(2, 3, 8, 7, device=device), torch.randn(6, 1, 3, 3, device=device)
    expected = dwconv.conv2d(input, weight)
    for placement in (Shard(0), Shard(1), Shard(2), Shard(3)):
        for weights in (Replicate(), Shard(0)):
            shards = distribute_tensor(input, mesh, [placement]), distribute_tensor(weight, mesh, [weights])
            torch.testing.assert_close(dwconv.conv2d(*shards).full_tensor(), expected)


def work(device: str, report: Path) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (PROCESSES,))
    failures = {}
    for function in CHECKS:
        try:
            function(device, mesh)
        except Exception:
            failures[function.__name__] = traceback.format_exc()
            print(failures[function.__name__], flush=True)
    report.with_suffix(f".{rank}").write_text(json.dumps(failures))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads outlive their group: one that releases a tensor while Python ends aborts


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, str]]]:
    """The failures of every process, by check; the processes are started once for each device."""
    known: dict[str, list[dict[str, str]]] = {}

    def report(device: str) -> list[dict[str, str]]:
        if device not in known:
            path = tmp_path_factory.mktemp("distributed") / "report"
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(PROCESSES)}
            paths = [str(ROOT / "tests"), str(Path(dwconv.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
            processes = [
                subprocess.Popen(
                    [sys.executable, __file__, device, str(path)],
                    env={**os.environ, **shared, "RANK": str(rank), "PYTHONPATH": os.pathsep.join(paths)},
                )
                for rank in range(PROCESSES)
            ]
            try:
                assert [process.wait(timeout=240) for process in processes] == [0] * PROCESSES
            finally:
                for process in processes:
                    process.kill()
            known[device] = [json.loads(path.with_suffix(f".{rank}").read_text()) for rank in range(PROCESSES)]
        return known[device]

    return report


@pytest.mark.parametrize("name", [function.__name__ for function in CHECKS])
def test_two_processes(device: str, name: str, reports: Callable[[str], list[dict[str, str]]]) -> None:
    if device == "cuda" and torch.cuda.device_count() < PROCESSES:
        pytest.skip("fewer than two GPUs")
    for rank, failures in enumerate(reports(device)):
        assert name not in failures, f"process {rank}: {failures[name]}"


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
