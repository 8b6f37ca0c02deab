"""SwiGLU's gate, with the router's weights where there are any."""

from .op import swiglu
