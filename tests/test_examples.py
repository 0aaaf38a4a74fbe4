"""The examples run, tell right from wrong, and every snippet of the README does what it says."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import dwconv

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
README = (ROOT / "README.md").read_text()


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drop_in() -> ModuleType:
    return load("drop_in")


@pytest.fixture(scope="module")
def train_digits() -> ModuleType:
    return load("train_digits")


def run(name: str, *arguments: str) -> subprocess.CompletedProcess:
    """The example in a process of its own, on one thread: of such small tensors more are only in each other's way."""
    return subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *arguments],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


# drop_in.py

SMALL = ["--batch", "2", "--channels", "8", "--height", "20", "--width", "13"]


def test_drop_in_runs(device: str) -> None:
    done = run("drop_in", *SMALL, "--kernel", "3", "5", "--padding", "1", "2", "--separable", "--device", device)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(2, 8, 20, 13) float32" in done.stdout and "The results are equal to rounding." in done.stdout
    for name in ("output", "grad of x", "grad of 0.conv2d.weight", "grad of 1.weight", "forward + backward"):
        assert re.search(rf"^{re.escape(name)} +\d", done.stdout, re.MULTILINE), name
    assert "DepthwiseConv2d(8, kernel_size=(3, 5)" in done.stdout


@pytest.mark.parametrize("layout", [[], ["--channels-last"]], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--kernel", "3", "--padding", "1", "--bias"],
        ["--kernel", "1", "7", "--padding", "0", "3", "--stride", "2", "1"],
        ["--kernel", "5", "3", "--stride", "2", "--bias", "--separable"],
    ],
    ids=["default", "bias", "rectangular", "separable"],
)
def test_drop_in_is_right(
    drop_in: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    dtype: str,
    layout: list[str],
    device: str,
) -> None:
    monkeypatch.setattr(drop_in, "medians", lambda calls, device: [call() or 1.0 for call in calls])
    assert drop_in.main([*SMALL, *arguments, *layout, "--dtype", dtype, "--device", device]) == 0


def test_drop_in_keeps_the_original_interface(drop_in: ModuleType) -> None:
    assert drop_in.get_init_inputs() == [64, 3, 1, 0, False]
    with torch.device("meta"):
        assert [x.shape for x in drop_in.get_inputs()] == [(16, 64, 512, 512)]
    models = []
    for kind in (drop_in.Model, drop_in.ModelNew):
        torch.manual_seed(0)
        models.append(kind(*drop_in.get_init_inputs()))
    original, new = models
    assert type(new.conv2d) is dwconv.DepthwiseConv2d and type(original.conv2d) is nn.Conv2d
    assert original.state_dict().keys() == new.state_dict().keys() == {"conv2d.weight"}
    assert torch.equal(original.conv2d.weight, new.conv2d.weight)
    original.load_state_dict(new.state_dict(), strict=True)
    new.load_state_dict(original.state_dict(), strict=True)


class Wrong(nn.Module):
    """A depthwise layer with a mistake."""

    def __init__(self, channels: int, *arguments: object, mistake: str = "") -> None:
        super().__init__()
        self.conv2d = dwconv.DepthwiseConv2d(channels, *arguments)
        self.mistake = mistake
        if mistake == "a product":  # in a single product of the millions of the weight's gradient
            self.conv2d.weight.register_hook(lambda grad: grad + torch.eye(1, grad.numel()).view_as(grad))

    def forward(self, x: Tensor) -> Tensor:
        if self.mistake == "tf32":
            x = x.half().to(x.dtype)  # as many bits
        y = self.conv2d(x)
        if self.mistake == "a row":
            y = torch.cat([y[:, :, :-1], torch.zeros_like(y[:, :, -1:])], 2)
        if self.mistake == "nan":
            spot = torch.zeros_like(y)
            spot[-1, -1, -1, -1] = float("nan")
            y = y + spot
        if self.mistake == "the gradient":
            y = y.detach() + (y - y.detach()) * (1 + 1e-4)
        return y


@pytest.mark.parametrize(
    "mistake, wrong",
    [
        ("", set()),
        ("tf32", {"output", "grad of x", "grad of conv2d.weight"}),
        ("a row", {"output", "grad of x", "grad of conv2d.weight", "grad of conv2d.bias"}),
        ("nan", {"output"}),
        ("the gradient", {"grad of x", "grad of conv2d.weight", "grad of conv2d.bias"}),
        ("a product", {"grad of conv2d.weight"}),
    ],
)
def test_drop_in_finds_mistakes(drop_in: ModuleType, mistake: str, wrong: set[str]) -> None:
    models = []
    for kind, more in ((drop_in.Model, {}), (Wrong, {"mistake": mistake})):
        torch.manual_seed(0)
        models.append(kind(4, 3, 1, 1, True, **more))
    comparisons = drop_in.compare(*models, torch.rand(2, 4, 33, 40))
    assert {c.name for c in comparisons if not c.is_equal} == wrong


def test_drop_in_fails_on_a_mistake(
    drop_in: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class Unlike(drop_in.ModelNew):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.0001

    monkeypatch.setattr(drop_in, "ModelNew", Unlike)
    assert drop_in.main([*SMALL, "--device", "cpu"]) == 1
    out, error = capsys.readouterr()
    assert "WRONG" in out and "differ by more than rounding" in error and "equal" not in out


def test_drop_in_refuses_other_sizes(drop_in: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"expected an output of size \(1, 4, 6, 6\), but got \(1, 4, 8, 8\)"):
        drop_in.compare(drop_in.Model(4, 3), drop_in.ModelNew(4, 3, padding=1), torch.rand(1, 4, 8, 8))


@pytest.mark.parametrize("arguments", [["--kernel", "1", "2", "3"], ["--dtype", "int8"], ["--kernel", "x"]])
def test_drop_in_refuses_bad_arguments(drop_in: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        drop_in.parse(arguments)
    assert end.value.code == 2


# train_digits.py


def test_train_digits_runs(tmp_path: Path, device: str) -> None:
    """As a user runs it: the accuracy it promises is reached."""
    done = run("train_digits", "--device", device, "--output", str(tmp_path / "figure.png"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"DepthwiseConv2d (0\.\d+), nn\.Conv2d (0\.\d+)\.", done.stdout)
    assert min(float(found[1]), float(found[2])) >= 0.97
    assert "100%" in done.stderr and "FAILED" not in done.stderr
    figure = (tmp_path / "figure.png").read_bytes()
    assert figure.startswith(b"\x89PNG") and len(figure) > 20_000


QUICK = ["--epochs", "1", "--accuracy", "0", "--device", "cpu", "--output"]


def test_train_digits_fails_below_the_accuracy(
    train_digits: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    figure = str(tmp_path / "figure.png")
    assert train_digits.main([*QUICK, figure]) == 0
    assert train_digits.main([*QUICK, figure, "--accuracy", "1.1"]) == 1
    assert "FAILED: an accuracy is below 1.1." in capsys.readouterr().err


def _without_a_tap_of_the_gradient(layer: nn.Module) -> None:
    layer.weight.register_hook(lambda grad: grad * torch.ones(3, 3).index_fill(1, torch.tensor([0]), 0))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda layer: setattr(layer, "padding_mode", "replicate"),
        lambda layer: layer.register_forward_hook(lambda module, arguments, output: output * float("nan")),
        _without_a_tap_of_the_gradient,
    ],
    ids=["border", "nan", "gradient"],
)
def test_train_digits_fails_on_a_mistake(
    train_digits: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture, spoil
) -> None:
    right = train_digits.dwconv_layer

    def wrong(channels: int, stride: int) -> nn.Module:
        layer = right(channels, stride)
        spoil(layer)
        return layer

    monkeypatch.setattr(train_digits, "dwconv_layer", wrong)
    assert train_digits.main([*QUICK, str(tmp_path / "figure.png")]) == 1
    assert "FAILED: the losses differ by more than rounding." in capsys.readouterr().err


def test_train_digits_depends_on_the_seed_alone(train_digits: ModuleType) -> None:
    data = train_digits.digits(torch.device("cpu"))
    runs = [train_digits.train(train_digits.dwconv_layer, data, 1, seed, "") for seed in (1, 1, 2)]
    assert runs[0].losses == runs[1].losses != runs[2].losses


# train_ddp.py


def test_train_ddp(device: str) -> None:
    """By torchrun on two processes, and alone: the losses are the same."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("fewer than two GPUs")
    starts = [], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["--epochs", "2", "--accuracy", "0.5", "--device", device]
    losses = []
    for processes, start in enumerate(starts, 1):
        command = [sys.executable, *start, EXAMPLES / "train_ddp.py", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(dwconv.__file__).parent.parent)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{processes} processes on {device}: test accuracy" in done.stdout
        losses.append([float(loss) for loss in re.findall(r"^epoch \d+: loss ([\d.]+)$", done.stdout, re.MULTILINE)])
    assert len(losses[0]) == 2 and losses[0][1] < losses[0][0] / 2
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_train_ddp_fails_below_the_accuracy() -> None:
    done = run("train_ddp", "--epochs", "1", "--accuracy", "1.1", "--device", "cpu")
    assert done.returncode == 1 and "FAILED: the accuracy is below 1.1." in done.stderr


# README.md


def test_readme_snippets(capsys: pytest.CaptureFixture) -> None:
    """In order, in one namespace, as a reader would type them."""
    snippets = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(snippets) >= 4
    namespace: dict[str, object] = {"__name__": "readme"}
    for snippet in snippets:
        line = README[: README.index(snippet)].count("\n")
        exec(compile("\n" * line + snippet, str(ROOT / "README.md"), "exec"), namespace)
    assert "stream_nchw" in capsys.readouterr().out


def test_readme_names_files_that_exist() -> None:
    for path in re.findall(r"\b(?:examples|tests|dwconv|csrc|benchmarks|docs)/[\w./-]*\w", README):
        assert (ROOT / path).exists() or path == "tests/gpu_report.json", path
    for path in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
