"""Causal attention of a run of queries over the keys up to its end."""

from .op import causal_attention
