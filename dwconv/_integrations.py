"""What other parts of torch have to know of the operators, told to each of them once it is imported."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _ops

Pair = Sequence[int]


def _tell_flop_counter() -> None:
    """A multiplication and an addition for each tap of each output, in every pass."""
    from torch.utils.flop_counter import register_flop_formula

    def flops(output: Sequence[int], kernel_size: Sequence[int]) -> int:
        batch, filters, height, width = output
        return 2 * batch * filters * height * width * kernel_size[0] * kernel_size[1]

    @register_flop_formula(torch.ops.dwconv.forward)
    def _(input: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        return flops(out_shape, weight[2:])

    @register_flop_formula(torch.ops.dwconv.grad_input)
    def _(grad_output: Any, weight: Any, *_: Any, **__: Any) -> int:
        return flops(grad_output, weight[2:])

    @register_flop_formula(torch.ops.dwconv.grad_weight)
    def _(grad_output: Any, input: Any, kernel_size: Pair, *_: Any, **__: Any) -> int:
        return flops(grad_output, kernel_size)


def _tell_dtensor() -> None:
    """The batch may be sharded, or the channels together with the filters: neither communicates.

    Gradients of parameters are then sums over the shards of the batch that are still to be added up.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    propagator = DTensor._op_dispatcher.sharding_propagator

    def register(op: torch._ops.OpOverload[..., Any], tensors: int) -> Callable[..., Any]:
        def decorate(rule: Callable[..., Any]) -> None:
            register_sharding(op)(rule)
            # All arguments behind the tensors decide on the output's size.
            propagator.op_to_schema_info[op] = RuntimeSchemaInfo(tensors, needs_pytree=True)

        return decorate

    def fit(input_channels: int, filters: int, mesh: Any) -> bool:
        """Whether shards of the channels and of the filters belong together."""
        return filters == input_channels or input_channels % mesh.size() == 0

    @register(_ops.forward, 3)
    def _(input: Any, weight: Any, bias: Any, *geometry: Any) -> list[Any]:
        def inputs(input: Any, weight: Any) -> list[Any]:
            return [input, weight, None if bias is None else weight, *[None] * len(geometry)]

        rules = [([Replicate()], inputs(Replicate(), Replicate())), ([Shard(0)], inputs(Shard(0), Replicate()))]
        if fit(input.shape[1], weight.shape[0], input.mesh):
            rules.append(([Shard(1)], inputs(Shard(1), Shard(0))))
        return rules

    @register(_ops.grad_input, 2)
    def _(grad_output: Any, weight: Any, input_size: Sequence[int], *others: Any) -> list[Any]:
        rest = [None] * (1 + len(others))
        rules = [([Replicate()], [Replicate(), Replicate(), *rest]), ([Shard(0)], [Shard(0), Replicate(), *rest])]
        if fit(input_size[1], weight.shape[0], weight.mesh):
            rules.append(([Shard(1)], [Shard(1), Shard(0), *rest]))
        return rules

    propagator.op_to_shape_and_stride_idx[_ops.grad_input] = 2  # input_size is that of the shard

    @register(_ops.grad_weight, 2)
    def _(grad_output: Any, input: Any, *others: Any) -> list[Any]:
        rest = [None] * len(others)
        rules = [
            ([Replicate(), Replicate()], [Replicate(), Replicate(), *rest]),
            ([Partial(), Partial()], [Shard(0), Shard(0), *rest]),
        ]
        if fit(input.shape[1], grad_output.shape[1], input.mesh):
            rules.append(([Shard(0), Shard(0)], [Shard(1), Shard(1), *rest]))
        return rules


def _tell_onnx() -> None:
    """Its exporter knows PyTorch's own operators alone.

    It would find a decomposition in torch's table, too, but so would Inductor, which is to keep the operators.
    """
    from torch.onnx._internal.exporter import _decomp

    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, *_: bool
    ) -> Tensor:
        return torch.ops.aten.convolution(input, weight, bias, stride, padding, dilation, False, [0, 0], input.shape[1])

    table = _decomp.create_onnx_friendly_decomposition_table

    def table_with_ours(*arguments: Any, **options: Any) -> dict[Any, Any]:
        return {**table(*arguments, **options), _ops.forward: forward}

    _decomp.create_onnx_friendly_decomposition_table = table_with_ours


_TO_TELL = {
    "torch.utils.flop_counter": _tell_flop_counter,
    "torch.distributed.tensor": _tell_dtensor,
    "torch.onnx._internal.exporter._decomp": _tell_onnx,
}


def _tell(name: str, tell: Callable[[], None]) -> None:
    """Some of what is told goes by ways that a release of torch may change: that must not break its own modules."""
    try:
        tell()
    except Exception as error:
        warnings.warn(
            f"dwconv: {name} of torch {torch.__version__} does not know its operators: {error!r}", stacklevel=2
        )


class _Finder(MetaPathFinder):
    """Finds nothing itself; it is asked for a module on its first import."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        tell = _TO_TELL.pop(name, None)
        spec = importlib.util.find_spec(name) if tell else None
        if tell and spec and spec.loader:
            execute = spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                _tell(name, tell)

            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


for _name in [name for name in _TO_TELL if name in sys.modules]:
    _tell(_name, _TO_TELL.pop(_name))
sys.meta_path.insert(0, _Finder())
