"""Which implementation an operation runs: its Triton kernels, or the PyTorch reference."""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from typing import Literal

import torch

from ..configs.errors import UserError
from . import accelerators

Kernels = Literal["auto", "triton", "reference"]

# Looked up once: torch.compile traces through `fused`.
INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_log = logging.getLogger(__name__)
_chosen: Kernels = "auto"
_apex_rms_norm: Callable[..., torch.Tensor] | None = None
_usual: bool | None = None
"""What the first operation ran on: that is logged, and others only where they differ."""
_different: set[str] = set()


def choose(kernels: Kernels, norms: Literal["baton", "apex"] = "baton") -> None:
    """For the whole process. auto: Triton on CUDA and ROCm where the kernels take the arguments, the reference elsewhere.

    norms: apex: its FusedRMSNorm for plain RMS norms. Raises UserError where that is missing.
    """
    global _chosen, _apex_rms_norm
    _chosen, _apex_rms_norm = kernels, accelerators.fused_rms_norm() if norms == "apex" else None


@contextlib.contextmanager
def chosen(kernels: Kernels) -> Iterator[None]:
    """As `choose`, for a while."""
    global _chosen
    before, _chosen = _chosen, kernels
    try:
        yield
    finally:
        _chosen = before


def apex_rms_norm(device: torch.device) -> Callable[..., torch.Tensor] | None:
    """apex's function, where it is chosen. Raises UserError on a device that it does not run on."""
    if _apex_rms_norm is not None and device.type != "cuda":
        raise UserError(f"norms is apex, whose FusedRMSNorm runs on GPUs alone, not on {device.type}; allowed: baton")
    return _apex_rms_norm


def fused(operation: str, device: torch.device, obstacle: str | None = None) -> bool:
    """Whether `operation` runs its Triton kernels on tensors of `device`; the choice is logged once.

    obstacle: the argument that the kernels cannot take and what they can, in words; None if there is none. With `triton` chosen an
    obstacle is a UserError (a ValueError), with `auto` the reference runs.
    """
    obstacle = _missing(device) or obstacle
    if _chosen == "triton" and obstacle:
        raise UserError(f"{operation}: {obstacle} (kernels: triton)")
    result = obstacle is None and (_chosen == "triton" or (_chosen == "auto" and device.type == "cuda"))
    if not torch.compiler.is_compiling():
        _note(operation, result, obstacle if _chosen == "auto" else "as chosen")
    return result


def _note(operation: str, result: bool, why: str | None) -> None:
    global _usual
    if result == _usual or operation in _different:
        return
    implementation = "Triton" if result else "PyTorch reference"
    reason = f" ({why})" if why else ""
    if _usual is None:
        _usual = result
        _log.info("kernels: %s%s", implementation, reason)
    else:
        _different.add(operation)
        _log.info("kernels: %s for %s%s", implementation, operation, reason)


def _missing(device: torch.device) -> str | None:
    if not INSTALLED:
        return "the Triton kernels need the package triton"
    if device.type != "cuda" and not INTERPRETED:
        return f"tensors are on {device.type}, allowed for the Triton kernels: a CUDA or ROCm device"
    return None
