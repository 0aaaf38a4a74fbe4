"""What is shipped and how it is built: the binary, sdist and wheel, the build's choices, the import, the types."""

from __future__ import annotations

import ast
import email
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

import dwconv
from dwconv import _C

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(dwconv.__file__).resolve().parent
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

needs_sources = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source tree")


def run(*command: object, cwd: Path, fails: bool = False, **environment: object) -> str:
    """What a command says. Variables that are None are unset; this checkout is not importable by chance."""
    variables = {**os.environ, "PYTHONPATH": None, **environment}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={name: str(value) for name, value in variables.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (result.returncode != 0) == fails, result.stdout
    return result.stdout


def run_python(code: str, *path: Path, cwd: Path, fails: bool = False) -> str:
    return run(sys.executable, "-c", code, cwd=cwd, fails=fails, PYTHONPATH=os.pathsep.join(map(str, path)))


# -------------------------------------------------------------------------------------------- built without CUDA


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, as a fresh checkout has it."""
    artefacts = ("build", "dist", "__pycache__", "*.egg-info", "*.so", "*.whl")

    def ignore(_: str, names: list[str]) -> list[str]:
        hidden = [name for name in names if name.startswith(".") and name != ".clang-format"]
        return hidden + [name for name in names if any(fnmatch(name, pattern) for pattern in artefacts)]

    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tree", ignore=ignore))


class Built(NamedTuple):
    log: str
    sdist: list[str]  # the names of the files
    wheel: list[str]
    filename: str
    site: Path  # what the wheel installs


@pytest.fixture(scope="session")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An sdist of the tree, and a wheel without CUDA of the unpacked sdist."""
    for module in ("build", "pybind11", "setuptools"):
        pytest.importorskip(module)
    if not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("needs a compiler")
    folder = tmp_path_factory.mktemp("dist")
    log = run(
        *(sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", folder, tree),
        cwd=folder,
        DWCONV_CUDA="0",
    )
    [sdist], [wheel] = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tarfile.open(sdist) as archive:
        members = [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
        return Built(log, members, archive.namelist(), wheel.name, folder / "site")


@needs_sources
def test_sdist_holds_what_is_built_and_tested(built: Built, tree: Path) -> None:
    folders = [name for name in ("benchmarks", "csrc", "dwconv", "examples", "tests") if (tree / name).is_dir()]
    expected = [str(path.relative_to(tree)) for name in folders for path in (tree / name).rglob("*") if path.is_file()]
    expected += ["LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"]
    assert {"csrc/conv2d.cpp", "csrc/conv2d.h", "dwconv/_C.pyi", "dwconv/py.typed"} <= set(expected)
    assert {Path(name).suffix for name in expected} >= {".cpp", ".h", ".cu", ".cuh", ".py"}
    assert [name for name in expected if name not in built.sdist] == []
    assert [name for name in built.sdist if name.endswith((".so", ".pyc", ".o", ".whl"))] == []


@needs_sources
def test_wheel_holds_the_package_alone(built: Built, tree: Path) -> None:
    metadata = f"dwconv-{dwconv.__version__}.dist-info"
    installed = {name for name in built.wheel if not name.startswith(metadata)}
    sources = {f"dwconv/{path.name}" for path in (tree / "dwconv").iterdir() if path.is_file()}
    assert {"dwconv/py.typed", "dwconv/_C.pyi", "dwconv/__init__.py"} <= sources
    assert installed == sources | {f"dwconv/_C{EXT_SUFFIX}"}
    assert f"{metadata}/licenses/LICENSE" in built.wheel
    tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert fnmatch(built.filename, f"dwconv-{dwconv.__version__}-cp*-cp*-{tag}.whl")


@needs_sources
def test_metadata(built: Built) -> None:
    metadata = email.message_from_string(
        (built.site / f"dwconv-{dwconv.__version__}.dist-info" / "METADATA").read_text()
    )
    assert (metadata["Name"], metadata["Version"]) == ("dwconv", dwconv.__version__)
    assert metadata["Requires-Python"] == ">=3.10"
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert needed == ["torch>=2.11"]  # and no other package


@needs_sources
def test_build_without_cuda_says_so(built: Built) -> None:
    says = "dwconv was built WITHOUT CUDA: it serves CPU tensors only.\nReason: DWCONV_CUDA=0."
    assert built.log.count(says) == 1  # where the binary is built, and not for the sdist or the metadata
    after = built.log.partition(says)[2].strip().splitlines()
    assert len(after) <= 2, after  # a bar, and that all went well


@needs_sources
def test_built_without_cuda(built: Built, tmp_path: Path) -> None:
    code = """
        import torch, dwconv
        from torch.nn.functional import conv2d
        print(dwconv.__file__)
        info = dwconv._C.build_info()
        wanted = {"version": dwconv.__version__, "cuda": None, "cuda_architectures": "", "torch": torch.__version__}
        assert info == wanted, info
        x, w = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(8, 1, 3, 3)
        y = dwconv.conv2d(x, w, padding=1)
        assert torch.allclose(y, conv2d(x, w, padding=1, groups=4), atol=1e-5)
        y.sum().backward()
        # What CUDA tensors meet, without any.
        cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        geometry = [1, 1], [0, 0], [1, 1]
        for op, arguments in {
            dwconv._ops.forward: (x, w, None, *geometry),
            dwconv._ops.grad_input: (y, w, x.shape, *geometry, False),
            dwconv._ops.grad_weight: (y, x, [3, 3], *geometry, False),
        }.items():
            try:
                op.redispatch(cuda, *arguments)
            except RuntimeError as error:
                print(error)
    """
    file, *errors = run_python(dedent(code), built.site, cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(built.site)
    assert len(errors) == 3
    for error in errors:  # cause and cure
        assert re.search("built without CUDA and cannot serve CUDA tensors.*DWCONV_CUDA=1 pip install", error)


@needs_sources
@pytest.mark.gpu
def test_built_without_cuda_meets_cuda(built: Built, tmp_path: Path) -> None:
    code = """
        import torch, dwconv
        x, w = torch.randn(2, 4, 8, 8, device="cuda"), torch.randn(8, 1, 3, 3, device="cuda")
        dwconv.conv2d(x, w)
    """
    says = run_python(dedent(code), built.site, cwd=tmp_path, fails=True)
    assert "RuntimeError: dwconv was built without CUDA and cannot serve CUDA tensors" in says


# --------------------------------------------------------------------------------------------------- the binary


class Binary(NamedTuple):
    """What a shared library asks of the loader."""

    undefined: list[str]  # symbols
    needed: list[str]  # libraries
    search: list[str]  # RPATH and RUNPATH


def read_binary(path: Path) -> Binary:
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", "64 bits, little endian"
    offset, size, count = (*struct.unpack_from("<Q", data, 0x28), *struct.unpack_from("<HH", data, 0x3A))
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + i * size) for i in range(count)]

    def entries(kind: int, layout: str) -> list[tuple]:
        """The entries of a section, each with a function that reads the strings it points to."""
        [(_, _, _, _, start, length, link, *_)] = [section for section in sections if section[1] == kind]
        strings = sections[link][4]

        def text(at: int) -> str:
            return data[strings + at : data.index(b"\0", strings + at)].decode()

        return [(text, *entry) for entry in struct.iter_unpack(layout, data[start : start + length])]

    undefined = [text(name) for text, name, _, _, section, _, _ in entries(11, "<IBBHQQ") if section == 0]
    dynamic = entries(6, "<qQ")
    return Binary(
        undefined=list(filter(None, undefined)),
        needed=[text(value) for text, tag, value in dynamic if tag == 1],
        search=[text(value) for text, tag, value in dynamic if tag in (15, 29)],
    )


@pytest.fixture(params=["loaded", pytest.param("built", marks=needs_sources)])
def binary(request: pytest.FixtureRequest) -> Path:
    if request.param == "loaded":
        return Path(_C.__file__)
    return request.getfixturevalue("built").site / "dwconv" / f"_C{EXT_SUFFIX}"


def test_binary_uses_only_torchs_c_shim(binary: Path) -> None:
    undefined = read_binary(binary).undefined
    assert {"aoti_torch_get_sizes", "torch_call_dispatcher", "PyErr_SetString"} <= set(undefined)
    # Itanium C++ names: N2at6TensorE is at::Tensor, NK3c106Device4typeEv is c10::Device::type() const.
    assert [name for name in undefined if re.search(r"N[rVK]*[RO]?(2at|3c10|5torch)\d", name)] == []
    assert [name for name in undefined if re.match(r"cu[A-Z]|cuda[A-Z]|cudnn|cublas", name)] == []


def test_binary_needs_only_torch_and_the_system(binary: Path) -> None:
    needed, search = read_binary(binary)[1:]
    system = re.compile(r"(lib(stdc\+\+|m|gcc_s|c|dl|rt|pthread)|ld-linux-.+)\.so\.\d+")
    assert {name for name in needed if not system.fullmatch(name)} == {"libtorch.so", "libtorch_cpu.so"}
    assert [path for part in search for path in part.split(":") if not path.startswith("$ORIGIN")] == []


@needs_sources
def test_binary_holds_no_path_of_the_machine_it_was_built_on(built: Built) -> None:
    data = (built.site / "dwconv" / f"_C{EXT_SUFFIX}").read_bytes()
    assert b"csrc/cpu.cpp" in data  # of a message
    assert re.search(rb"[\x20-\x7e]*/[\x20-\x7e]*csrc/cpu.cpp", data) is None


def test_stub_is_of_the_binary() -> None:
    stub = ast.parse((PACKAGE / "_C.pyi").read_text())
    typed = {node.name: [argument.arg for argument in node.args.args] for node in stub.body if hasattr(node, "args")}
    signatures = {name: getattr(_C, name).__doc__.splitlines()[0] for name in dir(_C) if not name.startswith("_")}
    # Functions of the C API tell no names; the stub has theirs as by position, or by keyword, alone.
    named = {name: signature if signature.startswith(f"{name}(") else "" for name, signature in signatures.items()}
    assert typed == {name: re.findall(r"(\w+): ", signature) for name, signature in named.items()}


def test_build_info() -> None:
    info = _C.build_info()
    assert info.keys() == {"version", "cuda", "cuda_architectures", "torch"}
    assert info["version"] == dwconv.__version__  # else the binary is older than the Python files
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", info["version"])
    assert info["cuda"] is None or re.fullmatch(r"\d+\.\d+", info["cuda"])
    assert (info["cuda"] is None) == (info["cuda_architectures"] == "")
    assert re.match(r"2\.\d+|[3-9]\.", info["torch"])


def test_version_is_the_metadatas() -> None:
    try:
        distribution = importlib.metadata.distribution("dwconv")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("dwconv is not installed")
    assert distribution.version == dwconv.__version__


# ------------------------------------------------------------------------------------------- the build's choices


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py, of which nothing has run, in an environment that says nothing."""
    pytest.importorskip("setuptools")
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree")
    for name in ("CUDA_HOME", "CUDA_PATH", "DWCONV_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", os.defpath)
    spec = importlib.util.spec_from_file_location("dwconv_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def make_toolkit(home: Path, include: str = "include", library: str = "lib64", says_top: bool = True) -> Path:
    """As much of a CUDA toolkit as a look at it takes."""
    write_script(home / "bin" / "nvcc", f"echo '#$ TOP={home}/bin/..' >&2\n" if says_top else "")
    for path in (home / include / "cuda_runtime.h", home / library / "libcudart_static.a"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return home


PARTS = ["bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a"]


def test_nvcc_on_path_leads_to_its_toolkit(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_toolkit(tmp_path / "toolkit")
    write_script(tmp_path / "local" / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"\n')
    monkeypatch.setenv("PATH", f"{tmp_path}/local/bin")
    assert setup_py.find_toolkit() == home.resolve()
    assert setup_py.wanted_toolkit() == home.resolve()
    monkeypatch.setenv("DWCONV_CUDA", "0")
    assert setup_py.wanted_toolkit() is None


@pytest.mark.parametrize(
    "layout",
    [
        {"library": "lib/x86_64-linux-gnu"},  # Debian's package, in /usr
        {"include": "targets/x86_64-linux/include", "library": "targets/x86_64-linux/lib"},  # conda's
        {"include": "targets/sbsa-linux/include", "library": "targets/sbsa-linux/lib"},
        {"library": "lib"},
    ],
    ids=str,
)
def test_toolkit_around_an_nvcc_of_few_words(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: dict[str, str]
) -> None:
    home = make_toolkit(tmp_path / "toolkit", says_top=False, **layout)
    monkeypatch.setenv("PATH", f"{home}/bin")
    assert setup_py.find_toolkit() == home


@pytest.mark.parametrize("part", PARTS)
def test_incomplete_toolkit_is_refused(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    home = make_toolkit(tmp_path / "toolkit")
    assert setup_py.is_toolkit(home)
    (home / part).unlink()
    assert not setup_py.is_toolkit(home)
    monkeypatch.setenv("PATH", f"{home}/bin")
    assert setup_py.find_toolkit() != home


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_environment_goes_before_nvcc(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("PATH", f"{make_toolkit(tmp_path / 'on_path')}/bin")
    monkeypatch.setenv(name, str(make_toolkit(tmp_path / "said")))
    assert setup_py.find_toolkit() == tmp_path / "said"


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_wrong_environment_is_not_passed_over(
    setup_py: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    monkeypatch.setenv("PATH", f"{make_toolkit(tmp_path / 'on_path')}/bin")
    monkeypatch.setenv(name, f"{tmp_path}/wrong")
    assert setup_py.wanted_toolkit() is None
    setup_py.warn_without_cuda()
    assert f"no usable CUDA toolkit was found at {name}={tmp_path}/wrong:" in capsys.readouterr().err
    monkeypatch.setenv("DWCONV_CUDA", "1")
    with pytest.raises(SystemExit, match=f"{name}={tmp_path}/wrong: it takes nvcc, .*https://developer.nvidia.com"):
        setup_py.wanted_toolkit()


@pytest.mark.parametrize("nvcc", ["exit 1\n", "echo '#$ TOP=/nowhere' >&2\n", "", None], ids=str)
def test_broken_nvcc(setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvcc: str | None) -> None:
    write_script(tmp_path / "bin" / "nvcc", nvcc or "")
    if nvcc is None:
        (tmp_path / "bin" / "nvcc").write_bytes(b"\x7fELF of another machine")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    found = setup_py.find_toolkit()
    assert found is None or setup_py.is_toolkit(found)  # in a conventional place


@pytest.mark.parametrize("name, least", [("setuptools", "77"), ("torch", "2.11"), ("pybind11", "2.13")])
def test_requirements(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, least: str) -> None:
    pytest.importorskip("pybind11")
    setup_py.check_requirements()
    cure = f'pip install .*"{name}>={least}"'
    monkeypatch.setattr(sys.modules[name], "__version__", "2.10.0" if name == "torch" else "2.9.1")
    with pytest.raises(SystemExit, match=f"dwconv: building it needs {name} >= {least}, but found 2[.0-9]+: {cure}"):
        setup_py.check_requirements()
    monkeypatch.setitem(sys.modules, name, None)  # not installed
    with pytest.raises(SystemExit, match=f"dwconv: building it needs {name} >= {least}, but found none: {cure}"):
        setup_py.check_requirements()


@pytest.mark.parametrize("choice", ["foo", "2", "yes", "01"])
def test_unknown_choice(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    monkeypatch.setenv("DWCONV_CUDA", choice)
    with pytest.raises(SystemExit, match=f"must be 0, 1 or unset, but got DWCONV_CUDA={choice}"):
        setup_py.wanted_toolkit()


def test_architectures(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert setup_py.architectures() == "8.0;9.0+PTX"
    gpus = [(9, 0), (8, 6), (9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
    assert setup_py.architectures() == "8.6;9.0"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.0+PTX")
    assert setup_py.architectures() == "7.5 8.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    assert setup_py.architectures() == "8.6;9.0"


@pytest.mark.parametrize(
    "architectures, flags",
    [
        ("8.0", ["compute_80,code=sm_80"]),
        ("9.0", ["compute_90a,code=sm_90a"]),
        ("9.0;9.0a", ["compute_90a,code=sm_90a"]),
        ("8.6 9.0+PTX", ["compute_86,code=sm_86", "compute_90,code=compute_90", "compute_90a,code=sm_90a"]),
    ],
)
def test_architecture_flags(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, architectures: str, flags: list[str]
) -> None:
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
    found = setup_py.architecture_flags(cpp_extension._get_cuda_arch_flags())
    assert sorted(found) == [f"-gencode=arch={flag}" for flag in flags]


@pytest.mark.parametrize(
    "version, flags",
    [("12.4", ["-Xfatbin", "-compress-all"]), ("13.0", ["--compress-mode=size"]), ("13.2", ["--compress-mode=size"])],
)
def test_compression_flags(setup_py: ModuleType, tmp_path: Path, version: str, flags: list[str]) -> None:
    home = make_toolkit(tmp_path / "toolkit")
    write_script(home / "bin" / "nvcc", f"echo 'Cuda compilation tools, release {version}, V{version}.1'\n")
    assert setup_py.compression_flags(home) == flags


@needs_sources
def test_toolkit_of_another_cuda_than_torchs(tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    home = make_toolkit(tmp_path / "toolkit")
    write_script(home / "bin" / "nvcc", "echo 'Cuda compilation tools, release 99.8, V99.8.7'\n")
    code = """
        import json, runpy, setuptools
        asked = []
        setuptools.setup = lambda **options: asked.append(options)
        runpy.run_path("setup.py", run_name="__main__")
        from torch.utils import cpp_extension
        cpp_extension._check_cuda_version("g++", cpp_extension.TorchVersion("12.0"))
        [extension] = asked[0]["ext_modules"]
        del extension.include_dirs, extension.library_dirs
        print(json.dumps([cpp_extension.CUDA_HOME, vars(extension)]))
    """
    says = run(
        sys.executable, "-c", dedent(code), cwd=tree, DWCONV_CUDA="1", CUDA_HOME=home, TORCH_CUDA_ARCH_LIST="7.5"
    )
    torchs_home, extension = json.loads(says.splitlines()[-1])
    assert torchs_home == str(home)
    kernels = {f"csrc/kernels/{path.name}" for path in (tree / "csrc" / "kernels").glob("*.cu")}
    assert kernels < set(extension["sources"])
    assert set(extension["sources"]) - kernels == {f"csrc/{path.name}" for path in (tree / "csrc").glob("*.cpp")}
    defined = dict(extension["define_macros"])
    assert (defined["DWCONV_CUDA_VERSION"], defined["DWCONV_CUDA_ARCHITECTURES"]) == ('"99.8"', '"7.5"')
    assert "-gencode=arch=compute_75,code=sm_75" in extension["extra_compile_args"]["nvcc"]
    assert "-lcudart_static" in extension["extra_link_args"]
    assert extension["libraries"] == extension["runtime_library_dirs"] == []


@needs_sources
def test_missing_toolkit_stops_the_build(tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("build")
    says = run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--skip-dependency-check", tree),
        cwd=tmp_path,
        fails=True,
        DWCONV_CUDA="1",
        CUDA_HOME=tmp_path,
        CUDA_PATH=None,
        PATH=os.defpath,
    )
    assert f"dwconv: DWCONV_CUDA=1, but no usable CUDA toolkit was found at CUDA_HOME={tmp_path}" in says
    assert "Install the CUDA toolkit (https://developer.nvidia.com/cuda-downloads), or point CUDA_HOME at it" in says


@needs_sources
def test_unknown_choice_stops_the_build(tree: Path) -> None:
    pytest.importorskip("pybind11")
    says = run(sys.executable, "setup.py", "build_ext", cwd=tree, fails=True, DWCONV_CUDA="foo")
    assert says.splitlines()[-1] == "dwconv: DWCONV_CUDA must be 0, 1 or unset, but got DWCONV_CUDA=foo"


# --------------------------------------------------------------------------------------------------- the import


def copy_package(folder: Path, binary: bytes | str | None = None, suffix: str = EXT_SUFFIX) -> Path:
    """The package's Python files in a folder, with another binary; the folder."""
    shutil.copytree(PACKAGE, folder / "dwconv", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if binary is not None:
        (folder / "dwconv" / f"_C{suffix}").write_bytes(binary if isinstance(binary, bytes) else binary.encode())
    return folder


@pytest.mark.parametrize("version", ["2.10.0", "2.9.1+cu128", "1.13.1a0+git1234"])
def test_torch_too_old(tmp_path: Path, version: str) -> None:
    (tmp_path / "old" / "torch").mkdir(parents=True)
    (tmp_path / "old" / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    says = run_python("import dwconv", tmp_path / "old", PACKAGE.parent, cwd=tmp_path, fails=True)
    assert says.splitlines()[-1] == (
        f"ImportError: dwconv {dwconv.__version__} needs torch >= 2.11, but torch {version} is installed: "
        "pip install --upgrade torch"
    )


@pytest.mark.parametrize(
    "binary, suffix, cause",
    [
        (None, EXT_SUFFIX, "No module named 'dwconv._C'"),
        (b"", ".cpython-39-x86_64-linux-gnu.so", "No module named 'dwconv._C'"),  # of another Python
        (b"no library", EXT_SUFFIX, r".*_C\..*\.so: (file too short|invalid ELF header)"),
        (b"\x7fELF" + bytes(1000), EXT_SUFFIX, r".*_C\..*\.so: .*ELF.*"),
    ],
    ids=["missing", "another_python", "broken", "broken_elf"],
)
def test_binary_does_not_load(tmp_path: Path, binary: bytes | None, suffix: str, cause: str) -> None:
    site = copy_package(tmp_path / "site", binary, suffix)
    says = run_python("import dwconv", site, cwd=tmp_path, fails=True)
    expected = (
        rf"ImportError: dwconv \S+ cannot load its compiled part under torch {re.escape(torch.__version__)}: {cause}\. "
        r"Reinstall it for this Python: pip install --force-reinstall --no-deps dwconv; "
        rf"or, if this is its source tree, build it there: pip install .*--editable {re.escape(str(site))}"
    )
    assert re.fullmatch(expected, says.splitlines()[-1]), says


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_cpu_build_of_torch(tmp_path: Path, cuda: str | None) -> None:
    # A stand-in for the binary, which says that it was built with another CUDA than it was.
    stand_in = f"""
        from importlib.machinery import ExtensionFileLoader
        from importlib.util import module_from_spec, spec_from_loader
        binary = module_from_spec(spec_from_loader("_C", ExtensionFileLoader("_C", {_C.__file__!r})))
        binary.__loader__.exec_module(binary)
        globals().update({{name: value for name, value in vars(binary).items() if not name.startswith("__")}})
        build_info = lambda: {{**binary.build_info(), "cuda": {cuda!r}}}
    """
    site = copy_package(tmp_path / "site", dedent(stand_in), ".py")
    code = """
        import warnings
        import torch
        torch.version.cuda = torch.version.hip = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import dwconv
        for warning in caught:
            print(warning.filename, warning.category.__name__, warning.message)
        x, w = torch.ones(1, 2, 3, 3), torch.ones(2, 1, 3, 3)
        assert dwconv.conv2d(x, w).tolist() == [[[[9.0]], [[9.0]]]]
    """
    says = run_python(dedent(code), site, cwd=tmp_path)
    if cuda is None:
        assert says == ""
    else:
        assert says == (
            f"<string> RuntimeWarning dwconv was built with CUDA 13.0, but torch {torch.__version__} is a CPU build: "
            "CPU tensors work, CUDA tensors need a CUDA build of torch (https://pytorch.org/get-started/locally)\n"
        )


def test_import_is_cheap(tmp_path: Path) -> None:
    code = """
        import os, sys, time
        import torch

        def drivers():
            files = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
            return {os.readlink(file) for file in files if os.path.exists(file) and "nvidia" in os.readlink(file)}

        def forbid(event, _):  # network and programs
            if event.startswith(("socket.", "urllib.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix")):
                raise RuntimeError(event)

        before = drivers()
        sys.addaudithook(forbid)
        start = time.perf_counter()
        import dwconv
        print(time.perf_counter() - start)
        assert not torch.cuda.is_initialized()
        assert drivers() == before, drivers()
    """
    seconds = [float(run_python(dedent(code), PACKAGE.parent, cwd=tmp_path)) for _ in range(3)]
    assert min(seconds) < 0.15, seconds


# ---------------------------------------------------------------------------------------------------- the types


@needs_sources
def test_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    says = run(sys.executable, "-m", "mypy", "--cache-dir", tmp_path, cwd=ROOT)
    assert says.startswith("Success"), says
