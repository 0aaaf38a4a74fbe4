from collections.abc import Sequence
from typing import Any

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
) -> list[tuple[str, str]]:
    """Name and reason of every plan that can serve a problem on a GPU of that compute capability (90 is 9.0, the
    default) with that much shared memory a block (bytes); the first one does."""
