"""What is taken of other projects where it is there, by things that keep to their interfaces; and what is said where it is not."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from baton.configs.errors import UserError
from baton.kernels import accelerators, dispatch
from baton.kernels.norm import add_rms_norm, rms_norm


class FusedAdam:
    """Stands for theirs."""


@pytest.fixture
def install(monkeypatch):
    """Makes modules importable by their dotted names, and none of apex or Transformer Engine besides."""

    def install(modules):
        for name in [name for name in sys.modules if name.partition(".")[0] in accelerators.INSTALL]:
            monkeypatch.delitem(sys.modules, name)
        for name, contents in modules.items():
            module = ModuleType(name)
            vars(module).update({"__path__": []} | contents)
            monkeypatch.setitem(sys.modules, name, module)

    return install


def apex(available=True):
    applier = {"multi_tensor_applier": SimpleNamespace(available=available)}
    norm = {"fused_rms_norm_affine": lambda x, weight, shape, eps: F.rms_norm(x, tuple(shape), weight, eps)}
    return {
        "apex": {},
        "apex.multi_tensor_apply": applier,
        "apex.optimizers": {"FusedAdam": FusedAdam},
        "apex.normalization": {},
        "apex.normalization.fused_layer_norm": norm,
    }


ENGINE = {
    "transformer_engine": {},
    "transformer_engine.pytorch": {},
    "transformer_engine.pytorch.optimizers": {"FusedAdam": FusedAdam},
}


def test_which_are_there(install):
    """PyPI's apex is another project; one without CUDA extensions has no FusedAdam that runs."""
    for modules, expected in (
        ({}, []),
        ({"apex": {}}, []),
        (apex(available=False), []),
        (apex(), ["apex"]),
        (ENGINE, ["transformer_engine"]),
        (apex() | ENGINE, ["apex", "transformer_engine"]),
    ):
        install(modules)
        assert accelerators.found() == expected
        assert [accelerators.fused_adam(name) for name in expected] == [FusedAdam] * len(expected)


def test_norms_by_apex(install, monkeypatch):
    """In place of both plain norms; refused in one line where it is missing, or the tensors are not on a GPU."""
    x, residual, weight = (torch.randn(2, 3, 8) for _ in range(3))
    weight = weight[0, 0]
    expected = rms_norm(x, weight, 1e-3), *add_rms_norm(x, residual, weight, 1e-3)
    try:
        install(apex())
        dispatch.choose("auto", "apex")
        with pytest.raises(UserError, match="^norms is apex, whose FusedRMSNorm runs on GPUs alone, not on cpu; allowed: baton$"):
            rms_norm(x, weight, 1e-3)
        called = []
        theirs = accelerators.fused_rms_norm()
        monkeypatch.setattr(dispatch, "apex_rms_norm", lambda device: lambda *given: (called.append(given), theirs(*given))[1])
        found = rms_norm(x, weight, 1e-3), *add_rms_norm(x, residual, weight, 1e-3)
        assert len(called) == 2
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, expected, strict=True))
        install({})
        with pytest.raises(UserError, match="^norms is apex, and NVIDIA's apex .* is not installed .*; allowed: baton$"):
            dispatch.choose("auto", "apex")
    finally:
        dispatch.choose("auto")
