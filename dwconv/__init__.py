"""Depthwise 2-D convolution for PyTorch: ``F.conv2d(..., groups=C)``, faster.

>>> y = dwconv.conv2d(x, weight, bias, padding=1)      # a function
>>> layer = dwconv.DepthwiseConv2d(64, 3, padding=1)   # a module
>>> dwconv.convert(model)                              # a whole model, in place
>>> print(dwconv.explain(x, weight))                   # which kernel serves a call
"""

import re as _re

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
    from . import _C  # noqa: F401
except ImportError as _error:
    raise ImportError(
        f"dwconv {__version__} cannot load its compiled part under torch {_torch.__version__}: {_error}. "
        "Reinstall it for this Python: pip install --force-reinstall --no-deps dwconv"
    ) from _error

from .convert import convert  # noqa: E402
from .explain import explain  # noqa: E402
from .functional import conv2d  # noqa: E402
from .modules import DepthwiseConv2d  # noqa: E402

__all__ = ["DepthwiseConv2d", "__version__", "conv2d", "convert", "explain"]
