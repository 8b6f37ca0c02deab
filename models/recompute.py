"""What backward computes once more instead of keeping it from forward (Chen et al., arXiv 1604.06174)."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

_thread = threading.local()
"""Of backward, which autograd may run in a thread of its own."""


def recomputing() -> bool:
    """Whether forward runs a second time: what counts something, such as tokens, has counted it before."""
    return getattr(_thread, "again", False)


def run_again(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), of which only the arguments are kept; backward calls it once more, collectives and all.

    It must do the same both times, and draw no random numbers.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of the first run and of the second."""
    return nullcontext(), _second()


@contextmanager
def _second() -> Iterator[None]:
    _thread.again = True
    try:
        yield
    finally:
        _thread.again = False
