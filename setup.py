"""Builds dwconv._C: the operators for CPU tensors, and for CUDA tensors where a CUDA toolkit is found.

Environment variables:
    DWCONV_CUDA           1: a missing toolkit is an error; 0: build without CUDA; unset: build what is possible.
    TORCH_CUDA_ARCH_LIST  the GPU architectures, as in every torch extension. Unset: that of the GPU present,
                          or else 8.0;9.0+PTX.
    CUDA_HOME             the toolkit. Unset: asked of nvcc, or looked for in the conventional places.
    MAX_JOBS              how many files are compiled at a time.
"""

import atexit
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"
MISSING_TOOLKIT = (
    "no usable CUDA toolkit was found: nvcc, its headers (cuda_runtime.h) and libcudart are needed. "
    "Install the CUDA toolkit (https://developer.nvidia.com/cuda-downloads) or point CUDA_HOME at it"
)


def nvcc_home(nvcc: str) -> Path | None:
    """The toolkit that an nvcc belongs to, by its own word: it may be a wrapper script far from the toolkit."""
    try:
        said = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    except OSError:
        return None
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return Path(top[1]).resolve() if top else None


def is_toolkit(home: Path) -> bool:
    libraries = [path for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
                 for path in (home / folder).glob("libcudart*")]
    headers = [*home.glob("include/cuda_runtime.h"), *home.glob("targets/*/include/cuda_runtime.h")]
    return (home / "bin" / "nvcc").exists() and bool(headers) and bool(libraries)


def find_toolkit() -> Path | None:
    """The first complete CUDA toolkit among: the environment's, the one of nvcc on PATH, the conventional places."""
    said = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if said:  # the user's word counts alone
        return next((Path(home) for home in said if is_toolkit(Path(home))), None)
    nvcc = shutil.which("nvcc")
    candidates = [nvcc_home(nvcc) if nvcc else None, Path("/usr/local/cuda"), Path("/opt/cuda")]
    candidates += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    return next((home for home in candidates if home and is_toolkit(home)), None)


def wanted_toolkit() -> Path | None:
    choice = os.environ.get("DWCONV_CUDA", "").strip()
    if choice not in ("", "0", "1"):
        sys.exit(f"dwconv: DWCONV_CUDA must be 0, 1 or unset, but got DWCONV_CUDA={choice}")
    if choice == "0":
        return None
    toolkit = find_toolkit()
    if toolkit is None and choice == "1":
        sys.exit(f"dwconv: DWCONV_CUDA=1, but {MISSING_TOOLKIT}.")
    return toolkit


def warn_without_cuda() -> None:
    why = "DWCONV_CUDA=0" if os.environ.get("DWCONV_CUDA", "").strip() == "0" else MISSING_TOOLKIT
    bar = "*" * 100
    print(f"\n{bar}\ndwconv was built WITHOUT CUDA: it serves CPU tensors only.\nReason: {why}.\n{bar}", file=sys.stderr)


toolkit = wanted_toolkit()
if toolkit is not None:
    os.environ["CUDA_HOME"] = str(toolkit)  # torch reads it when cpp_extension is imported

import pybind11  # noqa: E402
import torch  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402


def version() -> str:
    return re.search(r'__version__ = "(.+)"', (ROOT / "dwconv" / "_version.py").read_text())[1]


def toolkit_version(home: Path) -> str:
    said = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", said)[1]


def architectures() -> str:
    said = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if said:
        return said
    if torch.cuda.is_available():
        present = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return ";".join(f"{major}.{minor}" for major, minor in sorted(present))
    return DEFAULT_ARCHITECTURES


def extension():
    define = {
        "TORCH_TARGET_VERSION": "0x020b000000000000",  # torch 2.11: one binary for every release from there on
        "DWCONV_VERSION": f'"{version()}"',
        "DWCONV_TORCH_VERSION": f'"{torch.__version__}"',
        "DWCONV_CUDA_ARCHITECTURES": '""',
    }
    sources = ["library", "cpu", "conv2d", "plan", "python"]
    kernels = []
    if toolkit is not None:
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
        define["DWCONV_CUDA_VERSION"] = f'"{toolkit_version(toolkit)}"'
        define["DWCONV_CUDA_ARCHITECTURES"] = f'"{architectures()}"'
        sources.append("cuda")
        kernels = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "kernels").glob("*.cu"))
    built = (CppExtension if toolkit is None else CUDAExtension)(
        "dwconv._C",
        sources=[f"csrc/{name}.cpp" for name in sources] + kernels,
        include_dirs=[pybind11.get_include()],
        define_macros=list(define.items()),
        depends=[str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*h")],
        extra_compile_args={
            "cxx": ["-O3", "-fvisibility=hidden", "-Wall"],
            "nvcc": ["-O3", "-Xcompiler", "-fvisibility=hidden", "--threads", "2"],
        },
    )
    # Of torch only the C shim (libtorch_cpu; libtorch brings libtorch_cuda where there is one), and CUDA's runtime
    # inside: the binary then loads under any build of torch, with any version of CUDA or none. Some linkers drop
    # libtorch, of which no symbol is used directly, unless told.
    libraries = ["torch", "torch_cpu"] + ([] if toolkit is None else ["cudart_static", "dl", "rt", "pthread"])
    built.libraries = []
    built.extra_link_args = ["-Wl,--no-as-needed", *(f"-l{name}" for name in libraries), "-Wl,--strip-debug"]
    built.runtime_library_dirs = []
    return built


if toolkit is None:
    atexit.register(warn_without_cuda)

setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
