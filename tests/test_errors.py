"""Bad input: the error type of F.conv2d, a message that names the argument and what was got, and nothing broken."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import Case, integers, make_inputs, torch_conv2d
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dwconv

ops = torch.ops.dwconv

# ------------------------------------------------------------------------------------------------ the bad calls


class Bad(NamedTuple):
    """A call of conv2d with some arguments of a valid call replaced; a function makes one on a device."""

    arguments: dict[str, Any]
    says: tuple[str, ...]  # regular expressions
    error: type[Exception] | None = None  # None: what F.conv2d raises


SIZES = {"input": (2, 4, 8, 8), "weight": (8, 1, 3, 3), "bias": (8,)}
# Where F.conv2d accepts the call, or its error comes from the depths of a library.
LOOSE = RuntimeError


def of_size(*size: int) -> Callable[[str], Tensor]:
    return lambda device: torch.randn(size, device=device)


def like(name: str, change: Callable[[Tensor], Any]) -> Callable[[str], Any]:
    return lambda device: change(torch.randn(SIZES[name], device=device))


def all_of(change: Callable[[Tensor], Any], *names: str) -> dict[str, Callable[[str], Any]]:
    return {name: like(name, change) for name in names or SIZES}


def to(*args: Any) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(*args)


def list_of(*values: object) -> str:
    return re.escape(str(list(values)))


BAD: dict[str, Bad] = {}

# Ranks.
for _name, _size in {"0d": (), "1d": (4,), "2d": (8, 8), "5d": (2, 4, 8, 8, 8)}.items():
    BAD[f"input_{_name}"] = Bad({"input": of_size(*_size)}, ("input", list_of(*_size)))
for _name, _size in {"0d": (), "1d": (8,), "2d": (8, 9), "3d": (8, 3, 3), "5d": (8, 1, 3, 3, 3)}.items():
    BAD[f"weight_{_name}"] = Bad({"weight": of_size(*_size)}, ("weight", list_of(*_size)))
    BAD[f"weight_{_name}_same"] = Bad({"weight": of_size(*_size), "padding": "same"}, ("weight", list_of(*_size)))
BAD["input_2d_same"] = Bad(
    {"input": of_size(8, 8), "weight": of_size(8, 1, 2, 2), "padding": "same"}, ("input", list_of(8, 8))
)
for _name, _size in {"0d": (), "2d": (8, 1), "short": (5,), "single": (1,), "long": (9,), "empty": (0,)}.items():
    BAD[f"bias_{_name}"] = Bad({"bias": of_size(*_size)}, ("bias", "8 elements", list_of(*_size)))

# Channels and filters.
BAD |= {
    "input_channels": Bad({"input": of_size(2, 5, 8, 8)}, ("input", "weight", list_of(2, 5, 8, 8), "5 channels")),
    "input_channels_unbatched": Bad({"input": of_size(5, 8, 8)}, ("input", "weight", "5, 8, 8", "5 channels")),
    "no_channels": Bad({"input": of_size(2, 0, 8, 8)}, ("input", "channel", list_of(2, 0, 8, 8))),
    "no_channels_no_filters": Bad(
        {"input": of_size(2, 0, 8, 8), "weight": of_size(0, 1, 3, 3), "bias": None}, ("input", list_of(2, 0, 8, 8))
    ),
    "filters_no_multiple": Bad({"weight": of_size(9, 1, 3, 3), "bias": None}, ("weight", list_of(9, 1, 3, 3), "4 ch")),
    "filters_too_few": Bad({"weight": of_size(2, 1, 3, 3), "bias": None}, ("weight", list_of(2, 1, 3, 3), "4 ch")),
    "no_filters": Bad({"weight": of_size(0, 1, 3, 3), "bias": None}, ("weight", list_of(0, 1, 3, 3))),
    "weight_of_2_channels": Bad({"weight": of_size(8, 2, 3, 3)}, ("weight", "depthwise", list_of(8, 2, 3, 3))),
    "weight_of_4_channels": Bad({"weight": of_size(8, 4, 3, 3)}, ("weight", "depthwise", list_of(8, 4, 3, 3))),
    "weight_of_0_channels": Bad({"weight": of_size(8, 0, 3, 3)}, ("weight", "depthwise", list_of(8, 0, 3, 3))),
}

# Stride, padding and dilation: values.
for _name, _values in {"stride": (0, -1), "dilation": (0, -1), "padding": (-1,)}.items():
    for _value in _values:
        _error = LOOSE if (_name, _value) == ("dilation", 0) else None  # F.conv2d computes something, on CUDA
        BAD[f"{_name}_{_value}"] = Bad({_name: _value}, (_name, list_of(_value, _value)), _error)
        BAD[f"{_name}_{_value}_height"] = Bad({_name: (_value, 1)}, (_name, list_of(_value, 1)), _error)
        BAD[f"{_name}_{_value}_width"] = Bad({_name: [1, _value]}, (_name, list_of(1, _value)), _error)
for _name in ("stride", "padding", "dilation"):
    for _power in (31, 62):  # F.conv2d overflows, or asks for that much memory
        BAD[f"{_name}_2^{_power}"] = Bad({_name: (1, 2**_power)}, (_name, list_of(1, 2**_power)), LOOSE)
    BAD[f"{_name}_2^63"] = Bad({_name: 2**63}, (_name, str(2**63)))
    BAD[f"{_name}_-2^63-1"] = Bad({_name: -(2**63) - 1}, (_name, str(-(2**63) - 1)))
    BAD[f"{_name}_2^63_width"] = Bad({_name: (1, 2**63)}, (_name, str(2**63)))
BAD |= {
    "padding_-2^63": Bad({"padding": -(2**63)}, ("padding", list_of(-(2**63), -(2**63))), LOOSE),
    "dilation_-1_same": Bad({"dilation": -1, "padding": "same"}, ("dilation", list_of(-1, -1))),
    "dilation_0_same": Bad({"dilation": 0, "padding": "same"}, ("dilation", list_of(0, 0)), LOOSE),
    "dilation_2^62_same": Bad({"dilation": (1, 2**62), "padding": "same"}, ("dilation", str(2**62)), LOOSE),
}

# Stride, padding and dilation: types and lengths.
for _name in ("stride", "padding", "dilation"):
    for _length in (0, 3, 4):
        _values = (1,) * _length
        BAD[f"{_name}_of_{_length}"] = Bad({_name: _values}, (_name, list_of(*_values)))
    for _id, _value in {
        "float": 1.0, "float_pair": (1.0, 1), "float_second": (1, 1.5), "None": None, "None_second": (1, None),
        "bool": True, "bool_pair": (True, 1), "bool_list": [False, False], "complex": 1j, "set": {1, 2},
        "range": range(1, 3), "dict": {1: 1}, "nested": ((1, 1), 1), "numpy_float": np.float64(1),
        "numpy_array": np.array([1, 1]), "tensor_pair": torch.tensor([1, 1]),
        "tensor_float": torch.tensor(1.0),
    }.items():  # fmt: skip
        BAD[f"{_name}_{_id}"] = Bad({_name: _value}, (f"'{_name}'", re.escape(repr(_value))))
    # Of NumPy before 2.3, F.conv2d hits an internal assertion.
    BAD[f"{_name}_numpy_bool"] = Bad({_name: np.bool_(True)}, (f"'{_name}'", "True"), TypeError)
    BAD[f"{_name}_bool_second"] = Bad({_name: (1, True)}, (f"'{_name}'", r"\(1, True\)"), TypeError)
    BAD[f"{_name}_tensor"] = Bad({_name: torch.tensor(1)}, (f"'{_name}'", r"tensor\(1\)"), TypeError)
    BAD[f"{_name}_bytes"] = Bad({_name: b"same"}, (f"'{_name}'", "b'same'"), TypeError)
for _name in ("stride", "dilation"):
    BAD[f"{_name}_str"] = Bad({_name: "same"}, (f"'{_name}'", "'same'"))
for _value in ("foo", "SAME", "", "1"):
    BAD[f"padding_{_value!r}"] = Bad({"padding": _value}, ("padding", repr(_value)))
BAD |= {
    "same_strided": Bad({"padding": "same", "stride": 2}, ("padding='same'", "stride", list_of(2, 2))),
    "same_strided_width": Bad({"padding": "same", "stride": (1, 2)}, ("padding='same'", "stride", list_of(1, 2))),
    "same_stride_0": Bad({"padding": "same", "stride": 0}, ("stride", list_of(0, 0))),
    "same_stride_of_3": Bad({"padding": "same", "stride": (1, 1, 1)}, ("stride", list_of(1, 1, 1))),
    "same_dilation_of_3": Bad({"padding": "same", "dilation": (1, 1, 1)}, ("dilation", list_of(1, 1, 1))),
}

# Sizes.
BAD |= {
    "kernel_higher": Bad({"weight": of_size(8, 1, 9, 3)}, ("Kernel", "8 x 8", "9 x 3")),
    "kernel_wider": Bad({"weight": of_size(8, 1, 3, 9)}, ("Kernel", "8 x 8", "3 x 9")),
    "kernel_exceeds_padded": Bad({"weight": of_size(8, 1, 3, 11), "padding": 1}, ("Kernel", "10 x 10", "3 x 11")),
    "kernel_dilated": Bad({"dilation": 4}, ("Kernel", "8 x 8", "9 x 9")),
    "kernel_exceeds_empty_batch": Bad({"input": of_size(0, 4, 2, 2)}, ("Kernel", "2 x 2", "3 x 3")),
    "kernel_exceeds_unbatched": Bad({"input": of_size(4, 2, 8)}, ("Kernel", "2 x 8", "3 x 3")),
    "kernel_0": Bad({"weight": of_size(8, 1, 0, 3)}, ("weight", list_of(8, 1, 0, 3)), LOOSE),
    "kernel_0_width": Bad({"weight": of_size(8, 1, 3, 0), "padding": 1}, ("weight", list_of(8, 1, 3, 0)), LOOSE),
    "kernel_0_0": Bad({"weight": of_size(8, 1, 0, 0)}, ("weight", list_of(8, 1, 0, 0)), LOOSE),
    "kernel_0_same": Bad({"weight": of_size(8, 1, 0, 3), "padding": "same"}, ("weight", list_of(8, 1, 0, 3)), LOOSE),
    "height_0": Bad({"input": of_size(2, 4, 0, 8)}, ("input", list_of(2, 4, 0, 8))),
    "width_0": Bad({"input": of_size(2, 4, 8, 0)}, ("input", list_of(2, 4, 8, 0))),
    "height_0_padded": Bad({"input": of_size(2, 4, 0, 8), "padding": 2}, ("input", list_of(2, 4, 0, 8)), LOOSE),
    "size_0": Bad({"input": of_size(2, 4, 0, 0), "weight": of_size(8, 1, 1, 1)}, ("input", list_of(2, 4, 0, 0))),
}

# Dtypes. F.conv2d takes some of these on some devices.
for _dtype, _got in {
    torch.int32: "Int|int32", torch.int64: "Long|int64", torch.uint8: "Byte|uint8", torch.bool: "Bool|bool",
    torch.complex32: "ComplexHalf|complex32", torch.complex64: "ComplexFloat|complex64",
    torch.complex128: "ComplexDouble|complex128", torch.float8_e4m3fn: "Float8_e4m3fn|float8_e4m3fn",
    torch.float8_e5m2: "Float8_e5m2|float8_e5m2",
}.items():  # fmt: skip
    BAD[str(_dtype)] = Bad(
        all_of(to(_dtype)), ("input", "float32, float64, float16 or bfloat16", _got), NotImplementedError
    )
BAD |= {
    "weight_double": Bad(all_of(Tensor.double, "weight"), ("input", "weight", "dtype", "float", "double|float64")),
    "bias_double": Bad(all_of(Tensor.double, "bias"), ("input", "bias", "dtype", "float", "double|float64")),
    "input_half": Bad(all_of(Tensor.half, "input"), ("input", "weight", "dtype", "half|float16", "float")),
    "input_bfloat16": Bad(all_of(Tensor.bfloat16, "input"), ("input", "weight", "dtype", "bfloat16", "float")),
    "bias_of_mixed": Bad(all_of(Tensor.half, "input", "weight"), ("input", "bias", "dtype", "half|float16", "float")),
    "weight_int": Bad(all_of(Tensor.int, "weight"), ("input", "weight", "dtype", "float", r"int\d*")),
    "weight_complex": Bad(all_of(to(torch.complex64), "weight"), ("input", "weight", "dtype", "float", "complex")),
}

# Devices, layouts, and no tensors at all.
for _name in SIZES:
    BAD[f"{_name}_meta"] = Bad(all_of(to("meta"), _name), ("input", _name, "device", "cpu|cuda:0", "meta"), LOOSE)
    BAD[f"{_name}_sparse"] = Bad(all_of(Tensor.to_sparse, _name), (f"{_name} of [^;]*sparse_coo", "dense"))
    for _id, _make in {
        "list": Tensor.tolist, "tuple": tuple, "array": lambda tensor: tensor.cpu().numpy(), "int": Tensor.numel,
        "float": lambda _: 1.0, "str": lambda _: "x", "bool": lambda _: False, "dtype": lambda tensor: tensor.dtype,
    }.items():  # fmt: skip
        _got = {"array": "ndarray"}.get(_id, _id)
        BAD[f"{_name}_{_id}"] = Bad(all_of(_make, _name), (f"'{_name}'", "Tensor", _got))
BAD |= {
    "input_None": Bad({"input": None}, ("'input'", "Tensor", "NoneType")),
    "weight_None": Bad({"weight": None}, ("'weight'", "Tensor", "NoneType")),
    "unknown_argument": Bad({"strides": 1}, ("strides",)),
    "groups": Bad({"groups": 4}, ("groups",), TypeError),
}


def arguments(bad: Bad, device: str) -> dict[str, Any]:
    made = {name: of_size(*size) for name, size in SIZES.items()} | bad.arguments
    return {name: value(device) if callable(value) else value for name, value in made.items()}


def call_torch(input: Any, **arguments: Any) -> Tensor:
    return F.conv2d(input, **arguments, groups=input.shape[-3] if getattr(input, "ndim", 0) > 2 else 4)


def assert_says(error: BaseException, says: tuple[str, ...]) -> None:
    for piece in says:
        assert re.search(piece, str(error), re.IGNORECASE), f"{piece!r} not found in: {error}"
    assert len(str(error)) < 500, str(error)


def assert_next_call_works(device: str) -> None:
    inputs = make_inputs(Case(1, 2, (4, 5), (3, 3), padding=(1, 1)), torch.float32, device, make=integers)
    expected = torch_conv2d(*(tensor.double().cpu() for tensor in inputs), padding=1)
    assert torch.equal(dwconv.conv2d(*inputs, padding=1).double().cpu(), expected)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("name", BAD)
def test_error(device: str, name: str, requires_grad: bool) -> None:
    bad = BAD[name]
    given = arguments(bad, device)
    error = bad.error
    if error is None:
        with pytest.raises(Exception) as theirs:
            call_torch(**given)
        error = theirs.type
    if requires_grad:
        for tensor in given.values():
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dim() > 0:
                tensor.requires_grad_()
    with pytest.raises(error) as ours:
        dwconv.conv2d(**given)
    assert_says(ours.value, bad.says)
    assert_next_call_works(device)


@pytest.mark.gpu
@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("on_cuda", ["input", "weight", "bias", "input weight", "input bias", "weight bias"])
def test_devices_differ(on_cuda: str, requires_grad: bool) -> None:
    tensors = {
        name: torch.randn(size, device="cuda" if name in on_cuda.split() else "cpu", requires_grad=requires_grad)
        for name, size in SIZES.items()
    }
    with pytest.raises(Exception) as theirs:
        call_torch(**tensors)
    with pytest.raises(theirs.type) as ours:
        dwconv.conv2d(**tensors)
    other = "bias" if tensors["input"].device == tensors["weight"].device else "weight"
    assert_says(ours.value, ("input", other, "device", "cpu", "cuda:0"))
    for device in ("cpu", "cuda"):
        assert_next_call_works(device)


@pytest.mark.parametrize("layout", ["sparse_csr", "mkldnn", "quantized"])
def test_other_layouts(layout: str) -> None:
    input = torch.randn(SIZES["input"])
    if layout == "sparse_csr":
        input = input[0, 0].to_sparse_csr()
    elif layout == "mkldnn":
        input = input.to_mkldnn()
    else:
        input = torch.quantize_per_tensor(input, 0.1, 0, torch.quint8)
    with pytest.raises(RuntimeError) as ours:
        dwconv.conv2d(input, torch.randn(SIZES["weight"]))
    assert_says(ours.value, ("input", "quint8") if layout == "quantized" else (f"input of [^;]*{layout}", "dense"))
    assert_next_call_works("cpu")


# ------------------------------------------------------------------------------- what counts as an int, or does not


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize(
    "value",
    [2, (2,), [2], (1, 2), [2, 1], torch.Size([2, 1]), np.int64(2), np.uint8(2), (np.int64(2), 1), [1, np.int8(2)]],
    ids=repr,
)
def test_what_counts_as_ints(device: str, name: str, value: object) -> None:
    input, weight, _ = make_inputs(Case(2, 3, (9, 8), (3, 3)), torch.float32, device, make=integers)
    expected = torch_conv2d(input.double().cpu(), weight.double().cpu(), **{name: value})
    assert torch.equal(dwconv.conv2d(input, weight, **{name: value}).double().cpu(), expected)


def test_tensors_without_numbers() -> None:
    tensors = [torch.randn(size, device="meta") for size in SIZES.values()]
    for autocast in (False, True):
        with torch.autocast("cpu", enabled=autocast):
            output = dwconv.conv2d(*tensors, padding=1)
        assert (output.device.type, output.shape, output.dtype) == ("meta", (2, 8, 8, 8), torch.float32)


# --------------------------------------------------------------------------------------- PyTorch's own error cases

# PyTorch's tests import expecttest, for other tests than these.
PRINT_ERROR_INPUTS = """
import json, sys, types, unittest
stand_in = types.ModuleType("expecttest")
stand_in.TestCase = unittest.TestCase
sys.modules.setdefault("expecttest", stand_in)
import torch
from torch.testing._internal.common_methods_invocations import op_db
[info] = [info for info in op_db if info.name == "nn.functional.conv2d"]
for error in info.error_inputs(torch.device("cpu")):
    sample = error.sample_input
    tensors = [[tensor.shape, str(tensor.dtype).removeprefix("torch.")] for tensor in (sample.input, *sample.args)]
    print(json.dumps([tensors, sample.kwargs, error.error_type.__name__, error.error_regex]))
"""


@pytest.fixture(scope="module")
def error_inputs() -> list[tuple[list, dict, str, str]]:
    lines = subprocess.run(
        [sys.executable, "-c", PRINT_ERROR_INPUTS], capture_output=True, text=True, check=True
    ).stdout
    return [json.loads(line) for line in lines.splitlines()]


def test_errors_of_pytorchs_tests(device: str, error_inputs: list) -> None:
    assert len(error_inputs) >= 10
    for tensors, kwargs, error, regex in error_inputs:
        # Made depthwise, so that there is as much wrong with it as before.
        ((*batch, channels, height, width), _), (weight_size, _), ((filters,), _) = tensors
        if "groups" in kwargs:
            channels = max(kwargs.pop("groups"), 0)
        else:
            filters = channels
        if len(weight_size) == 4:
            weight_size = (filters, 1, *weight_size[2:])
        sizes = (*batch, channels, height, width), weight_size, (filters,)
        input, weight, bias = (
            torch.zeros(size, dtype=getattr(torch, dtype), device=device) for size, (_, dtype) in zip(sizes, tensors)
        )
        with pytest.raises(Exception, match=regex) as theirs:
            torch_conv2d(input, weight, bias, **kwargs)
        assert theirs.type.__name__ == error
        with pytest.raises(theirs.type, match="input|weight|bias|stride|padding|dilation") as ours:
            dwconv.conv2d(input, weight, bias, **kwargs)
        assert_says(ours.value, (r"got|\(\w+\)",))
        assert_next_call_works(device)


# ------------------------------------------------------------------------------------------ the operators by name

OPERATORS = {
    "forward": {
        "input": of_size(2, 4, 8, 8), "weight": of_size(8, 1, 3, 3), "bias": of_size(8),
        "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1],
    },
    "grad_input": {
        "grad_output": of_size(2, 8, 6, 6), "weight": of_size(8, 1, 3, 3), "input_size": [2, 4, 8, 8],
        "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "channels_last": False,
    },
    "grad_weight": {
        "grad_output": of_size(2, 8, 6, 6), "input": of_size(2, 4, 8, 8), "kernel_size": [3, 3],
        "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "bias": True,
    },
}  # fmt: skip

BAD_OPERATORS: list[tuple[str, str, Any, tuple[str, ...]]] = [
    ("forward", "input", of_size(4, 8, 8), ("input", list_of(4, 8, 8))),
    ("forward", "weight", of_size(8, 3, 3), ("weight", list_of(8, 3, 3))),
    ("forward", "bias", of_size(7), ("bias", list_of(7))),
    ("grad_input", "grad_output", of_size(2, 8, 6, 7), ("grad_output", list_of(2, 8, 6, 6), list_of(2, 8, 6, 7))),
    ("grad_input", "grad_output", of_size(2, 8, 5, 6), ("grad_output", list_of(2, 8, 5, 6))),
    ("grad_input", "grad_output", of_size(1, 8, 6, 6), ("grad_output", list_of(1, 8, 6, 6))),
    ("grad_input", "grad_output", of_size(2, 4, 6, 6), ("grad_output", list_of(2, 4, 6, 6))),
    ("grad_input", "grad_output", of_size(8, 6, 6), ("grad_output", list_of(8, 6, 6))),
    ("grad_input", "grad_output", like("input", Tensor.double), ("grad_output", "weight", "dtype", "double|float64")),
    ("grad_input", "weight", of_size(8, 2, 3, 3), ("weight", list_of(8, 2, 3, 3))),
    ("grad_input", "weight", of_size(8, 9), ("weight", list_of(8, 9))),
    ("grad_input", "weight", of_size(8, 1, 0, 3), ("weight", list_of(8, 1, 0, 3))),
    ("grad_input", "input_size", [], ("input_size", list_of())),
    ("grad_input", "input_size", [4, 8, 8], ("input_size", list_of(4, 8, 8))),
    ("grad_input", "input_size", [1, 2, 4, 8, 8], ("input_size", list_of(1, 2, 4, 8, 8))),
    ("grad_input", "input_size", [2, 4, 9, 8], ("grad_output", list_of(2, 8, 7, 6))),
    ("grad_input", "input_size", [3, 4, 8, 8], ("grad_output", list_of(3, 8, 6, 6))),
    ("grad_input", "input_size", [-2, 4, 8, 8], ("-2",)),
    ("grad_input", "input_size", [2, 0, 8, 8], ("input", list_of(2, 0, 8, 8))),
    ("grad_input", "input_size", [2, 3, 8, 8], ("input", "3 channels")),
    ("grad_input", "input_size", [2, 4, 0, 8], ("input", list_of(2, 4, 0, 8))),
    ("grad_input", "input_size", [2, 4, -8, 8], ("input", list_of(2, 4, -8, 8))),
    ("grad_input", "input_size", [2, 4, 2**62, 8], ("grad_output", str(2**62 - 2))),
    ("grad_weight", "grad_output", of_size(2, 8, 6, 7), ("grad_output", list_of(2, 8, 6, 6), list_of(2, 8, 6, 7))),
    ("grad_weight", "grad_output", of_size(3, 8, 6, 6), ("grad_output", list_of(3, 8, 6, 6))),
    ("grad_weight", "grad_output", of_size(2, 7, 6, 6), ("7", "input", "4 channels")),
    ("grad_weight", "grad_output", of_size(2, 0, 6, 6), ("0", "input", "4 channels")),
    ("grad_weight", "grad_output", of_size(), ("grad_output", list_of())),
    ("grad_weight", "input", of_size(4, 8, 8), ("input", list_of(4, 8, 8))),
    ("grad_weight", "input", of_size(2, 4, 8, 9), ("grad_output", list_of(2, 8, 6, 7))),
    ("grad_weight", "input", like("input", Tensor.half), ("grad_output", "input", "dtype", "half|float16")),
    ("grad_weight", "kernel_size", [3, 2], ("grad_output", list_of(2, 8, 6, 7))),
    ("grad_weight", "kernel_size", [0, 3], ("kernel", list_of(0, 3))),
    ("grad_weight", "kernel_size", [-1, 3], ("kernel", list_of(-1, 3))),
    ("grad_weight", "kernel_size", [9, 3], ("kernel", "8 x 8", "9 x 3")),
    ("grad_weight", "kernel_size", [3, 2**40], ("kernel", str(2**40))),
    ("grad_weight", "kernel_size", [3], ("kernel", list_of(3))),
    ("grad_weight", "kernel_size", [3, 3, 3], ("kernel", list_of(3, 3, 3))),
] + [
    (operator, name, value, (name, list_of(*value)))
    for operator in OPERATORS
    for name, smallest in {"stride": 1, "padding": 0, "dilation": 1}.items()
    for value in ([smallest - 1, 1], [1, smallest - 1], [1], [1, 1, 1], [], [1, 2**31], [2**62, 1])
]  # fmt: skip


def operator_arguments(operator: str, device: str, **changes: Any) -> list[Any]:
    made = OPERATORS[operator] | changes
    return [value(device) if callable(value) else value for value in made.values()]


@pytest.mark.parametrize("where", ["device", "meta"])
@pytest.mark.parametrize("operator, name, value, says", BAD_OPERATORS)
def test_operator_error(device: str, where: str, operator: str, name: str, value: Any, says: tuple[str, ...]) -> None:
    given = operator_arguments(operator, "meta" if where == "meta" else device, **{name: value})
    with pytest.raises(RuntimeError) as error:
        getattr(ops, operator)(*given)
    assert_says(error.value, says)
    assert_next_call_works(device)


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_serves_its_good_arguments(device: str, operator: str) -> None:
    getattr(ops, operator)(*operator_arguments(operator, device))


@pytest.mark.gpu
@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_devices_differ(operator: str) -> None:
    for device, other in (("cpu", "cuda"), ("cuda", "cpu")):
        for name, make in OPERATORS[operator].items():
            if not callable(make):
                continue
            with pytest.raises(RuntimeError) as error:
                getattr(ops, operator)(*operator_arguments(operator, device, **{name: make(other)}))
            assert_says(error.value, (name, "device", "cpu", "cuda:0"))
            assert_next_call_works("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("operator", OPERATORS)
def test_unknown_plan(operator: str) -> None:
    with pytest.raises(RuntimeError, match="'no such plan'"):
        getattr(ops, operator).plan(*operator_arguments(operator, "cuda"), "no such plan")
    assert_next_call_works("cuda")


@pytest.mark.gpu
def test_unknown_plan_of_an_empty_batch() -> None:
    empty, weight = torch.empty(0, 4, 8, 8, device="cuda"), torch.randn(4, 1, 3, 3, device="cuda")
    with pytest.raises(RuntimeError, match="'no such plan'"):
        ops.forward.plan(empty, weight, None, [1, 1], [1, 1], [1, 1], "no such plan")
    with pytest.raises(RuntimeError, match="'no such plan'"):
        ops.grad_input.plan(empty, weight, empty.shape, [1, 1], [1, 1], [1, 1], False, "no such plan")


@pytest.mark.parametrize("operator", OPERATORS)
def test_plans_are_for_cuda(operator: str) -> None:
    with pytest.raises(NotImplementedError, match="CPU"):
        getattr(ops, operator).plan(*operator_arguments(operator, "cpu"), "generic")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_operator_dtype(device: str, operator: str, dtype: torch.dtype) -> None:
    for where in (device, "meta"):
        given = [
            value.to(dtype) if isinstance(value, Tensor) else value for value in operator_arguments(operator, where)
        ]
        with pytest.raises(RuntimeError, match="float32, float64, float16 or bfloat16, but got"):
            getattr(ops, operator)(*given)


# ------------------------------------------------------------------------------------- tensors without numbers

# What fails with numbers fails without: or else torch.compile would only find out when the program runs.
WITHOUT_NUMBERS = [name for name in BAD if "meta" not in name and "sparse" not in name]


def to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


@pytest.mark.parametrize("name", WITHOUT_NUMBERS)
def test_meta_error(name: str) -> None:
    bad = BAD[name]
    given = {key: to_meta(value) if key in SIZES else value for key, value in arguments(bad, "cpu").items()}
    with pytest.raises((RuntimeError, TypeError, ValueError)) as ours:
        dwconv.conv2d(**given)
    assert_says(ours.value, bad.says)


COMPILED = [
    "input_5d", "weight_3d_same", "bias_short", "input_channels", "filters_no_multiple", "weight_of_2_channels",
    "stride_0", "padding_-1", "dilation_0", "stride_2^63", "stride_of_3", "padding_float", "padding_None",
    "padding_'foo'", "same_strided", "kernel_exceeds_padded", "kernel_0", "height_0", "torch.int32",
    "weight_double", "weight_list", "input_None",
]  # fmt: skip


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_error(device: str, backend: str) -> None:
    for name in COMPILED:
        torch.compiler.reset()
        compiled = torch.compile(dwconv.conv2d, backend=backend)
        with pytest.raises(Exception) as error:
            compiled(**arguments(BAD[name], device))
        for piece in BAD[name].says:
            assert re.search(piece, str(error.value), re.IGNORECASE), f"{name}: {piece!r} not found in: {error.value}"
    torch.compiler.reset()
    assert_next_call_works(device)


def test_fake_tensors_do_not_hide_devices() -> None:
    with FakeTensorMode():
        input, weight, bias = (torch.randn(size, device="cuda") for size in SIZES.values())
        assert dwconv.conv2d(input, weight, bias).device == input.device
        for tensors in ((input.cpu(), weight, bias), (input, weight.cpu(), bias), (input, weight, bias.cpu())):
            with pytest.raises(RuntimeError, match="(?i)device.*(cpu.*cuda|cuda.*cpu)"):
                dwconv.conv2d(*tensors)


# ------------------------------------------------------------------------------------------- the other functions


def conv2d_layer(
    in_channels: Any, kernel_size: Any, stride: Any = 1, padding: Any = 0, channel_multiplier: Any = 1, **rest: Any
) -> nn.Conv2d:
    out_channels = in_channels * channel_multiplier
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=in_channels, **rest)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"in_channels": 0}, "positive"),
        ({"in_channels": -1}, "positive"),
        ({"in_channels": 2.5}, "int"),
        ({"in_channels": 4.0}, "int"),
        ({"in_channels": "4"}, "int|str"),
        ({"in_channels": None}, "None"),
        ({"kernel_size": -1}, "negative"),
        ({"kernel_size": 1.5}, "kernel_size.*1.5"),
        ({"kernel_size": "3"}, "kernel_size.*'3'"),
        ({"kernel_size": None}, "kernel_size.*None"),
        ({"padding_mode": "foo"}, "padding_mode.*'foo'"),
        ({"padding_mode": None}, "padding_mode.*None"),
        ({"padding": "foo"}, "padding.*'foo'"),
        ({"padding": "same", "stride": 2}, "padding='same'.*strided"),
        ({"padding": "same", "stride": (1, 2)}, "padding='same'.*strided"),
        ({"dtype": torch.int32}, "floating point"),
        ({"dtype": "float"}, "dtype"),
        ({"device": "nowhere"}, "nowhere"),
        ({"nonsense": 1}, "nonsense"),
    ],
    ids=str,
)
def test_layer_error(arguments: dict[str, Any], says: str) -> None:
    arguments = {"in_channels": 4, "kernel_size": 3} | arguments
    with pytest.raises(Exception) as theirs:
        conv2d_layer(**arguments)
    with pytest.raises(theirs.type, match=says):
        dwconv.DepthwiseConv2d(**arguments)


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        ({"channel_multiplier": 0}, ValueError, "channel_multiplier.*0"),
        ({"channel_multiplier": -1}, ValueError, "channel_multiplier.*-1"),
        ({"channel_multiplier": 1.5}, (TypeError, ValueError), "channel_multiplier.*1.5"),
        ({"channel_multiplier": "2"}, (TypeError, ValueError), "channel_multiplier.*'2'"),
        ({"channel_multiplier": True}, (TypeError, ValueError), "channel_multiplier.*True"),
        ({"channel_multiplier": None}, (TypeError, ValueError), "channel_multiplier.*None"),
        ({"kernel_size": ()}, RuntimeError, "kernel_size=\\[\\]"),
        ({"kernel_size": (3, 3, 3)}, RuntimeError, "kernel_size=\\[3, 3, 3\\]"),
        ({"kernel_size": True}, TypeError, "kernel_size.*True"),
        ({"stride": 1.5}, TypeError, "stride.*1.5"),
        ({"stride": (1, 1, 1)}, RuntimeError, "stride=\\[1, 1, 1\\]"),
        ({"padding": None}, TypeError, "padding.*None"),
        ({"dilation": "1"}, TypeError, "dilation.*'1'"),
        ({"groups": 4}, TypeError, "groups"),
    ],
    ids=str,
)
def test_layer_error_of_its_own(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        dwconv.DepthwiseConv2d(**{"in_channels": 4, "kernel_size": 3} | arguments)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"kernel_size": 0}, "weight of size"),
        ({"stride": 0}, "stride"),
        ({"dilation": 0}, "dilation"),
        ({"padding": -1}, "padding"),
        ({"in_channels": 3}, "4 channels"),
        ({"dtype": torch.float64}, "dtype"),
        ({"dtype": torch.complex64}, "dtype"),
    ],
    ids=str,
)
def test_layer_error_of_its_call(device: str, arguments: dict[str, Any], says: str) -> None:
    layer = dwconv.DepthwiseConv2d(**{"in_channels": 4, "kernel_size": 3, "device": device} | arguments)
    with pytest.raises(RuntimeError, match=says):
        layer(torch.randn(2, 4, 8, 8, device=device))
    assert_next_call_works(device)


@pytest.mark.parametrize(
    "model",
    [None, 3, "model", torch.relu, nn.Conv2d, [nn.Conv2d(2, 2, 1, groups=2)]],
    ids=lambda model: type(model).__name__,  # no address in it: parallel runs compare names
)
def test_convert_error(model: object) -> None:
    with pytest.raises(TypeError, match=f"'model' must be nn.Module, not {type(model).__name__}"):
        dwconv.convert(model)


@pytest.mark.parametrize("name", WITHOUT_NUMBERS)
def test_explain_error(device: str, name: str) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError)) as error:
        dwconv.explain(**arguments(BAD[name], device))
    assert_says(error.value, BAD[name].says)
