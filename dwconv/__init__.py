"""Depthwise 2-D convolution for PyTorch: ``F.conv2d(..., groups=C)``, faster.

>>> y = dwconv.conv2d(x, weight, bias, padding=1)      # a function
>>> layer = dwconv.DepthwiseConv2d(64, 3, padding=1)   # a module
>>> dwconv.convert(model)                              # a whole model, in place
>>> print(dwconv.explain(x, weight))                   # which kernel serves a call
"""

import os as _os
import re as _re
import warnings as _warnings

import torch as _torch

from ._version import __version__

_OLDEST_TORCH = (2, 11)

_found = _re.match(r"(\d+)\.(\d+)", _torch.__version__)
if _found and (int(_found[1]), int(_found[2])) < _OLDEST_TORCH:
    raise ImportError(
        f"dwconv {__version__} needs torch >= {_OLDEST_TORCH[0]}.{_OLDEST_TORCH[1]}, but torch {_torch.__version__} is "
        "installed: pip install --upgrade torch"
    )

try:
    from ._C import build_info as _build_info
except ImportError as _error:
    _folder = _os.path.dirname(_os.path.dirname(__file__))
    raise ImportError(
        f"dwconv {__version__} cannot load its compiled part under torch {_torch.__version__}: {_error}. Reinstall it "
        "for this Python: pip install --force-reinstall --no-deps dwconv; or, if this is its source tree, build it "
        f"there: pip install --no-build-isolation --editable {_folder}"
    ) from _error

if _build_info()["cuda"] is not None and _torch.version.cuda is None and _torch.version.hip is None:
    _warnings.warn(
        f"dwconv was built with CUDA {_build_info()['cuda']}, but torch {_torch.__version__} is a CPU build: CPU "
        "tensors work, CUDA tensors need a CUDA build of torch (https://pytorch.org/get-started/locally)",
        RuntimeWarning,
        stacklevel=2,
    )

from . import _integrations as _integrations
from .convert import convert, revert
from .explain import explain
from .functional import conv2d
from .modules import DepthwiseConv2d
from .options import allow_fft

__all__ = ["DepthwiseConv2d", "__version__", "allow_fft", "conv2d", "convert", "explain", "revert"]
