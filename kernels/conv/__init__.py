"""The short causal convolution before a state-space scan, with its SiLU."""

from .op import causal_conv
