"""python -m dwconv, as users and scripts call it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dwconv
from dwconv import __main__ as command

GPU = {"name": "a GPU", "capability": "9.0", "memory_GiB": 80.0, "driver": "580.1"}

REPORT = {"ok", "problems", "build", "path", "torch", "python", "platform", "gpu", "device", "checks", "speed"}
CHECK = {"layer", "input", "kernel", "stride", "padding", "dilation", "multiplier", "dtype", "layout"}
CHECK |= {"plans", "errors", "tolerance", "message", "ok"}
SPEED = {"layer", "input", "kernel", "dtype", "layout", "dwconv_forward_us", "dwconv_training_us", "message"}
SPEED |= {"pytorch_forward_us", "pytorch_training_us"}


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, in a folder from which only what is installed is found."""
    return subprocess.run(
        [sys.executable, "-m", "dwconv", *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, and two small layers, so that main() takes no time."""
    small = [layer._replace(channels=16, size=(9, 8)) for layer in command.LAYERS[:2]]
    monkeypatch.setattr(command, "LAYERS", small)
    monkeypatch.setattr(command, "about_gpu", lambda: None)


def test_json(device: str, tmp_path: Path) -> None:
    result = run(tmp_path, "--json", **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}))
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)  # nothing else on stdout
    assert set(report) == REPORT
    assert report["ok"] is True and report["problems"] == []
    assert report["build"] == {**command.BUILD, "version": dwconv.__version__}
    assert report["torch"] == {"version": torch.__version__, "cuda": torch.version.cuda}
    assert (Path(report["path"]) / "__main__.py").exists()
    assert report["device"] == device
    assert (report["gpu"] is None) == (device == "cpu")

    assert len({layer.name for layer in command.LAYERS}) == len(command.LAYERS) >= 12
    expected = {
        (layer.name, dtype, layout)
        for layer in command.LAYERS
        for dtype in (command.DTYPES if device == "cuda" else ("float32",))
        for layout in command.LAYOUTS
    }
    assert {(check["layer"], check["dtype"], check["layout"]) for check in report["checks"]} == expected
    assert len(report["checks"]) == len(expected)
    for check in report["checks"]:
        assert set(check) == CHECK
        assert check["ok"] is True and check["message"] is None
        assert set(check["errors"]) == {"forward", "grad_input", "grad_weight", "grad_bias"}
        assert all(0 <= error <= check["tolerance"] for error in check["errors"].values())

    if device == "cpu":
        assert report["speed"] == []
        return
    assert set(GPU) == set(report["gpu"])
    assert len(report["speed"]) == len(command.TIMED) * len(command.TIMED_AS)
    for cell in report["speed"]:
        assert set(cell) == SPEED
        assert cell["message"] is None
        assert all(cell[key] > 0 for key in SPEED if key.endswith("_us"))


@pytest.mark.gpu
def test_text_on_a_gpu(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert torch.cuda.get_device_name() in result.stdout
    assert "Device time in us" in result.stdout
    assert result.stdout.endswith("Everything is right.\n")


def test_text(on_cpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, value in (("dwconv", dwconv.__version__), ("torch", torch.__version__), ("GPU", "none")):
        assert any(line.startswith(name) and value in line for line in lines), name
    assert any("Only the CPU path is checked" in line for line in lines)
    for layer in command.LAYERS:
        assert sum(line.startswith(f"{layer.name} ") and line.endswith("  ok") for line in lines) == 1
    assert lines[-1] == "Everything is right."


def one_number_is_off(*args):
    output = dwconv.conv2d(*args)
    return output + torch.zeros_like(output).index_put_((torch.tensor(0),) * 4, torch.tensor(1e-2))


def one_number_is_nan(*args):
    output = dwconv.conv2d(*args)
    return output + torch.zeros_like(output).index_put_((torch.tensor(0),) * 4, torch.tensor(torch.nan))


def a_gradient_is_off(input, weight, *args):
    extra = input.sum() * 1e-2
    return dwconv.conv2d(input, weight, *args) + extra - extra.detach()


def size_is_off(*args):
    return dwconv.conv2d(*args)[:, :, :1].expand(-1, -1, command.LAYERS[0].size[0], -1)


def fails(*args):
    raise RuntimeError("CUDA error: no kernel image\nand many lines more")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (one_number_is_off, "float32 NCHW forward: "),
        (one_number_is_nan, "float32 channels_last forward: not finite"),
        (a_gradient_is_off, "float32 NCHW grad_input: "),
        (size_is_off, "RuntimeError: "),
        (fails, "float32 channels_last: RuntimeError: CUDA error: no kernel image\n"),
    ],
)
def test_a_wrong_result_is_found(
    wrong: Callable, said: str, on_cpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "conv2d", wrong)
    assert command.main([]) == 1
    text = capsys.readouterr().out
    assert said in text and "  WRONG\n" in text and "  ok\n" not in text
    assert text.endswith("Something is WRONG: see above.\n")

    assert command.main(["--json"]) == 1
    text = capsys.readouterr().out
    report = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report["ok"] is False and not any(check["ok"] for check in report["checks"])
    assert all(set(check) == CHECK for check in report["checks"])


@pytest.mark.parametrize(
    ("build", "gpu", "said"),
    [
        ({"cuda": None}, GPU, "built without CUDA and cannot serve this GPU"),
        ({"cuda": "13.0", "cuda_architectures": "9.0"}, GPU | {"capability": "8.6"}, "TORCH_CUDA_ARCH_LIST=8.6"),
        ({"version": "0.0.0"}, None, "compiled part of version 0.0.0"),
    ],
    ids=["without CUDA", "another GPU", "another version"],
)
def test_a_bad_installation_is_named(
    build: dict, gpu: dict | None, said: str, on_cpu: None, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(command, "BUILD", {**command.BUILD, **build})
    monkeypatch.setattr(command, "about_gpu", lambda: gpu)
    assert command.main([]) == 1
    text = capsys.readouterr().out
    assert said in text and "pip install" in text
    assert "Only the CPU path is checked" in text and "  ok\n" in text
    assert command.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False and said in report["problems"][0] and report["gpu"] == gpu


def test_a_build_without_cuda_is_right_without_a_gpu(on_cpu: None, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(command, "BUILD", {**command.BUILD, "cuda": None, "cuda_architectures": ""})
    assert command.main([]) == 0
    assert "built WITHOUT CUDA" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ("9.0", "9.0", True),
        ("8.6", "8.0;9.0", True),
        ("8.0", "8.6", False),
        ("7.5", "8.0 9.0+PTX", False),
        ("12.0", "8.0;9.0", False),
        ("12.0", "8.0, 9.0+PTX", True),
        ("9.0", "9.0a", True),
        ("10.3", "10.0a+PTX", False),
        ("10.3", "10.0f", True),
        ("8.9", "Ampere", True),
    ],
)
def test_architectures(capability: str, architectures: str, runs: bool) -> None:
    assert command.has_code_for(capability, architectures) is runs


def test_a_missing_binary_is_named(tmp_path: Path) -> None:
    package = Path(dwconv.__file__).parent
    shutil.copytree(package, tmp_path / "dwconv", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    result = run(tmp_path, "--json", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert result.stdout == ""
    message = result.stderr.splitlines()[-1]
    assert "cannot load its compiled part" in message and "pip install" in message


LAYER = ["2", "16", "32", "30"]


def test_explain_in_a_process(tmp_path: Path) -> None:
    result = run(tmp_path, "explain", *LAYER, "3", "--padding", "1")
    x, w = torch.empty(2, 16, 32, 30, device="meta"), torch.empty(16, 1, 3, 3, device="meta")
    headline, *table = result.stdout.splitlines()
    if command.BUILD["cuda"] is None:
        assert table.pop() == "This dwconv was built without CUDA; a build with CUDA would take these."
    assert result.returncode == 0, result.stderr
    assert headline.startswith("2x16x32x30 -> 2x16x32x30, kernel 3x3")
    assert "\n".join(table) == str(dwconv.explain(x, w, None, 1, 1))


@pytest.mark.parametrize(
    ("options", "arguments", "output"),
    [
        (["3"], {}, [2, 16, 30, 28]),
        (["3x5", "--padding=same", "--dilation=2"], {"padding": "same", "dilation": 2}, [2, 16, 32, 30]),
        (["3x5", "--stride=2x1", "--padding=1x2"], {"stride": (2, 1), "padding": (1, 2)}, [2, 16, 16, 30]),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_explain(options: list[str], arguments: dict, output: list[int], dtype: str, layout: str, capsys) -> None:
    flags = ["--dtype", dtype, "--layout", layout, "--multiplier", "2"]
    assert command.main(["explain", *LAYER, *options, *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"built_with_cuda", "layer", "plans"}
    kernel = [3, 5] if options[0] == "3x5" else [3, 3]
    assert found["layer"]["weight"] == [32, 1, *kernel]
    assert found["layer"]["output"] == [2, 32, *output[2:]]

    x = torch.empty(2, 16, 32, 30, device="meta", dtype=getattr(torch, dtype))
    x = x.contiguous(memory_format=command.LAYOUTS[layout])
    explanation = dwconv.explain(x, x.new_empty(32, 1, *kernel), None, **arguments)
    assert found["plans"] == {name: getattr(explanation, name)._asdict() for name in command.PASSES}

    assert command.main(["--json", "explain", *LAYER, *options, *flags]) == 0  # before the command just as well
    assert json.loads(capsys.readouterr().out) == found
    assert command.main(["explain", *LAYER, *options, *flags]) == 0
    assert str(explanation) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: N, C, H, W, K"),
        (LAYER, "required: K"),
        (["0", *LAYER[1:], "3"], "argument N: expected a whole number, at least 1, but got '0'"),
        ([*LAYER, "0x3"], "argument K"),
        ([*LAYER, "three"], "argument K"),
        ([*LAYER, "3x3x3"], "HEIGHTxWIDTH"),
        ([*LAYER, "33"], "Kernel size can't be greater than actual input size"),
        ([*LAYER, "3", "--stride=0"], "argument --stride"),
        ([*LAYER, "3", "--padding=-1"], "argument --padding"),
        ([*LAYER, "3", "--padding=reflect"], "argument --padding"),
        ([*LAYER, "3", "--padding=same", "--stride=2"], "padding='same' is not supported for strided"),
        ([*LAYER, "3", "--dilation=1e3"], "argument --dilation"),
        ([*LAYER, "3", "--multiplier=0"], "argument --multiplier"),
        ([*LAYER, "3", "--dtype=int8"], "argument --dtype"),
        ([*LAYER, "3", "--layout=NHWC"], "argument --layout"),
        ([str(2**31 - 1)] * 4 + ["3"], "overflow"),
        ([str(2**40), *LAYER[1:], "3"], "argument N"),
    ],
)
def test_explain_refuses(arguments: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        command.main(["explain", *arguments])
    streams = capsys.readouterr()
    assert exit.value.code == 2
    assert streams.out == ""
    assert said in streams.err.splitlines()[-1] and streams.err.splitlines()[-1].startswith("python -m dwconv explain:")


def test_exit_code_of_bad_arguments(tmp_path: Path) -> None:
    result = run(tmp_path, "explian")
    assert result.returncode == 2 and result.stdout == ""
    assert "invalid choice: 'explian'" in result.stderr
