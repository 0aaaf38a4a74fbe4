from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor, dtype

def build_info() -> dict[str, Any]:
    """What this binary was built with and for: version, cuda (None without), cuda_architectures, torch."""

def plans(
    pass_name: str,
    dtype: str,
    input_size: Sequence[int],
    input_stride: Sequence[int],
    weight_size: Sequence[int],
    output_stride: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    capability: int = ...,
    shared_memory: int = ...,
    allow_fft: bool = ...,
) -> list[tuple[str, str]]:
    """Name and reason of every plan that can serve a problem on a GPU of that compute capability (90 is 9.0, the
    default) with that much shared memory a block (bytes); the first one does."""

def unpack_geometry(packed: int) -> tuple[list[int], bool]:
    """Of stride, padding and dilation, packed in one for few arguments, the vertical and the horizontal number; and
    whether weight and bias are cast to the input's dtype, and their gradients back."""

def prepare_short_way(
    *,
    tensor_types: tuple[type[Tensor], ...],
    dtypes: tuple[dtype, ...],
    cast_dtype: dtype,
    occasions: tuple[Callable[[], object], ...],
    forward_ad: ModuleType,
    is_any_autocast_enabled: Callable[[], bool],
    is_autocast_enabled: Callable[[str], bool],
    autocast_dtype: Callable[[str], dtype],
    is_grad_enabled: Callable[[], bool],
    without_grad: Callable[..., Tensor],
    with_grad: Callable[..., Tensor],
    with_grad_and_casts: Callable[..., Tensor],
) -> None:
    """What short_way asks, and whom it calls with (input, weight, bias, packed geometry)."""

def short_way(
    input: object,
    weight: object,
    bias: object,
    stride: object,
    padding: object,
    dilation: object,
    /,
) -> Tensor | None:
    """conv2d of plain tensors and numbers; None where something about the call is unusual."""

def has_short_way_back(grad_output: object, /) -> bool:
    """Whether a gradient is a plain tensor, and nothing but its gradients is asked of the backward pass."""
