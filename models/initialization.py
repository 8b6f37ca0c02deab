"""Values at the start, drawn for each parameter from a seed of its own: its name. So no mesh and no order changes them."""

import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

Initializer = Callable[[Tensor, torch.Generator], object]
Initializers = dict[str, Initializer]

# Matrices whose output is added to the residual stream: smaller by the root of how many are added (GPT-2's rule).
RESIDUAL = ("out_proj", "o_proj", "down_proj")


def zeros(tensor: Tensor, generator: torch.Generator | None = None) -> None:
    """All 0."""
    tensor.zero_()


def ones(tensor: Tensor, generator: torch.Generator | None = None) -> None:
    """All 1."""
    tensor.fill_(1.0)


def uniform_fan_in(tensor: Tensor, generator: torch.Generator | None = None) -> None:
    """Uniform within 1/sqrt(taps), torch's own for a depthwise convolution [c, taps]."""
    bound = tensor.shape[-1] ** -0.5
    tensor.uniform_(-bound, bound, generator=generator)


def inverse_softplus_dt(dt_bias: Tensor, generator: torch.Generator | None = None) -> None:
    """softplus(dt_bias) log-uniform in [1e-3, 0.1], as Mamba begins."""
    dt = dt_bias.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp_()
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def log_uniform_decay(A_log: Tensor, generator: torch.Generator | None = None) -> None:
    """log A with A uniform in [1, 16], as Mamba-2 begins."""
    A_log.uniform_(1.0, 16.0, generator=generator).log_()


def initialize(model: nn.Module, prefix: str, seed: int, std: float, residual_adds: int, same: dict[str, str]) -> None:
    """Fills every parameter, each drawn in fp32 on the CPU, and every buffer with zeros.

    A module's `initializers` say how; other parameters are normal with `std`, over sqrt(residual_adds) where their output is
    added to the residual stream. `prefix` is the model's own name in the whole one, so that parts can be filled apart. `same`:
    names of parameters, with the one whose values each has.
    """
    for path, module in model.named_modules(prefix=prefix):
        initializers: Initializers = getattr(module, "initializers", {})
        residual = path.rsplit(".", 1)[-1] in RESIDUAL
        for name, parameter in module.named_parameters(recurse=False):
            whole = same.get(f"{path}.{name}", f"{path}.{name}")
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {whole}".encode()))
            value = torch.empty(parameter.shape)
            if name in initializers:
                initializers[name](value, generator)
            else:
                scaled = residual or name in RESIDUAL
                value.normal_(0.0, std / math.sqrt(residual_adds) if scaled else std, generator=generator)
            with torch.no_grad():
                parameter.copy_(value)
        for buffer in module.buffers(recurse=False):
            buffer.zero_()
