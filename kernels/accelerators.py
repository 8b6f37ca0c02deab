"""Packages of NVIDIA's that do a part of the work on GPUs: taken where they are installed and asked for, never needed.

None of them has been run here, which needs a GPU: tests put what keeps to their interfaces in their place.
"""

import importlib
from typing import Any, Literal

from ..configs.errors import UserError

Name = Literal["apex", "transformer_engine"]

INSTALL: dict[Name, str] = {
    "apex": (
        "NVIDIA's apex with its CUDA extensions is not installed (git clone https://github.com/NVIDIA/apex; in it APEX_CPP_EXT=1 "
        "APEX_CUDA_EXT=1 pip install --no-build-isolation . builds it; apex on PyPI is another project)"
    ),
    "transformer_engine": (
        "Transformer Engine for PyTorch is not installed (pip install --no-build-isolation 'transformer_engine[pytorch]' builds "
        "it, which needs CUDA's compiler and cuDNN)"
    ),
}
"""What is said where one is missing."""


def find(name: Name, module: str, part: str) -> Any:
    """A part, such as `optimizers`' `FusedAdam`; None where the package, or what it needs of CUDA, is missing.

    PyPI's project called apex has none of apex's modules; the real one may be built without CUDA extensions.
    """
    try:
        if name == "apex" and not importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier.available:
            return None
        return getattr(importlib.import_module(f"{name}.{module}"), part, None)
    except Exception:
        # Whatever a package that does not fit the machine raises when it is imported: it is not to stop who does not ask for it.
        return None


def fused_adam(name: Name) -> Any:
    """The class FusedAdam, or None."""
    return find(name, "optimizers" if name == "apex" else "pytorch.optimizers", "FusedAdam")


def fused_rms_norm() -> Any:
    """apex's function of x, weight, its shape and eps. Raises UserError where it is missing."""
    found = find("apex", "normalization.fused_layer_norm", "fused_rms_norm_affine")
    if found is None:
        raise UserError(f"norms is apex, and {INSTALL['apex']}; allowed: baton")
    return found


def found() -> list[str]:
    """Those that are installed."""
    return [name for name in INSTALL if fused_adam(name) is not None]
