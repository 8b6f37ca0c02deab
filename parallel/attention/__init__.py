"""Causal attention over a sequence whose segments lie on different ranks, exact: how keys and queries meet, and what that costs."""

from .sequence import SequenceAttention
from .strategies import (
    ATTENTION_FLOPS,
    BACKWARD_PRODUCTS,
    Strategy,
    attention_seconds,
    attention_traffic,
    choose_attention,
    ulysses_degree,
    work,
)
