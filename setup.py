"""Builds dwconv._C: the operators for CPU tensors, and for CUDA tensors where a CUDA toolkit is found.

Environment variables:
    DWCONV_CUDA           1: a missing toolkit is an error; 0: build without CUDA; unset: build what is possible.
    TORCH_CUDA_ARCH_LIST  the GPU architectures, as in every torch extension. Unset: that of the GPU present,
                          or else 8.0;9.0+PTX.
    CUDA_HOME             the toolkit. Unset: asked of nvcc, or looked for in the conventional places.
    MAX_JOBS              how many files are compiled at a time.
"""

from __future__ import annotations

import atexit
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"


def check_requirements() -> None:
    """Says what is missing for a build without isolation: pip then does not look, and imports fail without a cure."""
    [line] = re.findall(r"^requires = (.+)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for name, least in re.findall(r'"(\w+)>=([\d.]+)"', line):
        try:
            found = importlib.import_module(name).__version__
        except ImportError:
            found = "none"
        if numbers(found) < numbers(least):
            requires = " ".join(re.findall(r'".+?"', line))
            sys.exit(f"dwconv: building it needs {name} >= {least}, but found {found}: pip install {requires}")


def numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def nvcc_home(nvcc: str) -> Path | None:
    """The toolkit that an nvcc belongs to, by its own word: it may be a wrapper script far from the toolkit."""
    try:
        command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    except OSError:
        return None
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return Path(top[1]).resolve() if top else None


def is_toolkit(home: Path) -> bool:
    """Whether all that is needed lies there: a package manager may have installed some of it only."""
    headers = [*home.glob("include/cuda_runtime.h"), *home.glob("targets/*/include/cuda_runtime.h")]
    folders = ("lib64", "lib", "lib/*-linux-gnu", "targets/*/lib")
    libraries = [path for folder in folders for path in home.glob(f"{folder}/libcudart_static.a")]
    return (home / "bin" / "nvcc").exists() and bool(headers) and bool(libraries)


def find_toolkit() -> Path | None:
    """The first complete CUDA toolkit among: the environment's, the one of nvcc on PATH, the conventional places."""
    said = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if said:  # the user's word counts alone
        return next((Path(home) for home in said if is_toolkit(Path(home))), None)
    nvcc = shutil.which("nvcc")
    candidates = [nvcc_home(nvcc), Path(nvcc).parent.parent] if nvcc else []
    candidates += [Path("/usr/local/cuda"), Path("/opt/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    return next((home for home in candidates if home and is_toolkit(home)), None)


def missing_toolkit() -> str:
    said = [f"{name}={os.environ[name]}" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    where = f" at {' or '.join(said)}" if said else ""
    return (
        f"no usable CUDA toolkit was found{where}: it takes nvcc, its headers (cuda_runtime.h) and libcudart_static.a. "
        "Install the CUDA toolkit (https://developer.nvidia.com/cuda-downloads), or point CUDA_HOME at it"
    )


def wanted_toolkit() -> Path | None:
    choice = os.environ.get("DWCONV_CUDA", "").strip()
    if choice not in ("", "0", "1"):
        sys.exit(f"dwconv: DWCONV_CUDA must be 0, 1 or unset, but got DWCONV_CUDA={choice}")
    if choice == "0":
        return None
    toolkit = find_toolkit()
    if toolkit is None and choice == "1":
        sys.exit(f"dwconv: DWCONV_CUDA=1, but {missing_toolkit()}. DWCONV_CUDA=0 builds for the CPU alone.")
    return toolkit


def warn_without_cuda() -> None:
    why = "DWCONV_CUDA=0" if os.environ.get("DWCONV_CUDA", "").strip() == "0" else missing_toolkit()
    bar = "*" * 100
    print(
        f"\n{bar}\ndwconv was built WITHOUT CUDA: it serves CPU tensors only.\nReason: {why}.\n{bar}", file=sys.stderr
    )


def version() -> str:
    return re.search(r'__version__ = "(.+)"', (ROOT / "dwconv" / "_version.py").read_text())[1]


def toolkit_version(home: Path) -> str:
    said = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", said)[1]


def architectures() -> str:
    said = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if said:
        return said
    import torch

    if torch.cuda.is_available():
        present = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return ";".join(f"{major}.{minor}" for major, minor in sorted(present))
    return DEFAULT_ARCHITECTURES


def architecture_flags(flags: list[str]) -> list[str]:
    """For nvcc: code for sm_90 becomes code for sm_90a, which runs on the same GPUs and alone has wgmma."""
    plain, full = "arch=compute_90,code=sm_90", "arch=compute_90a,code=sm_90a"
    return list(dict.fromkeys(flag.replace(plain, full) for flag in flags))


def compression_flags(home: Path) -> list[str]:
    """For nvcc: code in a quarter of the space, unpacked within milliseconds when a file's first kernel runs."""
    # The denser way asks for no later driver than all programs of CUDA 13.
    is_13 = numbers(toolkit_version(home)) >= [13, 0]
    return ["--compress-mode=size"] if is_13 else ["-Xfatbin", "-compress-all"]


def main() -> None:
    check_requirements()
    toolkit = wanted_toolkit()

    import pybind11
    import torch
    from torch.utils import cpp_extension

    define = {
        "TORCH_TARGET_VERSION": "0x020b000000000000",  # torch 2.11: one binary for every release from there on
        "DWCONV_VERSION": f'"{version()}"',
        "DWCONV_TORCH_VERSION": f'"{torch.__version__}"',
        "DWCONV_CUDA_ARCHITECTURES": '""',
    }
    host = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp"))
    sources = [name for name in host if name != "csrc/cuda.cpp"]
    # Of torch only the C shim (libtorch_cpu; libtorch brings libtorch_cuda where there is one), and CUDA's runtime
    # inside: the binary then loads under any build of torch, with any version of CUDA or none.
    libraries = ["torch", "torch_cpu"]
    if toolkit is not None:
        # The toolkit need not be of torch's CUDA version, nor torch a CUDA build: neither's libraries are linked.
        cpp_extension.CUDA_HOME = str(toolkit)
        cpp_extension._check_cuda_version = lambda *_: None
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
        define["DWCONV_CUDA_VERSION"] = f'"{toolkit_version(toolkit)}"'
        define["DWCONV_CUDA_ARCHITECTURES"] = f'"{architectures()}"'
        sources += ["csrc/cuda.cpp", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/kernels/*.cu"))]
        libraries += ["cudart_static", "dl", "rt", "pthread"]

    nvcc = ["-O3", "-Xcompiler", "-fvisibility=hidden", "--threads", "2"]
    if toolkit is not None:
        nvcc += architecture_flags(cpp_extension._get_cuda_arch_flags()) + compression_flags(toolkit)

    class Build(cpp_extension.BuildExtension):
        def run(self) -> None:
            super().run()
            if toolkit is None:
                atexit.register(warn_without_cuda)  # the last word, after all that setuptools has to say

    extension = (cpp_extension.CppExtension if toolkit is None else cpp_extension.CUDAExtension)(
        "dwconv._C",
        sources=sources,
        include_dirs=[pybind11.get_include()],
        define_macros=list(define.items()),
        depends=[str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*h")],
        extra_compile_args={
            "cxx": ["-O3", "-fvisibility=hidden", "-Wall", f"-ffile-prefix-map={ROOT}/="],
            "nvcc": nvcc,
        },
    )
    # Some linkers drop libtorch, of which no symbol is used directly, unless told.
    extension.extra_link_args = ["-Wl,--no-as-needed", *(f"-l{name}" for name in libraries), "-Wl,--strip-debug"]
    extension.libraries = []
    extension.runtime_library_dirs = []
    setup(ext_modules=[extension], cmdclass={"build_ext": Build})


if __name__ == "__main__":
    main()
