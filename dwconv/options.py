"""``allow_fft``: what a caller may ask for by name."""

from __future__ import annotations

from contextvars import ContextVar, Token
from threading import Lock

__all__ = ["allow_fft"]

_is_fft_allowed: ContextVar[bool] = ContextVar("dwconv.allow_fft", default=False)

# Blocks entered in any thread. While none is, calls look up nothing, so that torch.compile need not trace
# ContextVar.get, which it cannot with torch 2.11.
_open_blocks, _is_any_open, _counting = 0, False, Lock()


def _count_blocks(change: int) -> None:
    global _open_blocks, _is_any_open
    with _counting:
        _open_blocks += change
        _is_any_open = _open_blocks > 0


class allow_fft:
    """Lets Fourier transforms serve large kernels in float32 on CUDA, within a ``with`` block.

    They are several times faster there, and have errors of another kind: see :func:`dwconv.conv2d`, whose argument of
    the same name does this for one call, and has the last word. Without either, they never serve. Gradients are
    computed as their forward pass was asked to, wherever that happens. The permission is that of a thread and of an
    asynchronous task: threads started within the block are without it, tasks inherit it. Blocks may be nested;
    ``allow_fft(False)`` takes it back. What torch.compile compiled with it is compiled again without; the block has to
    stand around the compiled function, since within torch.compile breaks the graph there. With torch 2.11 torch.compile
    breaks the graph at every call within a block; the argument compiles with any version.

    Args:
        allowed: a bool.

    Example:
        >>> with dwconv.allow_fft():
        ...     loss = model(x).sum()
        >>> loss.backward()  # with Fourier transforms, too
    """

    def __init__(self, allowed: bool = True) -> None:
        if not isinstance(allowed, bool):
            raise TypeError(f"allow_fft(): argument 'allowed' must be bool, not {type(allowed).__name__}")
        self.allowed = allowed
        self._tokens: list[Token[bool]] = []

    def __enter__(self) -> None:
        _count_blocks(1)
        self._tokens.append(_is_fft_allowed.set(self.allowed))

    def __exit__(self, *_: object) -> None:
        _is_fft_allowed.reset(self._tokens.pop())
        _count_blocks(-1)


def is_fft_allowed(asked: bool | None) -> bool:
    """What a call's argument says, or without one the block around it."""
    if asked is None:
        return _is_any_open and _is_fft_allowed.get()
    if not isinstance(asked, bool):
        raise TypeError(f"conv2d(): argument 'allow_fft' must be bool or None, not {type(asked).__name__}")
    return asked
