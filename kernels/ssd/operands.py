"""What every function of the SSD scan is given, in PyTorch and on Triton kernels alike."""

from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """As `op.ssd` has them; the b sequences of l tokens are made of `runs` equal runs of neighbouring tokens each."""

    x: Tensor  # [b, l, h, p]
    dt: Tensor  # [b, l, h], before softplus
    A: Tensor  # [h]
    B: Tensor  # [b, l, g, n]
    C: Tensor  # [b, l, g, n]
    D: Tensor | None  # [h]
    dt_bias: Tensor | None  # [h]
    resets: Tensor | None  # [b, l] bool
    low: float  # least and
    high: float  # largest positive dt
    runs: int
    chunk: int  # tokens worked on together


class Prepared(NamedTuple):
    """What the functions share; its contents are the implementation's own."""

    steps: Tensor
    scores: Tensor


class Grads(NamedTuple):
    """In the shapes of the operands; dA, dD and ddt_bias [h] in fp32 or wider, zeros where there is no such operand."""

    dx: Tensor
    ddt: Tensor
    dA: Tensor
    dB: Tensor
    dC: Tensor
    dD: Tensor
    ddt_bias: Tensor
